"""Files that may be fetched: Pascal VOC, COCO and GloVe (``assets.json``), and the published weights of backbones.

``mlfsic_jax.data.download`` fetches them; ``python -m mlfsic_jax.fetch --list`` prints the tables.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mlfsic_jax.data.text import package_json
from mlfsic_jax.system.errors import InputError


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


ASSETS = {
    name: tuple(
        Asset(**row | {"filename": row["url"].rsplit("/", 1)[1], "members": tuple(row["members"])}) for row in rows
    )
    for name, rows in package_json("assets.json").items()
    if name != "source"
}


def weights(url: str, sha256: str, licence: str = "", about: int = 0) -> Asset:
    """A file of published weights, stored under the last part of its address; fields as in ``Asset``."""
    return Asset(url=url, filename=url.rsplit("/", 1)[1], sha256=sha256, licence=licence, about=about)


def with_backbones(backbones: Mapping[str, Any]) -> dict[str, tuple[Asset, ...]]:
    """``ASSETS`` and the weights of all backbones (the table ``BACKBONES``) that have published files."""
    return ASSETS | {
        name: tuple(weights(file.url, file.sha256, spec.licence, file.megabytes * 10**6) for file in spec.files)
        for name, spec in backbones.items()
        if spec.files
    }


def find(names: Iterable[str], table: Mapping[str, tuple[Asset, ...]]) -> list[Asset]:
    """The files of the named rows of a table, each once; ``InputError`` for an unknown name lists the known ones."""
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
