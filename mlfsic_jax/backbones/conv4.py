"""Conv-4-64, the small backbone of the few-shot literature."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mlfsic_jax.backbones._layers import batch_norm, conv

_BLOCKS = 4


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, batch norm, ReLU and 2x2 max pooling (Vinyals et al. 2016; Snell et al. 2017).

    64x64 pixels give 4x4 locations, 84x84 give 5x5, 224x224 give 14x14. Weights are named as in Snell et al.'s code:
    ``encoder.<block>.0.weight``.
    """

    width: int = 64  # channels of every block
    axis_name: str | None = None  # as in ``create_backbone``

    head_prefixes: ClassVar[tuple[str, ...]] = ()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """float32 [B, H, W, 3], normalised, at least 16x16 (else ``ValueError``) -> [B, H // 16, W // 16, width]."""
        if min(images.shape[1:3]) < 2**_BLOCKS:
            raise ValueError(f"Conv4 needs images of at least 16x16 pixels, got {images.shape[1]}x{images.shape[2]}")
        x = images
        for block in range(_BLOCKS):
            # The bias does nothing before a batch norm, but published Conv-4 weights have it.
            x = conv(self.width, 3, use_bias=True, name=f"encoder_{block}_0")(x)
            x = _halve(nn.relu(batch_norm(train, f"encoder_{block}_1", self.axis_name)(x)))
        return x


def _halve(x: jax.Array) -> jax.Array:
    """2x2 max pooling of [B, H, W, C], an odd last row or column dropped.

    Its gradient is much faster on CPUs than that of ``nn.max_pool``. Not ``x.max(axis)``, whose gradient compares x
    with its maximum: XLA may compute x a second time with other rounding, so that nothing is equal to it.
    """
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])
