"""MobileNetV2, the backbone for machines without an accelerator."""

from typing import ClassVar

import jax
from flax import linen as nn

from mlfsic_jax.backbones._layers import DepthwiseConv, StemConv, batch_norm, conv

# Table 2 of the paper: expansion, output channels, repeats, stride of the first repeat.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _round_channels(channels: float) -> int:
    """Nearest multiple of 8, never more than 10 % below (the rule of the authors' code)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _conv_bn_relu6(x: jax.Array, features: int, train: bool, name: str, axis_name: str | None) -> jax.Array:
    x = conv(features, 1, name=f"{name}_0")(x)
    return nn.relu6(batch_norm(train, f"{name}_1", axis_name)(x))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; a shortcut where the shapes agree (Sandler et al. 2018, section 3.3)."""

    features: int  # output channels
    expansion: int  # the depthwise convolution works on ``expansion`` times the input channels
    stride: int = 1  # of the depthwise convolution
    axis_name: str | None = None  # as in ``batch_norm``

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """float32 [B, h, w, c] -> float32 [B, ceil(h / stride), ceil(w / stride), features]."""
        shortcut, layer = x, 0
        if self.expansion != 1:
            x = _conv_bn_relu6(x, x.shape[-1] * self.expansion, train, "conv_0", self.axis_name)
            layer = 1
        x = DepthwiseConv(3, self.stride, name=f"conv_{layer}_0")(x)
        x = nn.relu6(batch_norm(train, f"conv_{layer}_1", self.axis_name)(x))
        x = conv(self.features, 1, name=f"conv_{layer + 1}")(x)
        x = batch_norm(train, f"conv_{layer + 2}", self.axis_name)(x)
        return x + shortcut if x.shape == shortcut.shape and self.stride == 1 else x


class MobileNetV2(nn.Module):
    """MobileNetV2 up to its last 1x1 convolution, without the pooled head (Sandler et al. 2018).

    224x224 pixels give 7x7 locations. Weights are named as in torchvision.
    """

    width: float = 1.0  # multiplier of all channels; like torchvision, it widens the last convolution only when above 1
    # rows of (expansion, channels, repeats, stride of the first repeat)
    stages: tuple[tuple[int, int, int, int], ...] = _STAGES
    last_features: int = 1280  # channels of the last 1x1 convolution at width 1
    axis_name: str | None = None  # as in ``create_backbone``

    head_prefixes: ClassVar[tuple[str, ...]] = ("classifier.",)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """float32 [B, H, W, 3], normalised -> float32 [B, ceil(H / 32), ceil(W / 32), n]; n is 1280 by default."""
        x = StemConv(_round_channels(32 * self.width), 3, 2, name="features_0_0")(images)
        x = nn.relu6(batch_norm(train, "features_0_1", self.axis_name)(x))
        layer = 1
        for expansion, channels, repeats, first_stride in self.stages:
            features = _round_channels(channels * self.width)
            for stride in (first_stride, *[1] * (repeats - 1)):
                x = InvertedResidual(features, expansion, stride, self.axis_name, name=f"features_{layer}")(x, train)
                layer += 1
        last_features = _round_channels(self.last_features * max(1.0, self.width))
        return _conv_bn_relu6(x, last_features, train, f"features_{layer}", self.axis_name)
