"""Labels as the keywords of photos, which photo managers show and search: XMP dc:subject and IPTC Keywords.

Photos of kinds that libexiv2 does not write have their keywords beside them, in NAME.xmp, where digiKam and darktable
look for them.
"""

import contextlib
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import label_name, reported, shown

# What is written into the copy itself. Raw photos are TIFF inside, and risk more by it than a file beside them.
_EMBEDDED = ("image/jpeg", "image/png", "image/webp", "image/tiff")
_TIFF = (".tif", ".tiff")
_XMP, _IPTC, _CHARSET = "Xmp.dc.subject", "Iptc.Application2.Keywords", "Iptc.Envelope.CharacterSet"
_UTF8 = "\x1b%G"  # of ISO 2022, in IPTC's character set
_LONGEST = 64  # bytes of a keyword in IPTC, by its standard; XMP knows no limit
_ROOM = 1 << 14  # bytes that keywords may add to a photo
_ONE_AT_A_TIME = threading.Lock()  # libexiv2's XMP toolkit is not safe in several threads


def write(folder: Path, out: Path, photos: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """Copies photos of ``folder``, (name, labels), into ``out`` and adds the labels to their keywords there.

    Pixels and all other metadata stay as they are. Returns a line for each photo that cannot be copied, or is there
    already; the others go on, and none is there in part. ``InputError`` when ``out`` lies inside of ``folder``, cannot
    be written or has too little space, or when exiv2 is not installed.
    """
    exiv2, photos, skipped = _exiv2(), list(photos), []
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        raise InputError(f"{out} lies inside of {folder}: give a folder outside for the copies")
    with reported(f"{out} cannot be written", "give another folder for the copies", OSError):
        _check_space(folder, out, [name for name, _ in photos])
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".copying-", dir=out) as scratch:
            for name, labels in photos:
                try:
                    with reported(
                        f"{shown(name)} was not copied", "check it, the others go on", (OSError, exiv2.Exiv2Error)
                    ):
                        _copy(exiv2, folder / name, out / name, labels, Path(scratch))
                except InputError as error:
                    skipped.append(str(error))
    return skipped


def read(path: Path) -> tuple[str, ...]:
    """The keywords of a photo that can be labels: those beside it in NAME.xmp, and its XMP's or else IPTC's.

    Empty for a file without metadata. ``InputError`` when it cannot be read, or exiv2 is not installed.
    """
    exiv2, found = _exiv2(), []
    for file in filter(Path.is_file, (_beside(path), path)):
        with (
            reported(f"{path} cannot be read", "allow it, or move it away", OSError),
            open(file, "rb") as opened,
            contextlib.suppress(ValueError, exiv2.Exiv2Error),  # it is empty, or no photo
            _ONE_AT_A_TIME,
        ):
            found += _keywords(exiv2, _open(exiv2, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)))
    labels = []
    for keyword in found:
        with contextlib.suppress(InputError):
            labels.append(label_name(keyword, str(path)))
    return tuple(dict.fromkeys(labels))


def _exiv2() -> Any:
    try:
        import exiv2
    except ImportError as error:
        raise InputError('exiv2 is missing, which keywords need: pip install "mlfsic_jax[keywords]"') from error
    exiv2.LogMsg.setLevel(exiv2.LogMsg.Level.mute)  # what matters comes as an exception
    return exiv2


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.xmp")


def _check_space(folder: Path, out: Path, names: Sequence[str]) -> None:
    needed = len(names) * _ROOM
    for name in names:
        with contextlib.suppress(OSError):  # it gets its line when it is copied
            needed += (folder / name).stat().st_size
    free = shutil.disk_usage(next(place for place in (out, *out.absolute().parents) if place.exists())).free
    if needed > free:
        needs = f"{out} has {free >> 20:,} MiB free and the copies need {-(-needed >> 20):,}"
        raise InputError(f"{needs}: give another folder")


