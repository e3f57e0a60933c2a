"""Tables of the files that may be fetched: Pascal VOC, COCO, GloVe, and the published weights of backbones.

``mlfsic_jax.data.download`` fetches them; ``python -m mlfsic_jax.fetch --list`` prints the tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mlfsic_jax.system.errors import InputError


class Asset(NamedTuple):
    """A published file."""

    url: str  # its address, http(s) or file
    filename: str  # its name in the data folder
    # hex digest or its first digits; None if none is published: the download then prints the digest found
    sha256: str | None = None
    size: int | None = None  # in bytes; None if no exact size is published
    # patterns of the archive members to unpack, as in ``download.unpack``; empty for a plain file.
    members: tuple[str, ...] = ()
    into: str = ""  # subfolder to unpack in
    unpacked: int = 0  # about how many bytes the members take
    licence: str = ""  # a few words, shown before a download
    about: int = 0  # about how many bytes, where ``size`` is None; 0 if unknown


_FLICKR = "photos from Flickr under their owners' terms"


def _voc(year: int, name: str, size: int, sha256: str) -> Asset:
    return Asset(
        url=f"http://host.robots.ox.ac.uk/pascal/VOC/voc{year}/{name}.tar",
        filename=f"{name}.tar",
        sha256=sha256,
        size=size,
        members=tuple(f"VOCdevkit/VOC{year}/{part}/*" for part in ("Annotations", "ImageSets/Main", "JPEGImages")),
        unpacked=size,
        licence=_FLICKR,
    )


def _coco(name: str, size: int, sha256: str) -> Asset:
    annotations = tuple(f"annotations/instances_{part}2014.json" for part in ("train", "val"))
    is_photos = not name.startswith("annotations")
    return Asset(
        url=f"http://images.cocodataset.org/{'zips' if is_photos else 'annotations'}/{name}.zip",
        filename=f"{name}.zip",
        sha256=sha256,
        size=size,
        members=(f"{name}/*",) if is_photos else annotations,
        into="coco",
        unpacked=size if is_photos else 500_000_000,
        licence=f"{_FLICKR}, annotations CC BY 4.0",
    )


# Digests and sizes of VOC and COCO are those in TensorFlow Datasets' url_checksums; GloVe's digest is GluonNLP's.
_VOC = (
    (2007, "VOCtrainval_06-Nov-2007", 460_032_000, "7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508"),
    (2007, "VOCtest_06-Nov-2007", 451_020_800, "6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892"),
    (2012, "VOCtrainval_11-May-2012", 1999639040, "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb"),
)
_COCO = (
    ("annotations_trainval2014", 252_872_794, "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009"),
    ("train2014", 13_510_573_713, "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775"),
    ("val2014", 6_645_013_297, "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0"),
)
_GLOVE = Asset(
    url="https://nlp.stanford.edu/data/glove.6B.zip",
    filename="glove.6B.zip",
    sha256="617afb2fe6cbd085c235baf7a465b96f4112bd7f7ccb2b2cbd649fed9cbcf2fb",
    size=862_182_613,
    members=tuple(f"glove.6B.{d}d.txt" for d in (50, 100, 200, 300)),
    unpacked=2_250_000_000,
    licence="Public Domain Dedication and License 1.0",
)
ASSETS: dict[str, tuple[Asset, ...]] = {
    "voc": tuple(_voc(*row) for row in _VOC),
    "coco": tuple(_coco(*row) for row in _COCO),
    "glove": (_GLOVE,),
}


def weights(url: str, sha256: str, licence: str = "", about: int = 0) -> Asset:
    """A file of published weights, stored under the last part of its address; fields as in ``Asset``."""
    return Asset(url=url, filename=url.rsplit("/", 1)[1], sha256=sha256, licence=licence, about=about)


def with_backbones(backbones: Mapping[str, Any]) -> dict[str, tuple[Asset, ...]]:
    """``ASSETS`` and the weights of all backbones that have published files.

    Args:
      backbones: the table ``BACKBONES``: name -> row with ``files`` (url, sha256, megabytes) and ``licence``.
    """
    return ASSETS | {
        name: tuple(weights(file.url, file.sha256, spec.licence, file.megabytes * 10**6) for file in spec.files)
        for name, spec in backbones.items()
        if spec.files
    }


def find(names: Iterable[str], table: Mapping[str, tuple[Asset, ...]]) -> list[Asset]:
    """The files of the named rows of a table, each once.

    Raises:
      InputError: unknown name; the message lists the known ones.
    """
    unknown = [name for name in names if name not in table]
    if unknown:
        raise InputError(f"nothing to fetch is called {unknown[0]!r}: use one of {', '.join(table)}")
    return list(dict.fromkeys(asset for name in names for asset in table[name]))


def describe(name: str, assets: Iterable[Asset]) -> str:
    """A row of a table as text: name, size and licence, then one address per line."""
    sizes, unpacked = [asset.size or asset.about for asset in assets], sum(asset.unpacked for asset in assets)
    size = f"{_readable(sum(sizes))} to download" if all(sizes) else "of unknown size"
    if unpacked:
        size += f", {_readable(unpacked)} unpacked"
    licences = dict.fromkeys(asset.licence for asset in assets if asset.licence)
    return "\n  ".join([f"{name}: {size}; {'; '.join(licences)}".rstrip("; "), *(asset.url for asset in assets)])


def _readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
