"""Losses, unreduced: callers mask and sum."""

from __future__ import annotations

import jax


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-y log sigmoid(s) - (1 - y) log(1 - sigmoid(s)), elementwise and stable (eqs 3 and 18).

    Args:
      logits: float [...].
      labels: 0/1 or bool, broadcastable to ``logits``.

    Returns:
      float [...], the loss of each pair of image and label.
    """
    return jax.nn.softplus(logits) - labels * logits
