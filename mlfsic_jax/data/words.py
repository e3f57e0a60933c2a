"""Word vectors of labels from GloVe, fastText and word2vec files and from archives of phrase vectors.

Text encoders make such archives: see ``encoders.py`` and ``python -m mlfsic_jax.label_embeddings``.
"""

import os
import pathlib
import re
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from mlfsic_jax.data.encoders import ENCODERS
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import atomic
from mlfsic_jax.system.untrusted import byte_lines, expand, read_npz, reported, shown

_BETWEEN_WORDS = re.compile(r"[\s_,;/()]+")
_NUMBER = re.compile(rb"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
BENCHMARKS = ("voc", "coco", "nus_wide", "imaterialist")


class EmbeddingSpec(NamedTuple):
    """A word embedding that a config can name."""

    filename: str  # in the data folder; ``{dataset}`` stands for the dataset's name
    dimension: int | None  # None if it depends on a model
    source: str  # address of the file; "" if ``python -m mlfsic_jax.label_embeddings`` makes it
    licence: str  # of the vectors, or of the published model


_GLOVE = ("https://nlp.stanford.edu/data/glove.6B.zip", "Public Domain Dedication and License")
_FASTTEXT = "https://dl.fbaipublicfiles.com/fasttext/vectors-english/wiki-news-300d-1M.vec.zip"
_WORD2VEC = "https://code.google.com/archive/p/word2vec/"
EMBEDDINGS = {
    "glove": EmbeddingSpec("glove.6B.300d.txt", 300, *_GLOVE),
    **{f"glove{d}": EmbeddingSpec(f"glove.6B.{d}d.txt", d, *_GLOVE) for d in (50, 100, 200)},
    "fasttext": EmbeddingSpec("wiki-news-300d-1M.vec", 300, _FASTTEXT, "CC BY-SA 3.0"),
    "word2vec": EmbeddingSpec("GoogleNews-vectors-negative300.bin", 300, _WORD2VEC, "Apache-2.0"),
    **{name: EmbeddingSpec(f"{{dataset}}-{name}.npz", e.dimension, "", e.licence) for name, e in ENCODERS.items()},
}


def default_path(embedding: str, dataset_name: str, folder: str | os.PathLike[str] = "data") -> pathlib.Path:
    """The file of an embedding, which need not exist; text encoders' belong to one dataset. InputError if unknown."""
    if embedding not in EMBEDDINGS:
        raise InputError(f"word embedding {embedding!r} is unknown: use one of {', '.join(EMBEDDINGS)}")
    return pathlib.Path(folder) / EMBEDDINGS[embedding].filename.format(dataset=dataset_name)


def how_to_get(embedding: str, dataset_name: str, folder: str | os.PathLike[str] = "data") -> str:
    """Says in one line how to get the file of ``default_path``, for error messages."""
    path, source = default_path(embedding, dataset_name, folder), EMBEDDINGS[embedding].source
    if embedding.startswith("glove"):
        to = "" if str(folder) == "data" else f" --data_dir={folder}"
        return f"get {path.name} with: python -m mlfsic_jax.fetch glove{to}"
    if source:
        return f"get {path.name} from {source}"
    encoder, labels = ENCODERS[embedding], dataset_name if dataset_name in BENCHMARKS else "FILE"
    command = f"python -m mlfsic_jax.label_embeddings --encoder={embedding} --labels={labels} --out={path}"
    more = " --sentences=FILE" * (encoder.prompt is None) + " --model=NAME_OR_FOLDER" * (encoder.model is None)
    return f"make it with: {command}{more}"


def load_word_vectors(
    path: str | os.PathLike[str],
    label_names: Sequence[str],
    display_names: Sequence[str],
    *,
    missing_as_nan: bool = False,
) -> np.ndarray:
    """Looks up a vector for every label: float32 [C, d].

    A label takes its phrase's own entry if there is one (``dining_table``, ``diningtable``, ``dining-table``, ``dining
    table``, or the label's name), else the mean of the vectors of its words. Each entry is tried as written, then in
    lower case. The first of repeated entries counts.

    Args:
      path: UTF-8 text with lines ``word v1 ... vd`` (GloVe; a first line ``count d`` as in fastText's files gives d; a
        word may contain spaces), or word2vec's ``.bin`` (read whole by gensim: GoogleNews takes 4 GB of memory), either
        with a further ``.gz``; or ``.npz`` or ``.safetensors`` with one vector [d] per word or phrase. Lines of other
        words than the labels' may hold anything.
      label_names: C names as the dataset spells them, e.g. "diningtable".
      display_names: C names as people write them, e.g. "dining table".
      missing_as_nan: labels without vector are no error: their rows are NaN.

    Raises:
      InputError: the file is missing, empty or malformed (naming the line), gensim is needed and missing, or some
        labels have no vector (naming all, with the missing words).
    """
    path = expand(path)
    names = list(zip(label_names, display_names, strict=True))
    phrases = [phrase_spellings(label, display) for label, display in names]
    words = [_words(display) for _, display in names]
    needed = {spelling for entries in (*phrases, *words) for entry in entries for spelling in (entry, entry.lower())}
    if not path.is_file():
        get = "give one such as glove.6B.300d.txt, which python -m mlfsic_jax.fetch glove downloads"
        raise InputError(f"word vector file {path} does not exist: {get}")
    entries = _read(path, needed)

    def look_up(entry: str) -> np.ndarray | None:
        return entries.get(entry, entries.get(entry.lower()))

    vectors, missing = [], []
    for (_, display), label_phrases, label_words in zip(names, phrases, words, strict=True):
        phrase = next((vector for entry in label_phrases if (vector := look_up(entry)) is not None), None)
        unknown = [word for word in label_words if look_up(word) is None]
        if phrase is not None:
            vectors.append(phrase)
        elif unknown or not label_words:
            missing.append(f"{display!r} (missing: {', '.join(unknown)})")
            vectors.append(None)
        else:
            vectors.append(np.mean([look_up(word) for word in label_words], axis=0))
    if missing and not missing_as_nan:
        found = f"{path} has no vector for {len(missing)} of the {len(names)} labels: {'; '.join(missing)}"
        raise InputError(f"{found}. Add these words to the file, or use a file with more words")
    none = np.full_like(next(iter(entries.values()), np.zeros(1)), np.nan)
    return np.stack([none if vector is None else vector for vector in vectors]).astype(np.float32)


def phrase_spellings(label: str, display: str) -> list[str]:
    """The entries that may hold a label's own vector, in the order in which they are tried."""
    words = _words(display)
    return ["_".join(words), "".join(words), "-".join(words), display, label]


def _words(display: str) -> list[str]:
    return [word for word in _BETWEEN_WORDS.split(display) if word]


def _read(path: pathlib.Path, needed: set[str]) -> dict[str, np.ndarray]:
    """The needed entries of a file of any kind."""
    kind = pathlib.Path(path.name.removesuffix(".gz")).suffix
    if kind == ".zip":
        raise InputError(f"{path} is a zip archive: unpack it and give the text file inside")
    if kind not in (".npz", ".safetensors", ".bin"):
        return _read_text(path, needed)
    hint = "get it again; fastText's .bin files have another format, take its .vec ones"
    with reported(f"{path} is not a readable {kind} file", hint if kind == ".bin" else "make it again"):
        if kind == ".npz":
            entries = dict(read_npz(path, needed))
        elif kind == ".bin":
            entries = _read_word2vec(path, needed)
        else:
            with safe_open(path, framework="numpy") as archive:
                entries = {name: archive.get_tensor(name) for name in needed.intersection(archive.keys())}
    shape = next(iter(entries.values())).shape if entries else ()
    for name, vector in entries.items():
        if vector.ndim != 1 or vector.shape != shape or vector.dtype.kind != "f" or not np.isfinite(vector).all():
            found = f"{path}: entry {name!r} is {vector.dtype} {list(vector.shape)}"
            raise InputError(f"{found}; expected one vector of finite numbers per name, all of one length")
    return entries


def _read_word2vec(path: pathlib.Path, needed: set[str]) -> dict[str, np.ndarray]:
    try:
        from gensim.models import KeyedVectors
    except ImportError as error:
        install = 'pip install "mlfsic_jax[word2vec]"'
        raise InputError(f"{path} is a binary word2vec file, for which gensim is missing: {install}") from error
    vectors = KeyedVectors.load_word2vec_format(str(path), binary=True, unicode_errors="replace")
    return {word: vectors[word] for word in needed if word in vectors.key_to_index}


def _read_text(path: pathlib.Path, needed: set[str]) -> dict[str, np.ndarray]:
    spelled = {entry.encode(errors="surrogatepass"): entry for entry in needed}  # other entries need not be UTF-8
    first_fields = {entry.split(b" ", 1)[0] for entry in spelled}
    entries: dict[str, np.ndarray] = {}
    dimension = 0

    def wrong(what: str) -> InputError:
        return InputError(f"{path}, line {number}: {what}")

    def check_length() -> None:
        n_numbers, first = line.count(b" "), line.split(b" ", 1)[0].decode(errors="replace")
        if n_numbers < dimension:
            raise wrong(f"{n_numbers} numbers after {shown(first)}, not {dimension} as before; is the file complete?")

    for number, line in byte_lines(path, "convert binary word vectors to text, and get a damaged file again"):
        if number == 1 and re.fullmatch(rb"\d+ \d{1,6}", line):
            dimension = int(line.split(b" ")[1])
            continue
        if dimension == 0:
            if b"\t" in line:
                raise wrong("a tab between the word and its vector: replace tabs by spaces in the file")
            dimension = line.count(b" ")
            if dimension == 0 or not _NUMBER.fullmatch(line.split(b" ", 2)[1]):
                raise wrong(f"expected a word and its vector, got {line[:40].decode(errors='replace')!r}")
        if line.split(b" ", 1)[0] not in first_fields:  # most lines end here
            continue
        check_length()
        entry, *fields = line.rsplit(b" ", dimension)
        word = spelled.get(entry)
        if word is not None and word not in entries:
            if not all(_NUMBER.fullmatch(field) for field in fields):
                raise wrong(f"the vector of {word!r} holds something that is no number")
            entries[word] = np.array([float(field) for field in fields])
            if not np.abs(entries[word]).max() <= np.finfo(np.float32).max:
                raise wrong(f"the vector of {word!r} holds a number beyond float32")
    if dimension == 0:
        raise InputError(f"word vector file {path} is empty")
    check_length()
    return entries


def write_vectors(path: str | os.PathLike[str], names: Sequence[str], vectors: np.ndarray) -> None:
    """Writes float [C, d] vectors of C names as ``.npz`` for ``load_word_vectors``; InputError if that fails."""
    path = expand(path)
    # Not np.savez, which takes names as keywords of its own.
    cannot = reported(f"{path} cannot be written", "choose another", OSError)
    with cannot, atomic(path) as part, zipfile.ZipFile(part, "w") as archive:
        for name, vector in zip(names, vectors, strict=True):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, vector)
