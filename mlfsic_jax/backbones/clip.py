"""The image encoders of CLIP (Radford et al. 2021): a ResNet-50 and a ViT-B/32, without what pools or projects.

Weights are named as in OpenAI's code, where the image encoder lies under ``visual``.
"""

from __future__ import annotations

from typing import ClassVar

import jax
from flax import linen as nn

from mlfsic_jax.backbones._layers import batch_norm, conv
from mlfsic_jax.backbones.resnet import ResNet, average
from mlfsic_jax.backbones.vit import Block, check_size, layer_norm, prepend

_EPSILON = 1e-5  # of all its layer norms
# The text encoder, and three numbers that the published archives hold as tensors.
_TEXT = (
    *("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_scale"),
    *("input_resolution", "context_length", "vocab_size"),
)


def quick_gelu(x: jax.Array) -> jax.Array:
    """GELU approximated by ``x * sigmoid(1.702 x)``."""
    return x * nn.sigmoid(1.702 * x)


class ClipResNet(ResNet):
    """CLIP's ResNet without the attention pooling, all grid features kept; the defaults make RN50.

    It differs from ResNet by a stem of three convolutions and by average pooling in place of strides. H and W should be
    multiples of 32: further rows and columns are lost.
    """

    key_prefix: ClassVar[str] = "visual."
    head_prefixes: ClassVar[tuple[str, ...]] = ("visual.attnpool.", *_TEXT)
    average: ClassVar[bool] = True

    def stem(self, images: jax.Array, train: bool) -> jax.Array:
        """float32 [B, H, W, 3] -> float32 [B, H // 4, W // 4, width]."""
        x = images
        for layer, (features, stride) in enumerate(((self.width // 2, 2), (self.width // 2, 1), (self.width, 1)), 1):
            x = conv(features, 3, stride=stride, name=f"conv{layer}")(x)
            x = nn.relu(batch_norm(train, f"bn{layer}", self.axis_name)(x))
        return average(x, 2)


class ClipVisionTransformer(nn.Module):
    """CLIP's ViT without the projection, all patch tokens kept; the defaults make ViT-B/32."""

    patch: int = 32
    image_size: int = 224
    n_layers: int = 12
    n_heads: int = 12
    width: int = 768

    key_prefix: ClassVar[str] = "visual."
    head_prefixes: ClassVar[tuple[str, ...]] = ("visual.proj", *_TEXT)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """float32 [B, S, S, 3] with S = image_size (else ``InputError``) -> [B, S / patch, S / patch, width]."""
        check_size(images, self.image_size, self)
        x = nn.Conv(self.width, (self.patch,) * 2, self.patch, padding="VALID", use_bias=False, name="conv1")(images)
        normal = nn.initializers.normal(self.width**-0.5)
        tokens = prepend(self.param("class_embedding", normal, (self.width,)), x)
        tokens = tokens + self.param("positional_embedding", normal, tokens.shape[1:])
        tokens = layer_norm("ln__pre", _EPSILON)(tokens)
        names = ("attn", "mlp_c__fc", "mlp_c__proj")
        for layer in range(self.n_layers):
            tokens = Block(self.n_heads, names, quick_gelu, _EPSILON, name=f"transformer_resblocks_{layer}")(tokens)
        return layer_norm("ln__post", _EPSILON)(tokens)[:, 1:].reshape(x.shape)
