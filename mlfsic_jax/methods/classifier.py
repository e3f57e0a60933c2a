"""Multi-label classifiers: one linear layer on frozen pooled features, fitted to the support by Adam.

The backbone itself is not fine-tuned: all methods see the same cached features.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mlfsic_jax.core.functional import binary_cross_entropy, unit
from mlfsic_jax.core.options import positive, require
from mlfsic_jax.methods._training import adam, adam_in_chunks, mean_feature, pooled_features
from mlfsic_jax.methods.base import Method
from mlfsic_jax.methods.closed_form import centred_unit

EPOCHS = 40  # on a support set; the paper's number for all its baselines (section 5.1.2)
_CHUNK = 100  # steps in one program
_CHUNK = 100  # steps in one program


@dataclasses.dataclass(frozen=True)
class LinearLayer(Method):
    """The family whose ``fit`` gives one linear layer on centred unit features: weights [n, C] and bias [C]."""

    stores: ClassVar[tuple[str, ...]] = ("fitted",)
    base: ClassVar[str] = "images"
    logits: ClassVar[bool] = True
    on_request: ClassVar[bool] = True

    def train(self, key, base):
        return {"mean": mean_feature(pooled_features(base))}

    def score(self, trained, state, images):
        weights, bias = state
        return centred_unit(trained, images) @ weights + bias


@dataclasses.dataclass(frozen=True)
class Classifier(LinearLayer):
    """The layer fitted by Adam to the support's cross-entropy."""

    sections: ClassVar[tuple[str, ...]] = ("classifier",)

    epochs: int = EPOCHS  # steps of Adam, each on the whole support
    learning_rate: float = 0.1  # of Adam; ours, chosen on validation labels

    def __post_init__(self):
        super().__post_init__()
        require(self, **positive(self, "epochs", "learning_rate"))

    def fit(self, trained, images, labels, words):
        x, y = centred_unit(trained, images), labels.astype(jnp.float32)
        options = {"epochs": self.epochs, "learning_rate": self.learning_rate}
        return fit_linear(lambda _: (x, y), x.shape[1], y.shape[1], **options)


@dataclasses.dataclass(frozen=True)
class ClassifierPretrained(Classifier):
    """The layer on features of a network that learned the base labels first.

    The paper leaves open whether its classifiers do. The authors' code trains the whole backbone with a linear layer on
    base labels, then puts a new layer in the place of that one. The backbone being frozen, a hidden layer stands for it
    here; ``python -m mlfsic_jax.pretrain`` trains the backbone itself, for ``Classifier``.
    """

    sections: ClassVar[tuple[str, ...]] = ("classifier_pretrained",)
    stores: ClassVar[tuple[str, ...]] = ("classifier_pretrained",)
    base: ClassVar[str] = "labels"
    against: ClassVar[str] = "classifier"

    width: int = 1280  # of the hidden layer; ours, better than 512 on validation labels
    training_steps: int = 600  # of Adam in training, ours
    batch_size: int = 64  # images in a training step, as in the authors' code
    training_learning_rate: float = 1e-3  # of Adam in training, as in the authors' code

    def __post_init__(self):
        super().__post_init__()
        require(self, **positive(self, "width", "training_steps", "batch_size", "training_learning_rate"))

    def train(self, key, base):
        pooled, labels = pooled_features(base), jnp.asarray(base.labels, jnp.float32)
        mean, data = mean_feature(pooled), (jnp.asarray(pooled), labels)
        init_key, batch_key = jax.random.split(key)
        weights = jax.random.normal(init_key, (pooled.shape[1], self.width)) * np.sqrt(2 / pooled.shape[1])
        output = {"weights": jnp.zeros((self.width, labels.shape[1])), "bias": jnp.zeros(labels.shape[1])}
        start = {"hidden": {"weights": weights, "bias": jnp.zeros(self.width)}, "output": output}

        @jax.jit
        def draw(chunk):
            return jax.random.randint(jax.random.fold_in(batch_key, chunk), (_CHUNK, self.batch_size), 0, len(labels))

        def loss(params, data, rows):
            x, y = (part[rows] for part in data)
            features, output = hidden(params["hidden"] | {"mean": mean}, x), params["output"]
            return binary_cross_entropy(features @ output["weights"] + output["bias"], y).mean()

        options = {"steps": self.training_steps, "chunk": _CHUNK, "learning_rate": self.training_learning_rate}
        learned = adam_in_chunks(loss, start, data, draw, description="classifier of base labels", **options)
        layer = learned["hidden"] | {"mean": jnp.asarray(mean)}  # the output layer knows base labels only
        return {"mean": mean_feature(np.asarray(hidden(layer, data[0]))), "hidden": layer}

    def embed(self, trained, features):
        return {"pooled": hidden(trained["hidden"], features.mean(axis=1))}


def hidden(layer, pooled):
    """The hidden layer of ``ClassifierPretrained``, on pooled features: float [I, n] -> [I, width]."""
    x = unit(pooled - layer["mean"]) * np.sqrt(pooled.shape[1])  # entries of order one
    return jax.nn.relu(x @ layer["weights"] + layer["bias"])


def fit_linear(batch_of: Callable, n_features: int, n_labels: int, *, epochs: int, learning_rate: float):
    """Fits a linear layer by Adam, from zero, on the mean cross-entropy over images and labels: [n, C], [C].

    ``batch_of`` makes of an epoch its batch, (float [B, n], 0/1 [B, C]); an epoch is one step.
    """

    def loss(layer, epoch):
        features, labels = batch_of(epoch)
        return binary_cross_entropy(features @ layer[0] + layer[1], labels).mean()

    zeros = (jnp.zeros((n_features, n_labels)), jnp.zeros(n_labels))
    return adam(loss, zeros, jnp.arange(epochs), learning_rate=learning_rate)[0]
