"""MAML (Finn et al. 2017): a start from which a few gradient steps on the support learn its labels.

The learner has two layers on pooled features: an embedding, and a linear layer with one output per label. Novel labels
differ from base labels, also in number, so all outputs start from one shared learned vector (ours).
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlfsic_jax.core.episodes import sample_episodes
from mlfsic_jax.core.functional import binary_cross_entropy, unit
from mlfsic_jax.core.options import positive, require
from mlfsic_jax.methods._training import adam_in_chunks, pooled_features
from mlfsic_jax.methods.base import FIXED, Method
from mlfsic_jax.methods.classifier import EPOCHS
from mlfsic_jax.methods.closed_form import centred_unit

_CHUNK = 50  # episodes drawn at once


@dataclasses.dataclass(frozen=True)
class MAML(Method):
    """Learns the start on episodes of base labels, one a step, and adapts it to a support set."""

    sections: ClassVar[tuple[str, ...]] = ("maml",)
    base: ClassVar[str] = "labels"
    logits: ClassVar[bool] = True
    on_request: ClassVar[bool] = True

    width: int = 128  # of the embedding, ours
    training_steps: int = 400  # of Adam in training, the outer loop; ours
    training_learning_rate: float = 3e-4  # of Adam in training, ours
    inner_steps: int = 5  # of gradient descent on the support in training; ours
    epochs: int = EPOCHS  # the same on a new support set
    learning_rate: float = 3.0  # alpha, of gradient descent on a support set; ours, chosen on validation labels
    first_order: bool = dataclasses.field(default=False, metadata=FIXED)  # first-order MAML
    n_shot: int = dataclasses.field(default=1, metadata=FIXED)  # K of the training episodes
    n_query: int = dataclasses.field(default=4, metadata=FIXED)  # their query images per label

    def __post_init__(self):
        super().__post_init__()
        fields = ("width", "training_steps", "training_learning_rate", "inner_steps", "epochs", "learning_rate")
        require(self, **positive(self, *fields))

    @property
    def stores(self):
        return ("maml_first_order" if self.first_order else "maml",)

    def train(self, key, base):
        features = pooled_features(base)
        mean = features.mean(axis=0)
        x, labels = unit(jnp.asarray(features - mean)), jnp.asarray(base.labels, jnp.float32)
        init_key, episode_key = jax.random.split(key)
        embedding = jax.random.normal(init_key, (x.shape[1], self.width)) * np.sqrt(2 / self.width)
        start = Learner(embedding, jnp.zeros(self.width), jnp.zeros((self.width, 1)), jnp.zeros(1))
        inner = {"steps": self.inner_steps, "learning_rate": self.learning_rate, "first_order": self.first_order}

        def draw(chunk):
            sizes = {"n_episodes": _CHUNK, "n_shot": self.n_shot, "n_query": self.n_query}
            return sample_episodes(jax.random.fold_in(episode_key, chunk), base.labels, **sizes)

        def query_loss(start, data, episode):
            (x, labels), (s, q) = data, episode
            return episode_loss(start, x[s], labels[s], x[q], labels[q], **inner)

        options = {"steps": self.training_steps, "chunk": _CHUNK, "learning_rate": self.training_learning_rate}
        name = "first-order MAML" if self.first_order else "MAML"
        start = adam_in_chunks(query_loss, start, (x, labels), draw, description=name, **options)
        return {"mean": jnp.asarray(mean), "start": start._asdict()}

    def fit(self, trained, images, labels, words):
        x, y = centred_unit(trained, images), labels.astype(jnp.float32)
        return adapt(Learner(**trained["start"]), x, y, steps=self.epochs, learning_rate=self.learning_rate)

    def score(self, trained, state, images):
        return logits(state, centred_unit(trained, images))


class Learner(NamedTuple):
    """Parameters of the two layers."""

    embedding: jax.Array  # float [n, h]
    embedding_bias: jax.Array  # float [h]
    output: jax.Array  # float [h, C]; [h, 1] in a start, which all labels share
    output_bias: jax.Array  # float [C]; [1] in a start


def logits(learner: Learner, x):
    """float [I, n] -> [I, C]."""
    hidden = jax.nn.relu(x @ learner.embedding + learner.embedding_bias)
    return hidden @ learner.output + learner.output_bias


def loss(learner: Learner, x, labels):
    """Cross-entropy summed over labels and averaged over images: float [I, n], 0/1 [I, C] -> []."""
    return binary_cross_entropy(logits(learner, x), labels).sum(axis=1).mean()


def adapt(start: Learner, x, labels, *, steps: int, learning_rate: float, first_order: bool = False) -> Learner:
    """Gradient descent on ``loss`` of a support, float [S, n], 0/1 [S, C], from a start to a ``Learner`` of C outputs.

    ``first_order`` treats the inner gradients as constants when the result is differentiated (FOMAML).
    """
    n_labels = labels.shape[1]
    outputs = {"output": jnp.tile(start.output, (1, n_labels)), "output_bias": jnp.tile(start.output_bias, n_labels)}

    def step(learner, _):
        gradient = jax.grad(loss)(learner, x, labels)
        if first_order:
            gradient = jax.lax.stop_gradient(gradient)
        return jax.tree.map(lambda p, g: p - learning_rate * g, learner, gradient), None

    return jax.lax.scan(step, start._replace(**outputs), length=steps)[0]


def episode_loss(start: Learner, support, support_labels, query, query_labels, **inner):
    """The query's ``loss`` after ``adapt`` (with options ``inner``) to the support: what MAML descends on."""
    return loss(adapt(start, support, support_labels, **inner), query, query_labels)
