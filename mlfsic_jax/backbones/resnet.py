"""ResNet with bottleneck blocks: ResNet-50 and its deeper siblings."""

from typing import ClassVar

import jax
from flax import linen as nn

from mlfsic_jax.backbones._layers import batch_norm, conv

_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a shortcut (He et al. 2016, fig. 5), the stride on the 3x3 as in torchvision."""

    width: int  # channels of the first two convolutions; the block puts out ``4 * width``
    stride: int = 1  # of the 3x3 convolution and the shortcut
    axis_name: str | None = None  # as in ``batch_norm``
    average: bool = False  # average pooling in place of the strides, against aliasing, as in CLIP

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """float32 [B, h, w, c] -> [B, ceil(h / stride), ceil(w / stride), 4 * width]; ``average`` rounds down."""
        n_out = _EXPANSION * self.width
        stride = 1 if self.average else self.stride
        shortcut = x
        if self.stride != 1 or x.shape[-1] != n_out:
            shortcut = average(x, self.stride) if self.average else x
            shortcut = conv(n_out, 1, stride=stride, name="downsample_0")(shortcut)
            shortcut = batch_norm(train, "downsample_1", self.axis_name)(shortcut)
        x = nn.relu(batch_norm(train, "bn1", self.axis_name)(conv(self.width, 1, name="conv1")(x)))
        x = nn.relu(batch_norm(train, "bn2", self.axis_name)(conv(self.width, 3, stride=stride, name="conv2")(x)))
        x = conv(n_out, 1, name="conv3")(average(x, self.stride) if self.average else x)
        return nn.relu(batch_norm(train, "bn3", self.axis_name)(x) + shortcut)


def average(x: jax.Array, side: int) -> jax.Array:
    """Mean over squares of this side."""
    return nn.avg_pool(x, (side, side), (side, side))


class ResNet(nn.Module):
    """ResNet of bottleneck blocks without the pooled head (He et al. 2016); the defaults make ResNet-50.

    ResNet-101 has ``stage_sizes=(3, 4, 23, 3)``, ResNet-152 ``(3, 8, 36, 3)``. 224x224 pixels give 7x7 locations.
    Weights are named as in torchvision.
    """

    # blocks per stage; every stage after the first halves the resolution and doubles the channels
    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64  # channels of the stem and of the first stage's 3x3 convolutions
    axis_name: str | None = None  # as in ``create_backbone``

    head_prefixes: ClassVar[tuple[str, ...]] = ("fc.",)
    average: ClassVar[bool] = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """float32 [B, H, W, 3], normalised -> float32 [B, ceil(H / 32), ceil(W / 32), n]; n is 2048 by default."""
        x = self.stem(images, train)
        for stage, n_blocks in enumerate(self.stage_sizes):
            for block in range(n_blocks):
                stride, name = 2 if stage > 0 and block == 0 else 1, f"layer{stage + 1}_{block}"
                x = Bottleneck(self.width * 2**stage, stride, self.axis_name, self.average, name=name)(x, train)
        return x

    def stem(self, images: jax.Array, train: bool) -> jax.Array:
        """float32 [B, H, W, 3] -> float32 [B, ceil(H / 4), ceil(W / 4), width]."""
        x = conv(self.width, 7, stride=2, name="conv1")(images)
        x = nn.relu(batch_norm(train, "bn1", self.axis_name)(x))
        return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
