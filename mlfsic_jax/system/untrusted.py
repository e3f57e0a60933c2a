"""Reading files that strangers wrote: how much they may expand to, what names may hold, and errors in one line."""

from __future__ import annotations

import json
import os
import pathlib
import re
import reprlib
import unicodedata
import zipfile
from collections.abc import Container, Iterator
from typing import Any

import numpy as np

from mlfsic_jax.system.errors import InputError

MAX_EXPANSION = 100  # bytes in memory for each byte of a compressed file; weights and word vectors need two or three
ALWAYS_ALLOWED = 1 << 24  # bytes in memory, however small the file
MAX_NAME = 200  # characters of a label
MAX_PATH = 1000  # characters
MAX_LINE = 1 << 20  # bytes of a line of word vectors: twenty thousand numbers and more

_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother, _SHOWN.maxlong = 2, 60, 60, 60
# Control characters and line separators would break our one-line messages; half of a character pair cannot be printed.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def reason(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def shown(value: Any) -> str:
    """A value as a message shows it: its ``repr``, of which long texts, long lists and deep ones are cut."""
    return _SHOWN.repr(value)


def expand(path: str | os.PathLike[str]) -> pathlib.Path:
    """A path with ``~`` replaced by the home folder; "~x" stays as it is if there is no user x."""
    return pathlib.Path(os.path.expanduser(path))


def label_name(name: Any, where: str) -> str:
    """A label without spaces around it, in Unicode's composed form (NFC): é is one label however the file writes it.

    Args:
      name: what stands in the place of a label.
      where: the file and line, for the message.

    Raises:
      InputError: it is no text, empty, longer than 200 characters, or has control characters in it.
    """
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{where}: {shown(name)} is no label name: give text")
    if len(name) > MAX_NAME:
        raise InputError(f"{where}: a label of {len(name)} characters, {shown(name)}: is a quote or a comma missing?")
    if _UNPRINTABLE.search(name):
        raise InputError(f"{where}: the label {shown(name)} has a line break or another control character in it")
    return unicodedata.normalize("NFC", name.strip())


def photo_path(path: Any, where: str, folder: pathlib.Path, anywhere: bool = False) -> pathlib.PurePosixPath:
    """The path of a photo as a file gives it, which must not lead out of the folder.

    Args:
      path: what stands in the place of a path.
      where: the file and line, for the message.
      folder: where relative paths start.
      anywhere: the photo may lie outside of the folder.

    Raises:
      InputError: it is no text, empty or no file name, absolute, longer than 1,000 characters, or has ".." or control
        characters in it.
    """
    photo = pathlib.PurePosixPath(path if isinstance(path, str) else "")
    if not photo.name or (not anywhere and (photo.is_absolute() or ".." in photo.parts)):
        raise InputError(f"{where}: {shown(path)} must be the path of a photo inside {folder}")
    if len(path) > MAX_PATH:
        raise InputError(f"{where}: a photo's path of {len(path)} characters, {shown(path)}: is a quote missing?")
    if _UNPRINTABLE.search(path):
        raise InputError(f"{where}: {shown(path)} has a character that cannot be printed: rename the photo")
    return photo


def read_json(path: pathlib.Path) -> Any:
    """The content of a JSON file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no JSON in UTF-8, is nested too deeply, or has a key twice in one object.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise ValueError(f"the key {shown(twice)} stands twice in one object")
        return found

    try:
        return json.loads(path.read_bytes(), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_expansion(archive: zipfile.ZipFile, path: pathlib.Path) -> None:
    """Refuses a zip file whose members say that they hold far more than the file; zipfile reads no more than they say.

    Raises:
      InputError: it is a decompression bomb.
    """
    size, expanded = path.stat().st_size, sum(member.file_size for member in archive.infolist())
    if expanded > max(ALWAYS_ALLOWED, MAX_EXPANSION * size):
        raise InputError(
            f"{path} has {size:,} bytes and would expand to {expanded:,}: it is damaged or means harm; get it again"
        )


def read_npz(path: pathlib.Path, wanted: Container[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of an .npz file one by one; pickled objects are refused.

    Args:
      path: the file.
      wanted: the names of the arrays that are read; None for all.

    Raises:
      InputError: it is a single array or a decompression bomb.
      Exception: zipfile, zlib and NumPy raise errors of all kinds for damaged files.
    """
    with open(path, "rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise InputError(f"{path} is a single array: save the arrays with numpy.savez(path, **arrays)")
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no zip archive, or its end is missing")
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            check_expansion(archive.zip, path)
            for name in archive.files:
                if wanted is None or name in wanted:
                    array = archive[name]
                    if not isinstance(array, np.ndarray):
                        raise ValueError(f"its member {shown(name)} is no array")
                    yield name, array
