"""Backbones: images in, a map of local features out. ``BACKBONES`` lists the names that a config may use.

To add one, write a Linen module ``(images [B, H, W, 3], train) -> [B, h, w, n]`` whose submodules are named after the
keys of the published weights (rule in ``weights.py``), and give it a row in ``BACKBONES``.
"""

import dataclasses
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

_RESNET50, _RESNET101 = ("resnet50-0676ba61", 103), ("resnet101-63fe2227", 179)
_VIT_B_16, _VIT_B_32 = ("vit_b_16-c867db91", 346), ("vit_b_32-d86f8d99", 353)
_CLIP_RN50 = ("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", "RN50.pt", 256)
_CLIP_VIT_B_32 = ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt", 354)
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """One file of published weights."""

    url: str  # ends in the file's name
    sha256: str  # hex digest, or its first eight digits, which are all that torchvision publishes
    megabytes: int = 0  # about, in 10^6 bytes; 0 if unknown


@dataclasses.dataclass(frozen=True)
class Spec:
    """A row of ``BACKBONES``."""

    create: Callable[..., nn.Module]  # axis_name -> Linen module
    mean: tuple[float, float, float]  # RGB, subtracted from pixels in [0, 1]
    std: tuple[float, float, float]  # RGB, divided by after that
    licence: str | None = None  # of the published weights, with their source
    image_size: int = 224  # side in pixels of the images that it was published for
    files: tuple[WeightsFile, ...] = ()  # published weights, one file per part; empty if it is trained from scratch

    @property
    def pretrained(self) -> str | None:
        """Source, licence and addresses of the published weights in a sentence; None without such weights."""
        return f"{self.licence}: {' and '.join(file.url for file in self.files)}" if self.files else None


def _torchvision(*files: tuple[str, int]) -> dict:
    """``Spec`` fields for files of torchvision, given as (name that ends in the digest's start, megabytes)."""
    of = "torchvision, BSD-3-Clause, trained on ImageNet-1k, whose images are for non-commercial research"
    url = "https://download.pytorch.org/models"
    return {"files": tuple(WeightsFile(f"{url}/{n}.pth", n.rpartition("-")[2], mb) for n, mb in files), "licence": of}


def _openai(sha256: str, name: str, megabytes: int) -> dict:
    """``Spec`` fields for weights of OpenAI's CLIP, whose addresses contain the digest."""
    file = WeightsFile(f"https://openaipublic.azureedge.net/clip/models/{sha256}/{name}", sha256, megabytes)
    return {"files": (file,), "licence": "OpenAI CLIP, MIT, whose model card calls any deployed use out of scope"}


def _resnet101(axis_name: str | None) -> ResNet:
    return ResNet((3, 4, 23, 3), axis_name=axis_name)


def _resnet50_vit_b_16(axis_name: str | None) -> Pooled:
    """One location for every image: for classifiers on global features only."""
    return Pooled((ResNet(axis_name=axis_name), VisionTransformer(patch=16)))


BACKBONES: dict[str, Spec] = {
    "conv4": Spec(Conv4, **_HALF),
    "resnet50": Spec(ResNet, **_IMAGENET, **_torchvision(_RESNET50)),
    "resnet101": Spec(_resnet101, **_IMAGENET, **_torchvision(_RESNET101)),
    "mobilenet_v2": Spec(MobileNetV2, **_IMAGENET, **_torchvision(("mobilenet_v2-b0353104", 14))),
    # These weights are a port of the authors' own, for pixels in [-1, 1]: torchvision calls that transform_input.
    "inception_v3": Spec(InceptionV3, **_HALF, image_size=299, **_torchvision(("inception_v3_google-0cc3c7bd", 109))),
    "vit_b_16": Spec(lambda axis_name: VisionTransformer(patch=16), **_IMAGENET, **_torchvision(_VIT_B_16)),
    "vit_b_32": Spec(lambda axis_name: VisionTransformer(patch=32), **_IMAGENET, **_torchvision(_VIT_B_32)),
    "clip_resnet50": Spec(ClipResNet, **_CLIP, **_openai(*_CLIP_RN50)),
    "clip_vit_b_32": Spec(lambda axis_name: ClipVisionTransformer(), **_CLIP, **_openai(*_CLIP_VIT_B_32)),
    "resnet50_vit_b_16": Spec(_resnet50_vit_b_16, **_IMAGENET, **_torchvision(_RESNET50, _VIT_B_16)),
}


def create_backbone(name: str, axis_name: str | None = None) -> nn.Module:
    """Makes one of ``BACKBONES``: Linen module (images float32 [B, H, W, 3], train: bool) -> float32 [B, h, w, n].

    In training, batch norm averages its batch statistics over ``axis_name``, a mapped axis of ``jax.shard_map``,
    ``pmap`` or ``vmap``; None keeps them per device. ``InputError`` for an unknown name lists the known ones.
    """
    return _spec(name).create(axis_name=axis_name)


def published_files(name: str) -> tuple[WeightsFile, ...]:
    """The published files of a backbone, as for ``weights.load_weights``; ``InputError`` for an unknown name."""
    return _spec(name).files


def how_to_get(name: str, folder: str = "data") -> str:
    """Says how to get a backbone's published weights into ``folder``, for error messages."""
    if not published_files(name):
        return f"{name} has no published weights: train it with mlfsic_jax.pretrain, or check the path"
    return f"get it with: python -m mlfsic_jax.fetch {name}" + ("" if folder == "data" else f" --data_dir={folder}")


def _spec(name: str) -> Spec:
    if name not in BACKBONES:
        raise InputError(f"no backbone {name!r}: choose one of {', '.join(sorted(BACKBONES))}")
    return BACKBONES[name]
