"""Several backbones as one, for classifiers on pooled features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn


class Pooled(nn.Module):
    """The concatenated global features of several backbones, each the mean over the positions of its map.

    Weights come from one file for every part (see ``pretrained.load_weights``).

    Attributes:
      parts: the backbones; all see the same images.
    """

    parts: tuple[nn.Module, ...]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Compute global features as a map of one location.

        Args:
          images: float32 [B, H, W, 3], normalised, of a size that every part takes.
          train: passed to every part.

        Returns:
          float32 [B, 1, 1, n], n the sum of the parts' channels.
        """
        return jnp.concatenate([part(images, train).mean(axis=(1, 2), keepdims=True) for part in self.parts], axis=-1)