def _copy(exiv2: Any, photo: Path, target: Path, labels: Sequence[str], scratch: Path) -> None:
    """All that is to be written is in ``scratch`` before it moves to its place."""
    data = photo.read_bytes()
    with _ONE_AT_A_TIME:
        contents = _labelled(exiv2, photo, data, labels)
    files = {
        path: content for path, content in zip((_beside(target), target), contents, strict=True) if content is not None
    }
    for path in files:
        if os.path.lexists(path):
            raise InputError(f"{shown(path.name)} is there already: move it away, or give another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    for i, content in enumerate(files.values()):
        (scratch / str(i)).write_bytes(content)
    with contextlib.suppress(OSError):  # times and permissions, where the disk has them
        shutil.copystat(photo, scratch / str(len(files) - 1))
    for i, path in enumerate(files):
        os.rename(scratch / str(i), path)


def _labelled(exiv2: Any, photo: Path, data: bytes, labels: Sequence[str]) -> tuple[bytes | None, bytes]:
    """What to write beside the copy of a photo, None for nothing, and as the copy."""
    former = _beside(photo).read_bytes() if _beside(photo).is_file() else None
    if not labels:
        return former, data
    before = _keywords(exiv2, _open(exiv2, former)) if former else []
    with contextlib.suppress(exiv2.Exiv2Error):
        image = _open(exiv2, data)
        before += _keywords(exiv2, image)
        kind = image.mimeType()
        unread = image.xmpPacket() and image.xmpData().empty()  # broken XMP would be replaced
        if kind in _EMBEDDED and (kind != "image/tiff" or photo.suffix.lower() in _TIFF) and not unread:
            keywords = list(dict.fromkeys([*before, *labels]))
            _add_iptc(exiv2, image, keywords)
            if _holds(exiv2, written := _with_xmp(exiv2, image, keywords), labels):
                return None, written
    image = _open(exiv2, former) if former else exiv2.ImageFactory.create(exiv2.ImageType.xmp)
    written = _with_xmp(exiv2, image, list(dict.fromkeys([*before, *labels])))
    if not _holds(exiv2, written, labels):
        raise InputError(f"{shown(photo.name)}: XMP cannot hold the labels {shown(list(labels))}: rename them")
    return written, data


def _open(exiv2: Any, data: bytes | mmap.mmap) -> Any:
    """By content, not by path: a name need not be UTF-8, and libexiv2 takes some for addresses."""
    image = exiv2.ImageFactory.open(data)
    image.readMetadata()
    return image


def _keywords(exiv2: Any, image: Any) -> list[str]:
    return _subjects(exiv2, image) or [_text(datum.toString()) for datum in image.iptcData() if datum.key() == _IPTC]


def _subjects(exiv2: Any, image: Any) -> list[str]:
    xmp = image.xmpData()
    value = xmp[_XMP].value() if _XMP in xmp else None  # an array, unless its items have qualifiers
    return [keyword for keyword in value if keyword] if isinstance(value, exiv2.XmpArrayValue) else []


def _text(value: str) -> str:
    """A text of IPTC, in which bytes that are not UTF-8 are Latin-1 as a rule."""
    try:
        value.encode()
        return value
    except UnicodeEncodeError:
        return value.encode(errors="surrogateescape").decode("latin-1")


def _add_iptc(exiv2: Any, image: Any, keywords: Sequence[str]) -> None:
    """Adds those that IPTC lacks, if the file can have it and its texts are not in some other encoding."""
    iptc = image.iptcData()
    if image.checkMode(exiv2.MetadataId.Iptc) != exiv2.AccessMode.ReadWrite or not iptc.detectCharset():
        return
    iptc[_CHARSET] = _UTF8
    has = {datum.toString() for datum in iptc if datum.key() == _IPTC}
    for keyword in keywords:
        if keyword not in has and len(keyword.encode()) <= _LONGEST:
            datum = exiv2.Iptcdatum(exiv2.IptcKey(_IPTC))
            datum.setValue(keyword)
            iptc.add(datum)


def _with_xmp(exiv2: Any, image: Any, keywords: list[str]) -> bytes:
    """The content of the file when these are its keywords."""
    image.xmpData()[_XMP] = exiv2.XmpArrayValue(keywords, exiv2.TypeId.xmpBag)
    image.writeMetadata()
    return bytes(image.io().data())


def _holds(exiv2: Any, content: bytes, labels: Sequence[str]) -> bool:
    return set(labels) <= set(_subjects(exiv2, _open(exiv2, content)))
