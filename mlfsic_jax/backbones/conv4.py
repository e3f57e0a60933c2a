"""Conv-4-64, the small backbone of the few-shot literature."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mlfsic_jax.backbones._layers import KERNEL_INIT, batch_norm

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
            x = _Conv(self.width, name=f"encoder_{block}_0")(x)
            x = _halve(nn.relu(batch_norm(train, f"encoder_{block}_1", self.axis_name)(x)))
        return x


class _Conv(nn.Module):
    """``convolve`` and a bias."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [B, H, W, C] -> float32 [B, H, W, features]."""
        x = convolve(x, self.param("kernel", KERNEL_INIT, (3, 3, x.shape[-1], self.features)))
        return x + self.param("bias", nn.initializers.zeros, (self.features,))


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3x3 convolution, padded by one: [B, H, W, C], [3, 3, C, D] -> [B, H, W, D].

    On CPUs its gradient to the kernel is a sum over images of matrix products, in a third of the time of XLA's own.
    """
    return _plain(x, kernel)


def _plain(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _forward(x, kernel):
    return _plain(x, kernel), (x, kernel)


def _backward(saved, dy):
    x, kernel = saved
    (to_x,) = jax.linear_transpose(lambda x: _plain(x, kernel), x)(dy)

    def own(x, dy):
        return jax.linear_transpose(lambda kernel: _plain(x, kernel), kernel)(dy)[0]

    return to_x, jax.lax.platform_dependent(x, dy, cpu=_by_image, default=own)


def _by_image(x, dy):
    """The gradient to the kernel: for each image its windows, [H * W, 9 C], times what arrives at them, [H * W, D]."""
    (_, h, w, c), d = x.shape, dy.shape[-1]

    def add(total, image):
        x, dy = jnp.pad(image[0], ((1, 1), (1, 1), (0, 0))), image[1]
        windows = jnp.concatenate([x[i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=-1)
        return total + dy.reshape(h * w, d).T @ windows.reshape(h * w, 9 * c), None

    total, _ = jax.lax.scan(add, jnp.zeros((d, 9 * c), x.dtype), (x, dy))
    return total.T.reshape(3, 3, c, d)


convolve.defvjp(_forward, _backward)


def _halve(x: jax.Array) -> jax.Array:
    """2x2 max pooling of [B, H, W, C], an odd last row or column dropped.

    Its gradient is much faster on CPUs than that of ``nn.max_pool``. Not ``x.max(axis)``, whose gradient compares x
    with its maximum: XLA may compute x a second time with other rounding, so that nothing is equal to it.
    """
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])
