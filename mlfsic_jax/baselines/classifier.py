"""Multi-label classifier on the backbone: one linear layer on frozen global features, fitted to the support.

Fine-tuning of the backbone itself is out of scope here: all peers see the same cached features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlfsic_jax.losses import binary_cross_entropy
from mlfsic_jax.similarity import unit

if TYPE_CHECKING:
    from mlfsic_jax.evaluate import SplitView

EPOCHS = 40  # of fitting to a support set; the paper's number for all its baselines (section 5.1.2)
LEARNING_RATE = 0.1
_READ = 256


def global_features(base: SplitView) -> np.ndarray:
    """Means over positions of all images of a split: float32 [I, n]."""
    n_images = len(base.labels)
    parts = []
    for start in range(0, n_images, _READ):
        local = np.asarray(base.inputs(np.arange(start, min(start + _READ, n_images))))
        parts.append(local.reshape(len(local), -1, local.shape[-1]).mean(axis=1, dtype=np.float32))
    return np.concatenate(parts)


def train(key, base: SplitView, *, n_shot: int, n_query: int) -> np.ndarray:
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
    optimizer = optax.adam(learning_rate)
    layer = (jnp.zeros((n_features, n_labels)), jnp.zeros(n_labels))

    def step(state, epoch):
        layer, opt_state = state
        features, labels = batch_of(epoch)
        gradient = jax.grad(lambda wb: binary_cross_entropy(features @ wb[0] + wb[1], labels).mean())(layer)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(layer, updates), opt_state), None

    (layer, _), _ = jax.lax.scan(step, (layer, optimizer.init(layer)), jnp.arange(epochs))
    return layer


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
