"""Several backbones as one."""

import jax
import jax.numpy as jnp
from flax import linen as nn


class Joined(nn.Module):
    """The local features of several backbones side by side, or their global ones, means over locations."""

    parts: tuple[nn.Module, ...]  # the backbones, which see the same images and have one weights file each
    pooled: bool = False  # global features, where the parts' maps differ in size

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """float32 [B, H, W, 3], normalised -> [B, h, w, n], pooled [B, 1, 1, n]; n the sum of the parts' channels."""
        maps = [part(images, train) for part in self.parts]
        return jnp.concatenate([x.mean(axis=(1, 2), keepdims=True) if self.pooled else x for x in maps], axis=-1)
