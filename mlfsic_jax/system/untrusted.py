"""Reading untrusted files: limits on expansion, rules for names and paths, errors in one line."""

import codecs
import contextlib
import gzip
import json
import os
import pathlib
import re
import reprlib
import unicodedata
import zipfile
import zlib
from collections.abc import Container, Iterator
from typing import Any

import numpy as np

from mlfsic_jax.system.errors import InputError

MAX_EXPANSION = 100  # bytes in memory per byte of a compressed file; weights and word vectors need two or three
ALWAYS_ALLOWED = 1 << 24  # bytes in memory, however small the file
MAX_NAME = 200  # characters of a label
MAX_PATH = 1000  # characters
MAX_LINE = 1 << 20  # bytes of a line of word vectors: more than twenty thousand numbers

_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother, _SHOWN.maxlong = 2, 60, 60, 60
# Control characters and line separators would break one-line messages; lone surrogates cannot be printed.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# Without width and meaning: two names that differ in them look the same. Not the joiners of emoji and scripts.
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")


def reason(error: BaseException) -> str:
    """An error's message as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def reported(what: str, hint: str, kinds: Any = Exception) -> Iterator[None]:
    """Raises errors of these kinds (a type or a tuple of types) as ``InputError("<what> (<reason>): <hint>")``."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        raise InputError(f"{what} ({reason(error)}): {hint}") from error


def shown(value: Any) -> str:
    """A value's ``repr`` for a message, with long texts and long or deep lists cut."""
    return _SHOWN.repr(value)


def expand(path: str | os.PathLike[str]) -> pathlib.Path:
    """A path with ``~`` replaced by the home folder; ``~x`` is kept when there is no user x.

    ``InputError`` when this user has no home folder.
    """
    expanded = os.path.expanduser(path)
    if expanded.split("/")[0] == "~":
        raise InputError(f"{path}: this user has no home folder: write the path without ~, or set HOME")
    return pathlib.Path(expanded)


def byte_lines(path: pathlib.Path, hint: str = "get it again") -> Iterator[tuple[int, bytes]]:
    """Yields (number, line) of the lines that are not blank, without white space at their ends, unpacking ``.gz``.

    ``InputError``, with ``hint``, when the file cannot be read or has a line beyond a megabyte.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
                if len(line) > MAX_LINE:
                    raise InputError(f"{path}, line {number} has more than {MAX_LINE:,} bytes: {hint}")
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line := line.rstrip(b" \t\r\n"):
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        where = f" after line {number}" if number else ""
        raise InputError(f"{path} cannot be read{where} ({reason(error)}): {hint}") from error


def label_name(name: Any, where: str) -> str:
    """Strips a label, also of invisible characters, and composes it (NFC): é is one label however a file encodes it.

    ``InputError``, naming ``where`` (file and line), when it is not text, is empty, is longer than 200 characters, or
    contains control characters.
    """
    if not isinstance(name, str) or not (visible := _INVISIBLE.sub("", name).strip()):
        raise InputError(f"{where}: {shown(name)} is not a label name: give text")
    if len(name) > MAX_NAME:
        raise InputError(f"{where}: a label of {len(name)} characters, {shown(name)}: is a quote or a comma missing?")
    if _UNPRINTABLE.search(name):
        raise InputError(f"{where}: the label {shown(name)} contains a line break or control character: remove it")
    return unicodedata.normalize("NFC", visible)


def printable(text: str, where: str) -> str:
    """The text, stripped; ``InputError``, naming ``where``, when nothing is left or it has control characters."""
    if not text.strip() or _UNPRINTABLE.search(text):
        raise InputError(f"{where}: {shown(text)} is empty or contains a control character: write it without")
    return text.strip()


def photo_path(path: Any, where: str, folder: pathlib.Path, anywhere: bool = False) -> pathlib.PurePosixPath:
    """Checks the path of a photo, which must stay inside a folder, unless it may be ``anywhere``.

    ``InputError``, naming ``where`` (file and line), when it is not text, names no file, is absolute, is longer than
    1,000 characters, or contains ".." or control characters.
    """
    photo = pathlib.PurePosixPath(path if isinstance(path, str) else "")
    if not photo.name or (not anywhere and (photo.is_absolute() or ".." in photo.parts)):
        raise InputError(f"{where}: {shown(path)} must be the path of a photo inside {folder}")
    if len(path) > MAX_PATH:
        raise InputError(f"{where}: a photo's path of {len(path)} characters, {shown(path)}: is a quote missing?")
    if _UNPRINTABLE.search(path):
        raise InputError(f"{where}: {shown(path)} contains a character that cannot be printed: rename the photo")
    return photo


def read_json(path: pathlib.Path) -> Any:
    """Reads a JSON file.

    ``ValueError`` when it is not JSON in UTF-8, is nested too deeply, or repeats a key in one object.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise ValueError(f"it repeats the key {shown(twice)} in one object")
        return found

    try:
        return json.loads(path.read_bytes(), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_expansion(archive: zipfile.ZipFile, path: pathlib.Path) -> None:
    """``InputError`` for a decompression bomb, by the sizes its members declare; zipfile reads no more than those."""
    size, expanded = path.stat().st_size, sum(member.file_size for member in archive.infolist())
    if expanded > max(ALWAYS_ALLOWED, MAX_EXPANSION * size):
        raise InputError(
            f"{path} has {size:,} bytes and would expand to {expanded:,}: it is damaged or malicious: get it again"
        )


def read_npz(path: pathlib.Path, wanted: Container[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array) of an .npz file, all or those ``wanted``; pickled objects are refused.

    ``InputError`` for a single array or a decompression bomb; for a damaged file any error of zipfile, zlib or NumPy.
    """
    with open(path, "rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise InputError(f"{path} is a single array: save the arrays with numpy.savez(path, **arrays)")
        if not zipfile.is_zipfile(file):
            raise ValueError("it is not a zip archive, or its end is missing")
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            check_expansion(archive.zip, path)
            for name in archive.files:
                if wanted is None or name in wanted:
                    array = archive[name]
                    if not isinstance(array, np.ndarray):
                        raise ValueError(f"its member {shown(name)} is not an array")
                    yield name, array
