"""Cosine similarity, the measure of the joint space, and the unreduced loss."""

import jax
import jax.numpy as jnp


def unit(x: jax.Array, axis: int = -1) -> jax.Array:
    """x / |x| along ``axis``; zero stays zero, with a finite gradient. Exact for |x| in 1e-12 .. 1e16 in float32."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=axis, keepdims=True), 1e-24))


def cosine_logits(x: jax.Array, prototypes: jax.Array, scale: float) -> jax.Array:
    """scale * cos(x_i, prototype_c) (eqs 4 and 19).

    Args:
      x: float [..., d], images.
      prototypes: float [C, d], one row per label: word embeddings (eq 4) or visual prototypes (eq 19).
      scale: the paper's lambda.

    Returns:
      float [..., C].
    """
    return scale * (unit(x) @ unit(prototypes).T)


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-y log sigmoid(s) - (1 - y) log(1 - sigmoid(s)), elementwise and stable (eqs 3 and 18).

    Args:
      logits: float [...].
      labels: 0/1 or bool, broadcastable to ``logits``.

    Returns:
      float [...], the loss of each pair of image and label.
    """
    return jax.nn.softplus(logits) - labels * logits
