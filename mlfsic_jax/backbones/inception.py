"""Inception-v3, which the few-shot literature also calls GoogleNet-v3."""

import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mlfsic_jax.backbones._layers import batch_norm, conv
from mlfsic_jax.system.errors import InputError

_SMALLEST = 75  # pixels; below that nothing is left of the map
_EPSILON = 1e-3  # of all its batch norms


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    features: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1
    pad: bool = True  # keep the size of the map (at stride 1)
    axis_name: str | None = None  # as in ``batch_norm``

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """float32 [B, h, w, c] -> float32 [B, h', w', features]."""
        x = conv(self.features, self.kernel, stride=self.stride, pad=self.pad, name="conv")(x)
        return nn.relu(batch_norm(train, "bn", self.axis_name, epsilon=_EPSILON)(x))


class Mixed(nn.Module):
    """One Inception block: branches side by side, their channels concatenated."""

    # ``(chain, x) -> list of maps``, one of the functions below; ``chain(x, name, *layers)`` applies one ``Unit`` after
    # the other, with ``layers`` their (features, kernel, stride), and numbers their names
    branches: Callable[[Callable[..., jax.Array], jax.Array], list[jax.Array]]
    width: float = 1.0  # multiplier of all channels
    axis_name: str | None = None  # as in ``batch_norm``

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """float32 [B, h, w, c] -> float32 [B, h', w', c']."""

        def chain(x: jax.Array, name: str, *layers: tuple) -> jax.Array:
            for layer, (features, kernel, *stride) in enumerate(layers, 1):
                unit = (f"{name}_{layer}" if len(layers) > 1 else name).replace("_", "__")
                options = {"pad": not stride, "axis_name": self.axis_name, "name": unit}  # what halves is never padded
                x = Unit(round(features * self.width), kernel, *stride, **options)(x, train)
            return x

        return jnp.concatenate(self.branches(chain, x), axis=-1)


def _average(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), padding=((1, 1), (1, 1)))  # the zeros around the map count, as in PyTorch


def _halve(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2))


def _local(chain: Callable[..., jax.Array], x: jax.Array, pooled: int) -> list[jax.Array]:
    """Figure 5 of the paper."""
    return [
        chain(x, "branch1x1", (64, 1)),
        chain(x, "branch5x5", (48, 1), (64, 5)),
        chain(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3)),
        chain(_average(x), "branch_pool", (pooled, 1)),
    ]


def _local_halved(chain: Callable[..., jax.Array], x: jax.Array) -> list[jax.Array]:
    """Figure 10."""
    return [chain(x, "branch3x3", (384, 3, 2)), chain(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3, 2)), _halve(x)]


def _factorised(chain: Callable[..., jax.Array], x: jax.Array, n: int) -> list[jax.Array]:
    """Figure 6: 7x7 convolutions as 1x7 and 7x1."""
    row, column = (1, 7), (7, 1)
    return [
        chain(x, "branch1x1", (192, 1)),
        chain(x, "branch7x7", (n, 1), (n, row), (192, column)),
        chain(x, "branch7x7dbl", (n, 1), (n, column), (n, row), (n, column), (192, row)),
        chain(_average(x), "branch_pool", (192, 1)),
    ]


def _factorised_halved(chain: Callable[..., jax.Array], x: jax.Array) -> list[jax.Array]:
    return [
        chain(x, "branch3x3", (192, 1), (320, 3, 2)),
        chain(x, "branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)),
        _halve(x),
    ]


def _expanded(chain: Callable[..., jax.Array], x: jax.Array) -> list[jax.Array]:
    """Figure 7: branches that fork into 1x3 and 3x1."""
    row, column = (384, (1, 3)), (384, (3, 1))
    three = chain(x, "branch3x3_1", (384, 1))
    double = chain(x, "branch3x3dbl", (448, 1), (384, 3))
    return [
        chain(x, "branch1x1", (320, 1)),
        *(chain(three, "branch3x3_2a", row), chain(three, "branch3x3_2b", column)),
        *(chain(double, "branch3x3dbl_3a", row), chain(double, "branch3x3dbl_3b", column)),
        chain(_average(x), "branch_pool", (192, 1)),
    ]


_BLOCKS = {
    "5b": functools.partial(_local, pooled=32),
    "5c": functools.partial(_local, pooled=64),
    "5d": functools.partial(_local, pooled=64),
    "6a": _local_halved,
    "6b": functools.partial(_factorised, n=128),
    "6c": functools.partial(_factorised, n=160),
    "6d": functools.partial(_factorised, n=160),
    "6e": functools.partial(_factorised, n=192),
    "7a": _factorised_halved,
    "7b": _expanded,
    "7c": _expanded,
}


class InceptionV3(nn.Module):
    """Inception-v3 up to its last block, without the pooled head and the auxiliary one (Szegedy et al. 2016).

    299x299 pixels give 8x8 locations, 224x224 give 5x5. Weights are named as in torchvision.
    """

    width: float = 1.0  # multiplier of all channels; a multiple of 1/16 keeps them whole
    axis_name: str | None = None  # as in ``create_backbone``

    head_prefixes: ClassVar[tuple[str, ...]] = ("AuxLogits.", "fc.")

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """float32 [B, H, W, 3], normalised, at least 75x75 (else ``InputError``) -> [B, h, w, 2048 * width]."""
        if min(images.shape[1:3]) < _SMALLEST:
            raise InputError(
                f"InceptionV3 needs images of at least {_SMALLEST}x{_SMALLEST} pixels, got "
                f"{images.shape[1]}x{images.shape[2]}: set config.data.image_size to 299, its published size"
            )

        def unit(features: int, kernel: int, name: str, *, stride: int = 1, pad: bool = False) -> Unit:
            return Unit(round(features * self.width), kernel, stride, pad, self.axis_name, name=name.replace("_", "__"))

        x = unit(32, 3, "Conv2d_1a_3x3", stride=2)(images, train)
        x = unit(32, 3, "Conv2d_2a_3x3")(x, train)
        x = _halve(unit(64, 3, "Conv2d_2b_3x3", pad=True)(x, train))
        x = unit(80, 1, "Conv2d_3b_1x1")(x, train)
        x = _halve(unit(192, 3, "Conv2d_4a_3x3")(x, train))
        for name, branches in _BLOCKS.items():
            x = Mixed(branches, self.width, self.axis_name, name=f"Mixed__{name}")(x, train)
        return x
