"""Multi-label classifier: one linear layer on frozen pooled features, fitted to the support by Adam.

The backbone itself is not fine-tuned: all methods see the same cached features.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from mlfsic_jax.core.functional import binary_cross_entropy
from mlfsic_jax.core.options import positive, require
from mlfsic_jax.methods._training import adam, mean_feature, pooled_features
from mlfsic_jax.methods.base import Method
from mlfsic_jax.methods.closed_form import centred_unit

EPOCHS = 40  # on a support set; the paper's number for all its baselines (section 5.1.2)


@dataclasses.dataclass(frozen=True)
class LinearLayer(Method):
    """The family whose ``fit`` gives one linear layer on centred unit features: weights [n, C] and bias [C]."""

    stores: ClassVar[tuple[str, ...]] = ("fitted",)
    base: ClassVar[str] = "images"
    on_request: ClassVar[bool] = True

    def train(self, key, base):
        return {"mean": mean_feature(pooled_features(base))}

    def score(self, trained, state, images):
        weights, bias = state
        return jax.nn.sigmoid(centred_unit(trained, images) @ weights + bias)


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


def fit_linear(batch_of: Callable, n_features: int, n_labels: int, *, epochs: int, learning_rate: float):
    """Fits a linear layer by Adam, from zero, on the mean cross-entropy over images and labels: [n, C], [C].

    ``batch_of`` makes of an epoch its batch, (float [B, n], 0/1 [B, C]); an epoch is one step.
    """

    def loss(layer, epoch):
        features, labels = batch_of(epoch)
        return binary_cross_entropy(features @ layer[0] + layer[1], labels).mean()

    zeros = (jnp.zeros((n_features, n_labels)), jnp.zeros(n_labels))
    return adam(loss, zeros, jnp.arange(epochs), learning_rate=learning_rate)[0]
