"""Vision transformers with ImageNet weights: ViT-B/16 and ViT-B/32."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mlfsic_jax.system.errors import InputError

_EPSILON = 1e-6  # of all its layer norms


class Attention(nn.Module):
    """Multi-head self-attention whose queries, keys and values come from one matrix, packed as in PyTorch."""

    n_heads: int  # divides the channels
    causal: bool = False  # a token sees no later one

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [B, T, d] -> float32 [B, T, d]."""
        b, t, d = x.shape
        weight = self.param("in_proj_weight", nn.initializers.xavier_uniform(), (3 * d, d))
        bias = self.param("in_proj_bias", nn.initializers.zeros, (3 * d,))
        packed = (x @ weight.T + bias).reshape(b, t, 3, self.n_heads, d // self.n_heads)
        mixed = jax.nn.dot_product_attention(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2], is_causal=self.causal)
        return nn.Dense(d, name="out__proj")(mixed.reshape(b, t, d))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each normalised before and added to its input."""

    n_heads: int  # of the attention
    names: tuple[str, str, str]  # of the attention and of the two layers of the perceptron
    activation: Callable[[jax.Array], jax.Array]  # between those two
    epsilon: float  # of the layer norms
    causal: bool = False  # as in ``Attention``

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [B, T, d] -> float32 [B, T, d]."""
        d, (attention, wide, narrow) = x.shape[-1], self.names
        x = x + Attention(self.n_heads, self.causal, name=attention)(layer_norm("ln__1", self.epsilon)(x))
        hidden = self.activation(nn.Dense(4 * d, name=wide)(layer_norm("ln__2", self.epsilon)(x)))
        return x + nn.Dense(d, name=narrow)(hidden)


def layer_norm(name: str, epsilon: float) -> nn.LayerNorm:
    """Layer norm whose variance is computed in two passes, like PyTorch's: residual streams have large means."""
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name)


def prepend(token: jax.Array, x: jax.Array) -> jax.Array:
    """A class token [.., d] before the patches of every map [B, h, w, d]: [B, 1 + h * w, d]."""
    b, h, w, d = x.shape
    return jnp.concatenate([jnp.broadcast_to(token, (b, 1, d)), x.reshape(b, h * w, d)], axis=1)


class Encoder(nn.Module):
    """The transformer on tokens, with its position embedding and final layer norm."""

    n_layers: int
    n_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [B, T, d] -> float32 [B, T, d]."""
        x = x + self.param("pos_embedding", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        names = ("self__attention", "mlp_0", "mlp_3")
        gelu = functools.partial(nn.gelu, approximate=False)
        for layer in range(self.n_layers):
            x = Block(self.n_heads, names, gelu, _EPSILON, name=f"layers_encoder__layer__{layer}")(x)
        return layer_norm("ln", _EPSILON)(x)


class VisionTransformer(nn.Module):
    """ViT without its head (Dosovitskiy et al. 2021): the patch tokens are the map; the defaults make ViT-B/16.

    The class token takes part in the attention and is dropped at the end. Weights are named as in torchvision. Without
    batch norm, ``train`` has no effect.
    """

    patch: int = 16  # side of a patch in pixels
    image_size: int = 224  # side of the images in pixels, fixed by the position embedding
    n_layers: int = 12
    n_heads: int = 12
    width: int = 768
    all_tokens: bool = False  # give them as one row, the class token first: [B, 1, 1 + (S / patch)^2, width]

    patch_conv: ClassVar[dict[str, Any]] = {"name": "conv__proj"}  # of the convolution that embeds the patches
    head_prefixes: ClassVar[tuple[str, ...]] = ("heads.",)
    # torchvision's published files have its older names; it renames them while loading.
    former_names: ClassVar[dict[str, str]] = {".mlp.linear_1.": ".mlp.0.", ".mlp.linear_2.": ".mlp.3."}

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """float32 [B, S, S, 3] with S = image_size (else ``InputError``) -> [B, S / patch, S / patch, width]."""
        s, (_, height, width, _) = self.image_size, images.shape
        if (height, width) != (s, s):
            raise InputError(
                f"{type(self).__name__} takes images of {s}x{s} pixels, for which its position embedding was trained, "
                f"got {height}x{width}: set config.data.image_size = {s}"
            )
        x = nn.Conv(self.width, (self.patch,) * 2, self.patch, padding="VALID", **self.patch_conv)(images)
        tokens = self.encode(x)
        return tokens[:, None] if self.all_tokens else tokens[:, 1:].reshape(x.shape)

    def encode(self, x: jax.Array) -> jax.Array:
        """Embedded patches [B, h, w, d] -> tokens [B, 1 + h * w, d], the class token first."""
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        return Encoder(self.n_layers, self.n_heads, name="encoder")(prepend(token, x))
