"""Several backbones as one, for classifiers on pooled features."""

import jax
import jax.numpy as jnp
from flax import linen as nn


class Pooled(nn.Module):
    """The concatenated global features of several backbones, each the mean over the locations of its map."""

    parts: tuple[nn.Module, ...]  # the backbones, which see the same images and have one weights file each

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """float32 [B, H, W, 3], normalised -> float32 [B, 1, 1, n], n the sum of the parts' channels."""
        return jnp.concatenate([part(images, train).mean(axis=(1, 2), keepdims=True) for part in self.parts], axis=-1)
