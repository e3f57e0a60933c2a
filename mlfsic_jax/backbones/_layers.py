"""The convolution and batch norm that every backbone is made of, with PyTorch's conventions."""

import jax
import jax.numpy as jnp
from flax import linen as nn

# As torchvision initialises both families: normal with variance 2 / (kernel area * output channels).
KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(features: int, kernel: int | tuple[int, int], *, stride: int = 1, pad: bool = True, name: str) -> nn.Module:
    """Convolution with ``kernel // 2`` pixels of padding on every side, or none where ``pad`` is False.

    Flax's ``SAME`` pads other sides of a strided convolution than PyTorch: imported weights would see shifted images.
    """
    if kernel == stride == 1:
        return PointwiseConv(features, name=name)
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    return nn.Conv(
        features,
        kernel,
        strides=(stride, stride),
        padding=tuple((side // 2, side // 2) for side in kernel) if pad else "VALID",
        use_bias=False,
        kernel_init=KERNEL_INIT,
        name=name,
    )


class PointwiseConv(nn.Module):
    """Convolution of every position by itself: a matrix product, which XLA does faster on CPUs when it is told so."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [B, H, W, C] -> float32 [B, H, W, features]."""
        return x @ self.param("kernel", KERNEL_INIT, (1, 1, x.shape[-1], self.features))[0, 0]


class DepthwiseConv(nn.Module):
    """Convolution of every channel by itself, padded like ``conv``.

    A sum of shifted products, which XLA fuses: on CPUs MobileNetV2 is five times as fast as with grouped convolutions.
    """

    kernel: int  # its side
    stride: int = 1  # of the positions

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [B, H, W, C] -> float32 [B, ceil(H / stride), ceil(W / stride), C]."""
        kernel = self.param("kernel", KERNEL_INIT, (self.kernel, self.kernel, 1, x.shape[-1]))
        weights = kernel.reshape(-1, x.shape[-1])
        return sum(x * w for x, w in zip(_windows(x, self.kernel, self.stride), weights, strict=True))


class StemConv(nn.Module):
    """The first convolution, of a photo's three channels, padded like ``conv``.

    On CPUs a sum of shifted products, which XLA fuses with the next layers: in half the time of its convolution.
    """

    features: int
    kernel: int  # its side
    stride: int  # of the positions

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [B, H, W, C] -> float32 [B, ceil(H / stride), ceil(W / stride), features]."""
        kernel = self.param("kernel", KERNEL_INIT, (self.kernel, self.kernel, x.shape[-1], self.features))

        def shifted(x, kernel):
            weights = kernel.reshape(-1, *kernel.shape[2:])  # [k * k, C, features]
            windows = zip(_windows(x, self.kernel, self.stride), weights, strict=True)
            return sum(x[..., c, None] * w[c] for x, w in windows for c in range(x.shape[-1]))

        def own(x, kernel):
            padding, dimensions = ((self.kernel // 2,) * 2,) * 2, ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(x, kernel, (self.stride,) * 2, padding, dimension_numbers=dimensions)

        return jax.lax.platform_dependent(x, kernel, cpu=shifted, default=own)


def _windows(x: jax.Array, k: int, stride: int) -> list[jax.Array]:
    """What every position of a kernel meets: [B, H, W, C] -> k * k of [B, ceil(H / stride), ceil(W / stride), C]."""
    _, h, w, _ = x.shape
    # The middle window is x itself: without a barrier XLA would fuse what x is made of a second time.
    x = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0))))
    return [x[:, i : i + h : stride, j : j + w : stride] for i in range(k) for j in range(k)]


def batch_norm(train: bool, name: str, axis_name: str | None = None, *, epsilon: float = 1e-5) -> nn.BatchNorm:
    """Batch norm with PyTorch's defaults: epsilon 1e-5, and 0.9 here is what PyTorch calls momentum 0.1.

    With ``train``, it uses the batch's own statistics, averaged over the mapped axis ``axis_name`` if one is given, and
    updates the running ones (collection ``batch_stats``). There PyTorch accumulates the unbiased batch variance, Flax
    the biased one, smaller by ``(N - 1) / N`` for N = batch * height * width.
    """
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=epsilon, axis_name=axis_name, name=name)
