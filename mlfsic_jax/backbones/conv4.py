"""Conv-4-64, the small backbone of the few-shot literature."""

from __future__ import annotations

from typing import ClassVar

import jax
from flax import linen as nn

from mlfsic_jax.backbones._layers import batch_norm, conv

_BLOCKS = 4


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, batch norm, ReLU and 2x2 max pooling (Vinyals et al. 2016; Snell et al. 2017).

    The map is 16 times smaller than the image: 64x64 gives 4x4, 84x84 gives 5x5, 224x224 gives 14x14. PyTorch names of
    the weights are those of Snell et al.'s code: ``encoder.<block>.0.weight``. In training, the running variance is
    accumulated from the biased batch variance (PyTorch: the unbiased one).

    Attributes:
      width: channels of every block.
      axis_name: mapped axis over which batch statistics are averaged in training; None: every device's own.
    """

    width: int = 64
    axis_name: str | None = None

    head_prefixes: ClassVar[tuple[str, ...]] = ()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Compute local features.

        Args:
          images: float32 [B, H, W, 3], normalised; H and W at least 16.
          train: use the batch's own statistics and update the running ones (collection ``batch_stats``).

        Returns:
          float32 [B, H // 16, W // 16, width].

        Raises:
          ValueError: the images are smaller than 16x16, so that no location would be left.
        """
        if min(images.shape[1:3]) < 2**_BLOCKS:
            raise ValueError(f"Conv4 needs images of at least 16x16 pixels, got {images.shape[1]}x{images.shape[2]}")
        x = images
        for block in range(_BLOCKS):
            # The bias does nothing before a batch norm, but published Conv-4 weights have it.
            x = conv(self.width, 3, use_bias=True, name=f"encoder_{block}_0")(x)
            x = nn.relu(batch_norm(train, f"encoder_{block}_1", self.axis_name)(x))
            x = _halve(x)
        return x


def _halve(x: jax.Array) -> jax.Array:
    """2x2 max pooling of [B, H, W, C], an odd last row or column dropped.

    As a maximum over reshaped axes, whose gradient XLA computes much faster on a CPU than that of ``nn.max_pool``.
    """
    b, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
