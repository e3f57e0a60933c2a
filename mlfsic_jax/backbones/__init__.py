"""Backbones: images in, a map of local features out. ``BACKBONES`` lists the names that a config may use.

To add one, write a Linen module ``(images [B, H, W, 3], train) -> [B, h, w, n]`` whose submodules are named after the
keys of the published weights (rule in ``weights.py``), and give it a row in ``BACKBONES``.
"""

import dataclasses
import functools
from collections.abc import Callable

from flax import linen as nn

from mlfsic_jax.backbones.clip import ClipResNet, ClipVisionTransformer
from mlfsic_jax.backbones.conv4 import Conv4
from mlfsic_jax.backbones.efficientnet_lite import EfficientNetLite
from mlfsic_jax.backbones.inception import InceptionV3
from mlfsic_jax.backbones.joined import Joined
from mlfsic_jax.backbones.mobilenet import MobileNetV2
from mlfsic_jax.backbones.resnet import ResNet
from mlfsic_jax.backbones.vit import VisionTransformer
from mlfsic_jax.system.errors import InputError

_RESNET50, _RESNET101 = ("resnet50-0676ba61", 103), ("resnet101-63fe2227", 179)
_VIT_16, _VIT_32 = ("vit_b_16-c867db91", 346), ("vit_b_32-d86f8d99", 353)
_INCEPTION = ("inception_v3_google-0cc3c7bd", 109)
_LITE0, _LITE2 = ("tf_efficientnet_lite0-0aa007d2", 19), ("tf_efficientnet_lite2-dcccb7df", 25)
_CLIP_RN50 = ("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", "RN50.pt", 256)
_CLIP_VIT_B_32 = ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt", 354)
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_LITE = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
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
    head: str | None = None  # key of the ImageNet classifier in these files, less ".weight"; None without one
    pooling: str | None = None  # start of the keys there of what leads to CLIP's texts, see ``weights.load_pooling``

    @property
    def pretrained(self) -> str | None:
        """Source, licence and addresses of the published weights in a sentence; None without such weights."""
        return f"{self.licence}: {' and '.join(file.url for file in self.files)}" if self.files else None


def _published(folder: str, of: str, head: str | None, *files: tuple[str, int]) -> dict:
    """``Spec`` fields for files under one address, given as (name that ends in the digest's start, megabytes)."""
    found = tuple(WeightsFile(f"{folder}/{n}.pth", n.rpartition("-")[2], mb) for n, mb in files)
    licence = f"{of}, trained on ImageNet-1k, whose images are for non-commercial research"
    return {"files": found, "licence": licence, "head": head}


_torchvision = functools.partial(_published, "https://download.pytorch.org/models", "torchvision, BSD-3-Clause")
_timm = functools.partial(
    _published,
    "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights",
    "timm, Apache-2.0",
    "classifier",
)


def _openai(sha256: str, name: str, megabytes: int) -> dict:
    """``Spec`` fields for weights of OpenAI's CLIP, whose addresses contain the digest."""
    file = WeightsFile(f"https://openaipublic.azureedge.net/clip/models/{sha256}/{name}", sha256, megabytes)
    return {"files": (file,), "licence": "OpenAI CLIP, MIT, whose model card calls any deployed use out of scope"}


def _resnet101(axis_name: str | None) -> ResNet:
    return ResNet((3, 4, 23, 3), axis_name=axis_name)


def _lite(width: float, depth: float, image_size: int, file: tuple[str, int]) -> Spec:
    """EfficientNet-Lite at the size of the authors' code, in which pixels enter as (pixel - 127) / 128."""
    return Spec(functools.partial(EfficientNetLite, width, depth), **_LITE, image_size=image_size, **_timm(file))


def _clip_tokens(axis_name: str | None) -> ClipVisionTransformer:
    """With the class token, which alone leads to CLIP's texts and cannot be had from the patch tokens."""
    return ClipVisionTransformer(all_tokens=True)


def _resnet50_vit_b_16(axis_name: str | None) -> Joined:
    """One location for every image: for classifiers on global features only."""
    return Joined((ResNet(axis_name=axis_name), VisionTransformer(patch=16)), pooled=True)


def _lite0_lite2(axis_name: str | None) -> Joined:
    return Joined((EfficientNetLite(axis_name=axis_name), EfficientNetLite(1.1, 1.2, axis_name=axis_name)))


BACKBONES: dict[str, Spec] = {
    "conv4": Spec(Conv4, **_HALF),
    "resnet50": Spec(ResNet, **_IMAGENET, **_torchvision("fc", _RESNET50)),
    "resnet101": Spec(_resnet101, **_IMAGENET, **_torchvision("fc", _RESNET101)),
    "mobilenet_v2": Spec(MobileNetV2, **_IMAGENET, **_torchvision("classifier.1", ("mobilenet_v2-b0353104", 14))),
    # These weights are a port of the authors' own, for pixels in [-1, 1]: torchvision calls that transform_input.
    "inception_v3": Spec(InceptionV3, **_HALF, image_size=299, **_torchvision("fc", _INCEPTION)),
    "vit_b_16": Spec(lambda axis_name: VisionTransformer(patch=16), **_IMAGENET, **_torchvision("heads.head", _VIT_16)),
    "vit_b_32": Spec(lambda axis_name: VisionTransformer(patch=32), **_IMAGENET, **_torchvision("heads.head", _VIT_32)),
    "clip_resnet50": Spec(ClipResNet, **_CLIP, **_openai(*_CLIP_RN50), pooling="visual.attnpool."),
    "clip_vit_b_32": Spec(lambda axis_name: ClipVisionTransformer(), **_CLIP, **_openai(*_CLIP_VIT_B_32)),
    "clip_vit_b_32_tokens": Spec(_clip_tokens, **_CLIP, **_openai(*_CLIP_VIT_B_32), pooling="visual."),
    "resnet50_vit_b_16": Spec(_resnet50_vit_b_16, **_IMAGENET, **_torchvision(None, _RESNET50, _VIT_16)),
    "efficientnet_lite0": _lite(1.0, 1.0, 224, _LITE0),
    "efficientnet_lite1": _lite(1.0, 1.1, 240, ("tf_efficientnet_lite1-bde8b488", 22)),
    "efficientnet_lite2": _lite(1.1, 1.2, 260, _LITE2),
    "efficientnet_lite3": _lite(1.2, 1.4, 280, ("tf_efficientnet_lite3-b733e338", 33)),
    "efficientnet_lite4": _lite(1.4, 1.8, 300, ("tf_efficientnet_lite4-741542c3", 53)),
    "efficientnet_lite0_lite2": Spec(_lite0_lite2, **_LITE, image_size=384, **_timm(_LITE0, _LITE2)),
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
