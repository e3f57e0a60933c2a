"""Backbones: images in, a map of local features out. The table below is the list of names a config may use.

To add one: write a Linen module ``(images [B, H, W, 3], train) -> [B, h, w, n]`` whose submodules are named after the
published weights' keys (see ``pretrained``), and give it a row in ``BACKBONES``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from flax import linen as nn

from mlfsic_jax.backbones.clip import ClipResNet, ClipVisionTransformer
from mlfsic_jax.backbones.conv4 import Conv4
from mlfsic_jax.backbones.inception import InceptionV3
from mlfsic_jax.backbones.mobilenet import MobileNetV2
from mlfsic_jax.backbones.pooled import Pooled
from mlfsic_jax.backbones.resnet import ResNet
from mlfsic_jax.backbones.vit import VisionTransformer
from mlfsic_jax.system.errors import InputError

__all__ = [
    "BACKBONES",
    "ClipResNet",
    "ClipVisionTransformer",
    "Conv4",
    "InceptionV3",
    "MobileNetV2",
    "Pooled",
    "ResNet",
    "Spec",
    "VisionTransformer",
    "WeightsFile",
    "create",
    "published_files",
]

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """One file of published weights.

    Attributes:
      url: where it is; the last part is the name to store it under.
      sha256: the digest of the file as hex, or its first eight digits, which are all that torchvision publishes (at
        the end of the file's name): a sound file's digest starts with this.
    """

    url: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the program needs to know of a backbone.

    Attributes:
      create: makes the Linen module; takes the keyword ``axis_name`` (see ``create`` below).
      mean: RGB mean to subtract from pixels in [0, 1].
      std: RGB standard deviation to divide by after that.
      pretrained: where published weights come from and under which licence; None when it is trained from scratch.
      image_size: side in pixels of the images that it was published for.
      files: the published weights, one file for every part of the backbone; none when it is trained from scratch.
    """

    create: Callable[..., nn.Module]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pretrained: str | None = None
    image_size: int = 224
    files: tuple[WeightsFile, ...] = ()


def _torchvision(*names: str) -> dict:
    """The fields of a ``Spec`` for weights of torchvision, whose names end in ``-<start of the sha256>.pth``."""
    files = tuple(
        WeightsFile(f"https://download.pytorch.org/models/{name}", name.removesuffix(".pth").rpartition("-")[2])
        for name in names
    )
    return {
        "files": files,
        "pretrained": f"torchvision, BSD-3-Clause: {' and '.join(file.url for file in files)}; "
        "trained on ImageNet-1k, whose images are for non-commercial research",
    }


def _openai(sha256: str, name: str) -> dict:
    """The fields of a ``Spec`` for weights of OpenAI's CLIP, whose addresses hold the sha256."""
    url = f"https://openaipublic.azureedge.net/clip/models/{sha256}/{name}"
    return {
        "files": (WeightsFile(url, sha256),),
        "pretrained": f"OpenAI CLIP, MIT: {url}; its model card calls any deployed use out of scope",
    }


BACKBONES: dict[str, Spec] = {
    "conv4": Spec(Conv4, **_HALF),
    "resnet50": Spec(ResNet, **_IMAGENET, **_torchvision("resnet50-0676ba61.pth")),
    "resnet101": Spec(
        functools.partial(ResNet, stage_sizes=(3, 4, 23, 3)), **_IMAGENET, **_torchvision("resnet101-63fe2227.pth")
    ),
    "mobilenet_v2": Spec(MobileNetV2, **_IMAGENET, **_torchvision("mobilenet_v2-b0353104.pth")),
    # These weights are a port of the authors' own, for pixels in [-1, 1]: torchvision calls that transform_input.
    "inception_v3": Spec(InceptionV3, **_HALF, image_size=299, **_torchvision("inception_v3_google-0cc3c7bd.pth")),
    "vit_b_16": Spec(
        lambda axis_name: VisionTransformer(patch=16), **_IMAGENET, **_torchvision("vit_b_16-c867db91.pth")
    ),
    "vit_b_32": Spec(
        lambda axis_name: VisionTransformer(patch=32), **_IMAGENET, **_torchvision("vit_b_32-d86f8d99.pth")
    ),
    "clip_resnet50": Spec(
        ClipResNet, **_CLIP, **_openai("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", "RN50.pt")
    ),
    "clip_vit_b_32": Spec(
        lambda axis_name: ClipVisionTransformer(),
        **_CLIP,
        **_openai("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    ),
    # One location for every image: for classifiers on global features only.
    "resnet50_vit_b_16": Spec(
        lambda axis_name: Pooled((ResNet(axis_name=axis_name), VisionTransformer(patch=16))),
        **_IMAGENET,
        **_torchvision("resnet50-0676ba61.pth", "vit_b_16-c867db91.pth"),
    ),
}


def create(name: str, axis_name: str | None = None) -> nn.Module:
    """Make a backbone by name.

    Args:
      name: a key of ``BACKBONES``.
      axis_name: where it is trained under ``jax.shard_map``, ``pmap`` or ``vmap``, the mapped axis over which batch
        norm averages its batch statistics; None keeps every device's own. Backbones without batch norm ignore it.

    Returns:
      Linen module ``(images: f32 [B, H, W, 3], train: bool) -> f32 [B, h, w, n]``.

    Raises:
      InputError: no backbone has that name; the message lists those there are.
    """
    return _spec(name).create(axis_name=axis_name)


def published_files(name: str) -> tuple[WeightsFile, ...]:
    """The files of published weights that ``pretrained.load_weights`` takes for a backbone, in its order.

    Args:
      name: a key of ``BACKBONES``.

    Returns:
      One file for every part of the backbone; none for one that is trained from scratch.

    Raises:
      InputError: no backbone has that name; the message lists those there are.
    """
    return _spec(name).files


def _spec(name: str) -> Spec:
    if name not in BACKBONES:
        raise InputError(f"no backbone {name!r}: choose one of {', '.join(sorted(BACKBONES))}")
    return BACKBONES[name]
