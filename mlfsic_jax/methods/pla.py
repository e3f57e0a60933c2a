"""PLA (Yazici et al. 2020): an LSTM that emits an image's labels one by one, trained with predicted label alignment.

The decoder attends over the local features, and each prediction is its next input; after the last label comes "end".
Labels have no order, so the order of the targets follows the predictions (``align``). A label's score is its highest
probability over the steps. Smaller widths than the authors', and local features projected to their principal directions
(both ours), allow tuning the whole decoder on every support set.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from optax.assignment import hungarian_algorithm

from mlfsic_jax.core.functional import unit
from mlfsic_jax.core.options import positive, require
from mlfsic_jax.core.word_ridge import principal_directions
from mlfsic_jax.methods._training import adam, adam_in_chunks, map_regions, some_regions
from mlfsic_jax.methods.base import FIXED, Method
from mlfsic_jax.methods.classifier import EPOCHS

MAX_LABELS = 5  # steps before the last "end"; an image with more labels has the best fitting ones as targets
_CHUNK = 50  # steps in one program
_FORBIDDEN = 1e3  # a cost above that of all allowed steps together


@dataclasses.dataclass(frozen=True)
class PLA(Method):
    """Trains the decoder on base images; tunes it, with rows for the new labels, on the support."""

    sections: ClassVar[tuple[str, ...]] = ("pla",)
    base: ClassVar[str] = "labels"
    on_request: ClassVar[bool] = True

    # start label vectors from word vectors; else at random ("self-learned")
    words: bool = dataclasses.field(default=False, metadata=FIXED)
    n_components: int = 128  # of the projected local features, ours
    width: int = 128  # of the LSTM and of the attention; the authors' code has 512
    embedding: int = 64  # width of self-learned label vectors; the authors' code has 256
    training_steps: int = 500  # of Adam in training, ours
    batch_size: int = 32  # images in a training step, as in the authors' code
    training_learning_rate: float = 1e-3  # of Adam in training, ours
    max_images: int = 8192  # how many to train on, at random (ours): their projected features are held in memory
    epochs: int = EPOCHS  # steps of Adam on the whole support
    learning_rate: float = 1e-2  # of Adam on the support; ours, chosen on validation labels

    def __post_init__(self):
        super().__post_init__()
        fields = [field.name for field in dataclasses.fields(self) if field.name != "words"]
        require(self, **positive(self, *fields))

    @property
    def stores(self):
        return ("pla_words" if self.words else "pla",)

    @property
    def needs_words(self):
        return self.words

    def train(self, key, base):
        init_key, rows_key, step_key = jax.random.split(key, 3)
        rows = np.sort(np.asarray(jax.random.permutation(rows_key, len(base.labels)))[: self.max_images])
        mean, components = _directions(some_regions(base, rows), self.n_components)
        # Half precision: all of it is held in memory.
        z = jnp.asarray(map_regions(base, rows, lambda regions: ((regions - mean) @ components).astype(np.float16)))
        y = jnp.asarray(base.labels[rows], jnp.float32)
        model = Decoder(self.width)
        words = base.word_vectors if self.words else None
        params, labels = _init(init_key, model, z, y.shape[1], words, self.embedding)

        @jax.jit
        def draw(chunk):
            return jax.random.randint(jax.random.fold_in(step_key, chunk), (_CHUNK, self.batch_size), 0, len(z))

        def batch_loss(tuned, data, batch):
            z, y = data
            return _batch_loss(model, tuned, z[batch].astype(jnp.float32), y[batch])

        options = {"steps": self.training_steps, "chunk": _CHUNK, "learning_rate": self.training_learning_rate}
        name = "PLA with word vectors" if self.words else "PLA"
        params, labels = adam_in_chunks(batch_loss, (params, labels), (z, y), draw, description=name, **options)
        arrays = {"mean": jnp.asarray(mean), "components": jnp.asarray(components)}
        return arrays | {"params": params, "labels": labels._asdict()}

    def embed(self, trained, features):
        return {"regions": (features - trained["mean"]) @ trained["components"]}

    def embed_key(self, trained):
        return PLA.embed, id(trained["components"])

    def fit(self, trained, images, labels, words):
        y = labels.astype(jnp.float32)
        rows = new_labels(Labels(**trained["labels"]), y.shape[1], words if self.words else None)

        def loss(tuned, _):
            return _batch_loss(Decoder(self.width), tuned, images["regions"], y)

        start = (trained["params"], rows)
        return adam(loss, start, jnp.arange(self.epochs), learning_rate=self.learning_rate)[0]

    def score(self, trained, state, images):
        params, rows = state
        decode = jax.vmap(lambda z: Decoder(self.width).apply({"params": params}, z, rows))
        return jnp.exp(decode(images["regions"]).max(axis=1)[:, :-1])  # the highest probability over the steps


class Labels(NamedTuple):
    """Parameters of the labels; the row after the last label is "end"."""

    vectors: jax.Array  # float [C + 1, e], inputs of the LSTM
    output: jax.Array  # float [C + 1, h], their classifiers
    bias: jax.Array  # float [C + 1]


class Decoder(nn.Module):
    """The LSTM with additive attention over the local features, on one image."""

    width: int  # h, of the LSTM and the attention

    @nn.compact
    def __call__(self, regions, labels: Labels):
        """Emits labels greedily: float [L, d], C labels -> log probabilities of the T steps, float [T, C + 1]."""
        n_labels, embedding = labels.vectors.shape[0] - 1, labels.vectors.shape[1]
        pooled = regions.mean(axis=0)
        carry = (nn.Dense(self.width, name="cell_start")(pooled), nn.Dense(self.width, name="hidden_start")(pooled))
        keys = nn.Dense(self.width, name="attention_key")(regions)
        ask, weigh = nn.Dense(self.width, name="attention_query"), nn.Dense(1, name="attention_weight")
        gate, cell = nn.Dense(regions.shape[1], name="gate"), nn.OptimizedLSTMCell(self.width, name="cell")
        last = self.param("start", nn.initializers.normal(1.0), (embedding,))
        emitted = []
        for _ in range(min(MAX_LABELS, n_labels) + 1):
            attention = jax.nn.softmax(weigh(nn.relu(keys + ask(carry[1])))[:, 0])
            context = nn.sigmoid(gate(carry[1])) * (attention @ regions)
            carry, hidden = cell(carry, jnp.concatenate([last, context]))
            logits = labels.output @ hidden + labels.bias
            last = labels.vectors[jnp.argmax(logits)]
            emitted.append(jax.nn.log_softmax(logits))
        return jnp.stack(emitted)


def align(log_probabilities, labels):
    """Predicted label alignment: [T, C + 1], 0/1 [C] -> int [T], the target of each step; bool [T], whether it counts.

    The m labels of the image take the first m steps, "end" the next. A label that is predicted within them keeps (the
    first of) its steps; an assignment problem spreads the others over the remaining steps with the lowest sum of
    -log p.
    """
    n_labels = len(labels)
    cost, labels = -log_probabilities[:-1, :n_labels], labels.astype(bool)  # [R, C], R <= C
    steps = jnp.arange(len(cost))
    m = jnp.minimum(labels.sum(), len(cost))
    predicted = jax.nn.one_hot(jnp.argmax(log_probabilities[:-1], axis=1), n_labels, dtype=bool)
    hits = predicted & labels & (steps < m)[:, None]
    fixed = hits & (jnp.cumsum(hits, axis=0) == 1)
    taken = fixed.any(axis=1)[:, None] | fixed.any(axis=0)
    allowed = jnp.where(taken, fixed, labels)
    cost = jnp.where(allowed, jnp.minimum(cost, _FORBIDDEN / 10), _FORBIDDEN)
    # The steps after "end" take any remaining label.
    cost = jnp.where((steps < m)[:, None], cost, jnp.where(labels, _FORBIDDEN, 0.0))
    rows, columns = hungarian_algorithm(cost)
    targets = jnp.full(len(steps) + 1, n_labels).at[rows].set(columns)
    steps = jnp.arange(len(targets))
    return jnp.where(steps < m, targets, n_labels), steps <= m


def loss(log_probabilities, labels):
    """Cross-entropy of one image with the aligned targets, averaged over its steps: [T, C + 1], 0/1 [C] -> scalar."""
    targets, counts = align(jax.lax.stop_gradient(log_probabilities), labels)
    picked = jnp.take_along_axis(log_probabilities, targets[:, None], axis=1)[:, 0]
    return -jnp.sum(picked * counts) / counts.sum()


def _batch_loss(model, tuned, regions, labels):
    params, label_rows = tuned
    log_probabilities = jax.vmap(lambda z: model.apply({"params": params}, z, label_rows))(regions)
    return jax.vmap(loss)(log_probabilities, labels).mean()


def new_labels(base: Labels, n_labels: int, words=None) -> Labels:
    """A start for C new labels: the mean of the base labels; their vectors from words, float [C, d_w], where given."""

    def mean_row(rows):
        mean = jnp.broadcast_to(rows[:-1].mean(axis=0), (n_labels, *rows.shape[1:]))
        return jnp.concatenate([mean, rows[-1:]])

    labels = jax.tree.map(mean_row, base)
    if words is None:
        return labels
    return labels._replace(vectors=jnp.concatenate([_scaled(words), base.vectors[-1:]]))


def _directions(regions, n_components: int):
    """Mean of local features and their principal directions, scaled so that projections have entries of order one."""
    mean = regions.mean(axis=(0, 1))
    components = principal_directions(regions, mean, n_components)
    return mean, components / np.sqrt(np.mean(((regions - mean) @ components) ** 2))


def _init(key, model: Decoder, z, n_labels: int, word_vectors, embedding: int):
    """Fresh parameters of the decoder and of the base labels."""
    if word_vectors is not None:
        embedding = word_vectors.shape[1]

    @jax.jit
    def init(key):
        params_key, labels_key = jax.random.split(key)
        random = jax.random.normal(labels_key, (n_labels + 1, embedding + model.width))
        vectors = random[:, :embedding]
        if word_vectors is not None:
            vectors = jnp.concatenate([_scaled(word_vectors), vectors[-1:]])
        labels = Labels(vectors, random[:, embedding:] / np.sqrt(model.width), jnp.zeros(n_labels + 1))
        return model.init(params_key, z[0].astype(jnp.float32), labels)["params"], labels

    return init(key)


def _scaled(word_vectors):
    """Word vectors scaled to entries of order one: float [C, d_w]."""
    return unit(jnp.asarray(word_vectors, jnp.float32)) * np.sqrt(word_vectors.shape[1])
