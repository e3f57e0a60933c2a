"""The convolution and batch norm that every backbone is made of, with PyTorch's conventions."""

from flax import linen as nn

# As torchvision initialises both families: normal with variance 2 / (kernel area * output channels).
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(features: int, kernel: int, *, stride: int = 1, groups: int = 1, use_bias: bool = False, name: str) -> nn.Conv:
    """Convolution with ``kernel // 2`` pixels of padding on every side.

    Flax's ``SAME`` puts the padding of a strided convolution on other sides than PyTorch, so imported weights would see
    shifted images.
    """
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((kernel // 2, kernel // 2),) * 2,
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=_KERNEL_INIT,
        name=name,
    )


def batch_norm(train: bool, name: str) -> nn.BatchNorm:
    """Batch norm with PyTorch's defaults: epsilon 1e-5, and 0.9 here is what PyTorch calls momentum 0.1.

    One difference remains in training: PyTorch accumulates the unbiased batch variance in its running statistics, Flax
    the biased one, which is smaller by ``(N - 1) / N`` for N = batch * height * width values per channel.
    """
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)
