"""CLIP (Radford et al. 2021): the image encoders ResNet-50 and ViT-B/32, and the text encoder that belongs to each.

The image encoders come without what pools and projects, see ``core.clip``. Weights are named as in OpenAI's code, where
the image encoder lies under ``visual``.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mlfsic_jax.backbones._layers import batch_norm, conv
from mlfsic_jax.backbones.resnet import ResNet, average
from mlfsic_jax.backbones.vit import Block, VisionTransformer, layer_norm, prepend

_EPSILON = 1e-5  # of all its layer norms
_HEAD = 64  # channels of one head of the text encoder
_BLOCK = ("attn", "mlp_c__fc", "mlp_c__proj")  # names of its layers
_NEITHER = ("logit_scale", "input_resolution", "context_length", "vocab_size")  # the last three are numbers
_TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", *_NEITHER)


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


class ClipVisionTransformer(VisionTransformer):
    """CLIP's ViT without the projection, all patch tokens kept; the defaults make ViT-B/32."""

    patch: int = 32

    patch_conv: ClassVar[dict[str, Any]] = {"name": "conv1", "use_bias": False}
    key_prefix: ClassVar[str] = "visual."
    head_prefixes: ClassVar[tuple[str, ...]] = ("visual.proj", *_TEXT)
    former_names: ClassVar[dict[str, str]] = {}

    def encode(self, x: jax.Array) -> jax.Array:
        """Embedded patches [B, h, w, d] -> tokens [B, 1 + h * w, d], the class token first."""
        normal = nn.initializers.normal(self.width**-0.5)
        x = prepend(self.param("class_embedding", normal, (self.width,)), x)
        x = layer_norm("ln__pre", _EPSILON)(x + self.param("positional_embedding", normal, x.shape[1:]))
        for layer in range(self.n_layers):
            x = Block(self.n_heads, _BLOCK, quick_gelu, _EPSILON, name=f"transformer_resblocks_{layer}")(x)
        return layer_norm("ln__post", _EPSILON)(x)


class ClipText(nn.Module):
    """CLIP's text encoder: the last layer at a text's end, projected to the space that it shares with images."""

    n_layers: int
    vocabulary: int
    context: int  # the most tokens of a text
    width: int  # of a token, a multiple of 64
    dimension: int  # of the shared space

    example: ClassVar[jax.ShapeDtypeStruct] = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    head_prefixes: ClassVar[tuple[str, ...]] = ("visual.", *_NEITHER)

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Token ids int32 [B, T <= context], of which the end's is the highest -> float32 [B, dimension], length 1."""
        normal = nn.initializers.normal(0.01)
        x = nn.Embed(self.vocabulary, self.width, name="token__embedding")(ids)
        x += self.param("positional_embedding", normal, (self.context, self.width))[: ids.shape[1]]
        for layer in range(self.n_layers):
            name = f"transformer_resblocks_{layer}"
            x = Block(max(1, self.width // _HEAD), _BLOCK, quick_gelu, _EPSILON, causal=True, name=name)(x)
        x = layer_norm("ln__final", _EPSILON)(x[jnp.arange(len(x)), ids.argmax(axis=1)])
        x = x @ self.param("text_projection", normal, (self.width, self.dimension))
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)
