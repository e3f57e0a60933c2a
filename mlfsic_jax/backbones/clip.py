"""The image encoders of CLIP (Radford et al. 2021): a ResNet-50 and a ViT-B/32, without what pools or projects.

Weights are named as in OpenAI's code, where the image encoder lies under ``visual``.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mlfsic_jax.backbones._layers import batch_norm, conv
from mlfsic_jax.backbones.vit import Block, check_size, layer_norm

_EPSILON = 1e-5  # of all its layer norms
_EXPANSION = 4
# The text encoder, and three numbers that the published archives hold as tensors.
_TEXT = (
    *("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_scale"),
    *("input_resolution", "context_length", "vocab_size"),
)


def _average(x: jax.Array, side: int) -> jax.Array:
    return nn.avg_pool(x, (side, side), (side, side))


def quick_gelu(x: jax.Array) -> jax.Array:
    """GELU approximated by ``x * sigmoid(1.702 x)``."""
    return x * nn.sigmoid(1.702 * x)


class ClipBottleneck(nn.Module):
    """Bottleneck block in which an average pooling takes the place of every stride, against aliasing."""

    width: int  # channels of the first two convolutions; the block puts out ``4 * width``
    stride: int = 1  # side of the average pooling after the 3x3 convolution and in the shortcut
    axis_name: str | None = None  # see ``batch_norm``

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """float32 [B, h, w, c] -> float32 [B, h // stride, w // stride, 4 * width]."""
        n_out = _EXPANSION * self.width
        shortcut = x
        if self.stride != 1 or x.shape[-1] != n_out:
            shortcut = conv(n_out, 1, name="downsample_0")(_average(shortcut, self.stride))
            shortcut = batch_norm(train, "downsample_1", self.axis_name)(shortcut)
        x = nn.relu(batch_norm(train, "bn1", self.axis_name)(conv(self.width, 1, name="conv1")(x)))
        x = nn.relu(batch_norm(train, "bn2", self.axis_name)(conv(self.width, 3, name="conv2")(x)))
        x = conv(n_out, 1, name="conv3")(_average(x, self.stride))
        return nn.relu(batch_norm(train, "bn3", self.axis_name)(x) + shortcut)


class ClipResNet(nn.Module):
    """CLIP's ResNet without the attention pooling, all grid features kept; the defaults make RN50.

    It differs from ResNet by a stem of three convolutions and by average pooling in place of strides. 224x224 pixels
    give 7x7 locations.
    """

    # blocks per stage; every stage after the first halves the resolution and doubles the channels
    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64  # channels of the stem and of the first stage's 3x3 convolutions
    axis_name: str | None = None  # see ``create_backbone``

    key_prefix: ClassVar[str] = "visual."
    head_prefixes: ClassVar[tuple[str, ...]] = ("visual.attnpool.", *_TEXT)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """float32 [B, H, W, 3], normalised -> float32 [B, H // 32, W // 32, n]; n is 2048 by default.

        H and W should be multiples of 32: further rows and columns are lost.
        """
        x = images
        for layer, (features, stride) in enumerate(((self.width // 2, 2), (self.width // 2, 1), (self.width, 1)), 1):
            x = conv(features, 3, stride=stride, name=f"conv{layer}")(x)
            x = nn.relu(batch_norm(train, f"bn{layer}", self.axis_name)(x))
        x = _average(x, 2)
        for stage, n_blocks in enumerate(self.stage_sizes):
            for block in range(n_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"layer{stage + 1}_{block}"
                x = ClipBottleneck(self.width * 2**stage, stride, self.axis_name, name=name)(x, train)
        return x


class ClipVisionTransformer(nn.Module):
    """CLIP's ViT without the projection, all patch tokens kept; the defaults make ViT-B/32.

    Class token and attributes as in ``vit.VisionTransformer``. 224x224 pixels give 7x7 locations.
    """

    patch: int = 32
    image_size: int = 224
    n_layers: int = 12
    n_heads: int = 12
    width: int = 768

    key_prefix: ClassVar[str] = "visual."
    head_prefixes: ClassVar[tuple[str, ...]] = ("visual.proj", *_TEXT)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """float32 [B, S, S, 3], normalised -> float32 [B, S // patch, S // patch, width] for S = image_size.

        Raises:
          InputError: the images are of another size.
        """
        check_size(images, self.image_size, self)
        x = nn.Conv(self.width, (self.patch,) * 2, self.patch, padding="VALID", use_bias=False, name="conv1")(images)
        b, h, w, d = x.shape
        token = self.param("class_embedding", nn.initializers.normal(d**-0.5), (d,))
        x = jnp.concatenate([jnp.broadcast_to(token, (b, 1, d)), x.reshape(b, h * w, d)], axis=1)
        x = x + self.param("positional_embedding", nn.initializers.normal(d**-0.5), x.shape[1:])
        x = layer_norm("ln__pre", _EPSILON)(x)
        names = ("attn", "mlp_c__fc", "mlp_c__proj")
        for layer in range(self.n_layers):
            x = Block(self.n_heads, names, quick_gelu, _EPSILON, name=f"transformer_resblocks_{layer}")(x)
        return layer_norm("ln__post", _EPSILON)(x)[:, 1:].reshape(b, h, w, d)
