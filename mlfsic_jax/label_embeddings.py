"""Label names to word vectors, from GloVe files and the like."""

from __future__ import annotations

import gzip
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np

from mlfsic_jax.errors import InputError

_BETWEEN_WORDS = re.compile(r"[\s_,;/()]+")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


def load_word_vectors(
    path: str | os.PathLike[str], label_names: Sequence[str], display_names: Sequence[str]
) -> np.ndarray:
    """Looks up a vector for every label.

    A label takes its phrase's own entry if the file has one (``dining_table``, ``diningtable``, ``dining-table``,
    ``dining table``, or the label's name), else the mean of the vectors of its words, as published word vectors have no
    phrases. Each entry is looked up as written, then in lower case.

    Args:
      path: a text file with lines ``word v1 ... vd`` in UTF-8 (GloVe; a first line ``count d``, as word2vec and
        fastText write it, is skipped; ``.gz`` is read as it is), or an ``.npz`` or ``.safetensors`` file with one
        vector [d] per word or phrase. Text is streamed and only the needed entries are kept. Of an entry that occurs
        twice the first counts. A word may contain spaces: the vector is the last d fields.
      label_names: C names as the dataset spells them, e.g. ``"diningtable"``.
      display_names: C names as people write them, e.g. ``"dining table"``.

    Returns:
      float32 [C, d].

    Raises:
      InputError: the file is missing, empty or malformed (the line is named), or it has no vector for some labels (all
        of them are listed with the words that are missing).
    """
    path = pathlib.Path(path).expanduser()
    names = list(zip(label_names, display_names, strict=True))
    phrases = [_phrase_entries(label, display) for label, display in names]
    words = [[word for word in _BETWEEN_WORDS.split(display) if word] for _, display in names]
    needed = {spelling for entries in (*phrases, *words) for entry in entries for spelling in (entry, entry.lower())}
    if not path.is_file():
        raise InputError(f"word vector file {path} does not exist: give a GloVe text file such as glove.6B.300d.txt")
    readers: dict[str, Callable[[pathlib.Path, set[str]], dict[str, np.ndarray]]] = {
        ".npz": _read_npz, ".safetensors": _read_safetensors, ".zip": _refuse_zip,
    }  # fmt: skip
    entries = readers.get(path.suffix, _read_text)(path, needed)

    def look_up(entry: str) -> np.ndarray | None:
        return entries.get(entry, entries.get(entry.lower()))

    vectors, missing = [], []
    for (_, display), label_phrases, label_words in zip(names, phrases, words, strict=True):
        phrase_vectors = [vector for phrase in label_phrases if (vector := look_up(phrase)) is not None]
        word_vectors = [look_up(word) for word in label_words]
        unknown = [word for word, vector in zip(label_words, word_vectors, strict=True) if vector is None]
        if phrase_vectors:
            vectors.append(phrase_vectors[0])
        elif unknown or not label_words:
            missing.append(f"{display!r} (missing: {', '.join(unknown)})")
        else:
            vectors.append(np.mean(word_vectors, axis=0))
    if missing:
        raise InputError(
            f"{path} has no vector for {len(missing)} of the {len(names)} labels: {'; '.join(missing)}. "
            "Add these words to the file, or use a file with more words"
        )
    return np.stack(vectors).astype(np.float32)


def _phrase_entries(label: str, display: str) -> list[str]:
    words = [word for word in _BETWEEN_WORDS.split(display) if word]
    return ["_".join(words), "".join(words), "-".join(words), display, label]


def _read_text(path: pathlib.Path, needed: set[str]) -> dict[str, np.ndarray]:
    first_fields = {entry.split(" ", 1)[0] for entry in needed}
    entries: dict[str, np.ndarray] = {}
    dimension = 0
    for number, line in _lines(path):
        n_spaces = line.count(" ")
        if dimension == 0:
            if re.fullmatch(r"\d+ \d+", line, re.ASCII) and number == 1:
                continue
            dimension = n_spaces
            if dimension == 0 or not _NUMBER.fullmatch(line.split(" ", 2)[1]):
                raise InputError(f"{path}, line {number}: expected a word and its vector, got {line[:40]!r}")
        if n_spaces > dimension:
            word = line.rsplit(" ", dimension)[0]
            if _NUMBER.fullmatch(word.rsplit(" ", 1)[1]):
                raise InputError(
                    f"{path}, line {number}: the vector of {word.split(' ')[0]!r} has more than "
                    f"the {dimension} numbers of the first one"
                )
        elif n_spaces < dimension:
            raise InputError(
                f"{path}, line {number}: {n_spaces} numbers after {line.split(' ', 1)[0]!r}, but the first vector has "
                f"{dimension}; is the file complete?"
            )
        if line.split(" ", 1)[0] not in first_fields:  # most lines end here
            continue
        word, *fields = line.rsplit(" ", dimension)
        if word in needed and word not in entries:
            if not all(_NUMBER.fullmatch(field) for field in fields):
                raise InputError(f"{path}, line {number}: the vector of {word!r} holds something that is no number")
            entries[word] = np.array([float(field) for field in fields])
            if not np.abs(entries[word]).max() <= np.finfo(np.float32).max:
                raise InputError(f"{path}, line {number}: the vector of {word!r} holds a number beyond float32")
    if dimension == 0:
        raise InputError(f"word vector file {path} is empty")
    return entries


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers; GloVe's words may hold any white space but a line feed."""
    number = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8").rstrip(" \t\r\n")
                if line:
                    yield number, line
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {number}: not UTF-8 text ({error.reason}); binary word vectors must be converted to text"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read after line {number}: {error}") from error


def _open(path: pathlib.Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _refuse_zip(path: pathlib.Path, needed: set[str]) -> dict[str, np.ndarray]:
    raise InputError(f"{path} is a zip archive: unpack it and give the text file inside")


def _read_npz(path: pathlib.Path, needed: set[str]) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file, np.load(file) as archive:
            entries = {name: archive[name] for name in needed.intersection(archive.files)}
    except Exception as error:  # a damaged archive raises zipfile's, zlib's and NumPy's errors
        raise InputError(f"{path} is not a readable .npz file: {error}") from error
    return _checked(path, entries)


def _read_safetensors(path: pathlib.Path, needed: set[str]) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as archive:
            entries = {name: archive.get_tensor(name) for name in needed.intersection(archive.keys())}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable .safetensors file: {error}") from error
    return _checked(path, entries)


def _checked(path: pathlib.Path, entries: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    shape = next(iter(entries.values())).shape if entries else ()
    for name, vector in entries.items():
        if vector.ndim != 1 or vector.shape != shape or vector.dtype.kind != "f" or not np.isfinite(vector).all():
            raise InputError(
                f"{path}: entry {name!r} is {vector.dtype} {list(vector.shape)}; expected one vector of finite numbers "
                "per name, all of one length"
            )
    return entries
