"""Multi-label classifier on the backbone: one linear layer on frozen global features, fitted to the support.

Fine-tuning of the backbone itself is out of scope here: all peers see the same cached features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from mlfsic_jax.core.functional import binary_cross_entropy, unit
from mlfsic_jax.methods._training import adam, map_locals

if TYPE_CHECKING:
    from mlfsic_jax.data.features import View

EPOCHS = 40  # of fitting to a support set; the paper's number for all its baselines (section 5.1.2)
LEARNING_RATE = 0.1


def global_features(base: View) -> np.ndarray:
    """Means over positions of all images of a split: float32 [I, n]."""
    return map_locals(base, np.arange(len(base.labels)), lambda local: local.mean(axis=1))


def train(key, base: View, *, n_shot: int, n_query: int) -> np.ndarray:
    """The mean global feature of the base images, float32 [n]: all that this peer takes from them."""
    del key, n_shot, n_query
    return global_features(base).mean(axis=0)


def centred_unit(local_features, mean):
    """Global features minus the base mean, at length 1: float [I, L, n], [n] -> [I, n]."""
    return unit(local_features.mean(axis=1) - mean)


def fit_linear(batch_of: Callable, n_features: int, n_labels: int, *, epochs: int, learning_rate: float):
    """Fits a linear layer by Adam from zero; the loss is the mean cross-entropy over images and labels.

    Args:
      batch_of: epoch -> (float [B, n], 0/1 [B, C]); one epoch is one step on all of its batch.
      n_features: n.
      n_labels: C.
      epochs: steps.
      learning_rate: of Adam.

    Returns:
      (weights float [n, C], bias float [C]).
    """

    def loss(layer, epoch):
        features, labels = batch_of(epoch)
        return binary_cross_entropy(features @ layer[0] + layer[1], labels).mean()

    zeros = (jnp.zeros((n_features, n_labels)), jnp.zeros(n_labels))
    return adam(loss, zeros, jnp.arange(epochs), learning_rate=learning_rate)[0]


def score(
    trained, key, support, labels, query, word_vectors, *, epochs: int = EPOCHS, learning_rate: float = LEARNING_RATE
):
    """Fits the layer to the support and applies it to the queries.

    Args:
      trained: of ``train``.
      key: not used: the fit starts at zero.
      support: float32 [S, L, n], local features.
      labels: bool [S, C].
      query: float32 [Q, L, n].
      word_vectors: not used.
      epochs: steps on the whole support.
      learning_rate: of Adam; ours, chosen on validation labels.

    Returns:
      float32 [Q, C], probabilities.
    """
    del key, word_vectors
    x = centred_unit(support, trained)
    batch = (x, labels.astype(x.dtype))
    weights, bias = fit_linear(lambda _: batch, x.shape[1], labels.shape[1], epochs=epochs, learning_rate=learning_rate)
    return jax.nn.sigmoid(centred_unit(query, trained) @ weights + bias)
