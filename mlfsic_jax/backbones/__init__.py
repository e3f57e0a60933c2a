"""Backbones: images in, a map of local features out. The table below is the list of names a config may use.

To add one: write a Linen module ``(images [B, H, W, 3], train) -> [B, h, w, n]`` whose submodules are named after the
published weights' keys (see ``pretrained``), and give it a row in ``BACKBONES``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from flax import linen as nn

from mlfsic_jax.backbones.conv4 import Conv4
from mlfsic_jax.backbones.mobilenet import MobileNetV2
from mlfsic_jax.backbones.resnet import ResNet
from mlfsic_jax.errors import InputError

__all__ = ["BACKBONES", "Conv4", "MobileNetV2", "ResNet", "Spec", "create"]

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the program needs to know of a backbone.

    Attributes:
      create: makes the Linen module.
      mean: RGB mean to subtract from pixels in [0, 1].
      std: RGB standard deviation to divide by after that.
      pretrained: where published weights come from and under which licence; None when it is trained from scratch.
    """

    create: Callable[[], nn.Module]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pretrained: str | None = None


BACKBONES: dict[str, Spec] = {
    "conv4": Spec(Conv4, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "resnet50": Spec(
        ResNet,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        pretrained="torchvision, BSD-3-Clause: https://download.pytorch.org/models/resnet50-0676ba61.pth; "
        "trained on ImageNet-1k, whose images are for non-commercial research",
    ),
    "mobilenet_v2": Spec(
        MobileNetV2,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        pretrained="torchvision, BSD-3-Clause: https://download.pytorch.org/models/mobilenet_v2-b0353104.pth; "
        "trained on ImageNet-1k, whose images are for non-commercial research",
    ),
}


def create(name: str) -> nn.Module:
    """Make a backbone by name.

    Args:
      name: a key of ``BACKBONES``.

    Returns:
      Linen module ``(images: f32 [B, H, W, 3], train: bool) -> f32 [B, h, w, n]``.

    Raises:
      InputError: no backbone has that name; the message lists those there are.
    """
    if name not in BACKBONES:
        raise InputError(f"no backbone {name!r}: choose one of {', '.join(sorted(BACKBONES))}")
    return BACKBONES[name].create()
