"""EfficientNet-Lite0 to Lite4: EfficientNet without squeeze-and-excitation, for machines without an accelerator."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mlfsic_jax.backbones._layers import DepthwiseConv, StemConv, batch_norm, conv
from mlfsic_jax.backbones.mobilenet import _round_channels

# Table 1 of the paper: expansion, output channels, repeats, stride of the first repeat, side of the kernel.
_STAGES = (
    *((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3)),
    *((6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)),
)
_STEM = 32  # channels of the first convolution, whatever the width
_EPSILON = 1e-3  # of all its batch norms
# Names in the package efficientnet_lite_pytorch -> timm's: in a block without and with an expansion, and outside.
_FILTER = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPAND = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
}
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def _same(layer: nn.Module, x: jax.Array, stride: int) -> jax.Array:
    """Applies a convolution that pads like PyTorch as if it padded like TensorFlow's SAME.

    They differ for stride 2 and an even side, where TensorFlow's windows start one pixel later. So a pixel is put in
    front, and the first window dropped.
    """
    skip = [(side - 1) % stride for side in x.shape[1:3]]
    return layer(jnp.pad(x, ((0, 0), *((n, 0) for n in skip), (0, 0))))[:, skip[0] :, skip[1] :]


class Block(nn.Module):
    """Expand, filter each channel, project; a shortcut where the shapes agree (MBConv of the paper)."""

    features: int  # output channels
    expansion: int  # the depthwise convolution works on ``expansion`` times the input channels
    stride: int = 1  # 1 or 2, of the depthwise convolution
    kernel: int = 3  # side of the depthwise convolution
    axis_name: str | None = None  # as in ``batch_norm``

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """float32 [B, h, w, c] -> float32 [B, ceil(h / stride), ceil(w / stride), features]."""

        def norm(x: jax.Array, name: str) -> jax.Array:
            return batch_norm(train, name, self.axis_name, epsilon=_EPSILON)(x)

        shortcut, layer, last = x, 1, "conv__pw"
        if self.expansion != 1:
            x = nn.relu6(norm(conv(x.shape[-1] * self.expansion, 1, name="conv__pw")(x), "bn1"))
            layer, last = 2, "conv__pwl"
        x = _same(DepthwiseConv(self.kernel, self.stride, name="conv__dw"), x, self.stride)
        x = nn.relu6(norm(x, f"bn{layer}"))
        x = norm(conv(self.features, 1, name=last)(x), f"bn{layer + 1}")
        return x + shortcut if x.shape == shortcut.shape and self.stride == 1 else x


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite up to its last 1x1 convolution, without the pooled head; the defaults make Lite0.

    Scaled as in Tan and Le 2019, except that the stem and the last convolution keep their channels, and the first and
    the last stage their single block. 224x224 pixels give 7x7 locations. Weights are named as in timm.
    """

    width: float = 1.0  # multiplier of all channels but those of the stem and of the last convolution
    depth: float = 1.0  # multiplier of all repeats but the first and the last stage's
    # rows of (expansion, channels, repeats, stride of the first repeat, side of the kernel)
    stages: tuple[tuple[int, int, int, int, int], ...] = _STAGES
    last_features: int = 1280  # channels of the last 1x1 convolution
    axis_name: str | None = None  # as in ``create_backbone``

    head_prefixes: ClassVar[tuple[str, ...]] = ("classifier.",)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """float32 [B, H, W, 3], normalised -> float32 [B, ceil(H / 32), ceil(W / 32), n]; n is 1280 by default."""

        def norm(x: jax.Array, name: str) -> jax.Array:
            return nn.relu6(batch_norm(train, name, self.axis_name, epsilon=_EPSILON)(x))

        x = norm(_same(StemConv(_STEM, 3, 2, name="conv__stem"), images, 2), "bn1")
        for name, *sizes in self._blocks():
            x = Block(*sizes, self.axis_name, name=name)(x, train)
        return norm(conv(self.last_features, 1, name="conv__head")(x), "bn2")

    def _blocks(self) -> list[tuple[str, int, int, int, int]]:
        """Name, output channels, expansion, stride and kernel of every block."""
        blocks = []
        for stage, (expansion, channels, repeats, stride, kernel) in enumerate(self.stages):
            n_blocks = math.ceil(repeats * self.depth) if 0 < stage < len(self.stages) - 1 else repeats
            for block in range(n_blocks):
                name, features = f"blocks_{stage}_{block}", _round_channels(channels * self.width)
                blocks.append((name, features, expansion, stride if block == 0 else 1, kernel))
        return blocks

    @property
    def former_names(self) -> dict[str, str]:
        """Those of efficientnet_lite_pytorch, which counts blocks from the first stage to the last."""
        names = {}
        for number, (name, _, expansion, *_) in enumerate(self._blocks()):
            for old, new in (_EXPAND if expansion != 1 else _FILTER).items():
                names[f"_blocks.{number}.{old}."] = f"{name.replace('_', '.')}.{new}."
        return names | {f"{old}.": f"{new}." for old, new in _OUTSIDE.items()}
