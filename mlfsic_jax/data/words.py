"""Label names to word vectors: from GloVe, fastText and word2vec files, and from text encoders.

python -m mlfsic_jax.label_embeddings --encoder=mirrorbert --labels=voc --out=data/voc-mirrorbert.npz

writes one vector per label. ``--labels`` is a benchmark, or a file with one line per label, ``name`` or
``name<TAB>display name``. An encoder in context also needs ``--sentences=FILE`` with lines ``label<TAB>sentence``.
``text_encoders.py`` says what each encoder does; ``--help`` lists the other flags. An encoder's published model is
downloaded from huggingface.co unless it is on this machine already; ``--model=FOLDER`` and ``--local_files_only``
download nothing.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import importlib
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from mlfsic_jax.data.encoders import ENCODERS, encode_labels, read_sentences
from mlfsic_jax.data.splits import label_split
from mlfsic_jax.system.command import Parser, cli_errors
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import MAX_LINE, expand, label_name, read_npz, reason, shown

_BETWEEN_WORDS = re.compile(r"[\s_,;/()]+")
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)
BENCHMARKS = ("voc", "coco", "nus_wide", "imaterialist")


class EmbeddingSpec(NamedTuple):
    """A word embedding that a config can name.

    Attributes:
      filename: its file in the data folder; ``{dataset}`` stands for the dataset's name.
      dimension: length of the vectors, or None if that depends on a model.
      source: where the file comes from, or "" if ``python -m mlfsic_jax.label_embeddings`` makes it.
      licence: of the vectors, or of the published model.
    """

    filename: str
    dimension: int | None
    source: str
    licence: str


_GLOVE = ("https://nlp.stanford.edu/data/glove.6B.zip", "Public Domain Dedication and License")
_LICENCES = {
    "mirrorbert": "MIT (code); no licence is stated for the model",
    "mirrorwic": "no licence is stated",
    "bert_biencoder": "Apache-2.0 (BERT); no licence is stated for the fine-tuned weights",
    "bert_avg": "Apache-2.0",
    "bert_concn": "of the model that you fine-tune; BERT is under Apache-2.0",
    "clip": "MIT (code); no licence is stated for the model",
}

EMBEDDINGS = {
    "glove": EmbeddingSpec("glove.6B.300d.txt", 300, *_GLOVE),
    "glove50": EmbeddingSpec("glove.6B.50d.txt", 50, *_GLOVE),
    "glove100": EmbeddingSpec("glove.6B.100d.txt", 100, *_GLOVE),
    "glove200": EmbeddingSpec("glove.6B.200d.txt", 200, *_GLOVE),
    "fasttext": EmbeddingSpec(
        "wiki-news-300d-1M.vec",
        300,
        "https://dl.fbaipublicfiles.com/fasttext/vectors-english/wiki-news-300d-1M.vec.zip",
        "CC BY-SA 3.0",
    ),
    "word2vec": EmbeddingSpec(
        "GoogleNews-vectors-negative300.bin",
        300,
        "https://code.google.com/archive/p/word2vec/",
        "Apache-2.0",
    ),
} | {
    name: EmbeddingSpec(f"{{dataset}}-{name}.npz", encoder.dimension, "", _LICENCES[name])
    for name, encoder in ENCODERS.items()
}


def default_path(embedding: str, dataset_name: str, folder: str | os.PathLike[str] = "data") -> pathlib.Path:
    """Where the vectors of an embedding are looked for unless a config says otherwise.

    Args:
      embedding: a name of ``EMBEDDINGS``.
      dataset_name: e.g. ``"voc"``; the files of text encoders are made for one dataset's labels.
      folder: where data files are kept.

    Returns:
      The path; whether there is a file is not looked at.

    Raises:
      InputError: no such embedding.
    """
    if embedding not in EMBEDDINGS:
        raise InputError(f"word embedding {embedding!r} is unknown: use one of {', '.join(EMBEDDINGS)}")
    return pathlib.Path(folder) / EMBEDDINGS[embedding].filename.format(dataset=dataset_name)


def how_to_get(embedding: str, dataset_name: str, folder: str | os.PathLike[str] = "data") -> str:
    """One line that says how to get the file of ``default_path``, for messages; arguments and errors as there."""
    path = default_path(embedding, dataset_name, folder)
    if EMBEDDINGS[embedding].source:
        return f"get {path.name} from {EMBEDDINGS[embedding].source}"
    encoder = ENCODERS[embedding]
    labels = dataset_name if dataset_name in BENCHMARKS else "FILE"
    command = f"python -m mlfsic_jax.label_embeddings --encoder={embedding} --labels={labels} --out={path}"
    if encoder.prompt is None:
        command += " --sentences=FILE"
    if encoder.model is None:
        command += " --model=NAME_OR_FOLDER"
    return f"make it with: {command}"


def load_word_vectors(
    path: str | os.PathLike[str], label_names: Sequence[str], display_names: Sequence[str]
) -> np.ndarray:
    """Looks up a vector for every label.

    A label takes its phrase's own entry if the file has one (``dining_table``, ``diningtable``, ``dining-table``,
    ``dining table``, or the label's name), else the mean of the vectors of its words, as published word vectors have no
    phrases. Each entry is looked up as written, then in lower case.

    Args:
      path: a text file with lines ``word v1 ... vd`` in UTF-8 (GloVe; a first line ``count d``, as word2vec and
        fastText ``.vec`` files have it, is skipped), word2vec's binary ``.bin`` (read by gensim, whole: GoogleNews
        needs 4 GB of memory), either with a further ``.gz``; or an ``.npz`` or ``.safetensors`` file with one vector
        [d] per word or phrase. Text is streamed and only the needed entries are kept. Of an entry that occurs twice the
        first counts. A word may contain spaces: the vector is the last d fields.
      label_names: C names as the dataset spells them, e.g. ``"diningtable"``.
      display_names: C names as people write them, e.g. ``"dining table"``.

    Returns:
      float32 [C, d].

    Raises:
      InputError: the file is missing, empty or malformed (the line is named), gensim is needed and not installed, or
        the file has no vector for some labels (all of them are listed with the words that are missing).
    """
    path = expand(path)
    names = list(zip(label_names, display_names, strict=True))
    phrases = [_phrase_entries(label, display) for label, display in names]
    words = [[word for word in _BETWEEN_WORDS.split(display) if word] for _, display in names]
    needed = {spelling for entries in (*phrases, *words) for entry in entries for spelling in (entry, entry.lower())}
    if not path.is_file():
        raise InputError(f"word vector file {path} does not exist: give a GloVe text file such as glove.6B.300d.txt")
    readers: dict[str, Callable[[pathlib.Path, set[str]], dict[str, np.ndarray]]] = {
        ".npz": _read_npz, ".safetensors": _read_safetensors, ".bin": _read_word2vec, ".zip": _refuse_zip,
    }  # fmt: skip
    entries = readers.get(pathlib.Path(path.name.removesuffix(".gz")).suffix, _read_text)(path, needed)

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
    for number, line in text_lines(path):
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
                    f"{path}, line {number}: the vector of {shown(word.split(' ')[0])} has more than "
                    f"the {dimension} numbers of the first one"
                )
        elif n_spaces < dimension:
            raise InputError(
                f"{path}, line {number}: {n_spaces} numbers after {shown(line.split(' ', 1)[0])}, "
                f"but the first vector has {dimension}; is the file complete?"
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


def text_lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers; GloVe's words may hold any white space but a line feed."""
    number = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
                if len(raw) > MAX_LINE:
                    raise InputError(f"{path}, line {number} has more than {MAX_LINE:,} bytes: it is no word's vector")
                line = raw.decode("utf-8").rstrip(" \t\r\n")
                if line:
                    yield number, line
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {number}: not UTF-8 text ({error.reason}); binary word vectors must be converted to text"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read after line {number}: {reason(error)}") from error


def _open(path: pathlib.Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _refuse_zip(path: pathlib.Path, needed: set[str]) -> dict[str, np.ndarray]:
    raise InputError(f"{path} is a zip archive: unpack it and give the text file inside")


def _read_word2vec(path: pathlib.Path, needed: set[str]) -> dict[str, np.ndarray]:
    try:
        from gensim.models import KeyedVectors
    except ImportError as error:
        raise InputError(
            f'{path} is a binary word2vec file, for which gensim is missing: pip install "mlfsic_jax[word2vec]"'
        ) from error
    try:
        vectors = KeyedVectors.load_word2vec_format(str(path), binary=True, unicode_errors="replace")
    except Exception as error:  # a file of another kind or cut short raises errors of gensim, NumPy and gzip
        raise InputError(
            f"{path} is not a readable word2vec .bin file: {reason(error)} (of fastText's files take the .vec one)"
        ) from error
    return _checked(path, {word: vectors[word] for word in needed if word in vectors.key_to_index})


def _read_npz(path: pathlib.Path, needed: set[str]) -> dict[str, np.ndarray]:
    try:
        entries = dict(read_npz(path, needed))
    except InputError:
        raise
    except Exception as error:  # a damaged archive raises zipfile's, zlib's and NumPy's errors
        raise InputError(f"{path} is not a readable .npz file: {reason(error)}") from error
    return _checked(path, entries)


def _read_safetensors(path: pathlib.Path, needed: set[str]) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as archive:
            entries = {name: archive.get_tensor(name) for name in needed.intersection(archive.keys())}
    except Exception as error:  # besides its own errors, KeyError and others for number types that NumPy lacks
        raise InputError(f"{path} is not a readable .safetensors file: {reason(error)}") from error
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


def read_labels(labels: str) -> tuple[list[str], list[str]]:
    """The labels that the command encodes.

    Args:
      labels: a UTF-8 text file with one label per line, ``name`` or ``name<TAB>display name`` (by default the name with
        spaces for underscores), or one of ``BENCHMARKS``.

    Returns:
      Label names as the dataset spells them, and as people write them.

    Raises:
      InputError: neither a file nor a benchmark; or a file that is empty, not UTF-8, or names a label twice.
    """
    path = expand(labels)
    if labels in BENCHMARKS:
        names = [name for split in label_split(labels).values() for name in split]
        display_names = importlib.import_module(f"mlfsic_jax.data.{labels}").DISPLAY_NAMES
        return names, [display_names.get(name, name.replace("_", " ")) for name in names]
    if not path.is_file():
        raise InputError(f"--labels={labels} is neither a file nor one of {', '.join(BENCHMARKS)}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--labels={labels} cannot be read as UTF-8 text: {reason(error)}") from error
    pairs = [[part.strip() for part in line.partition("\t")[::2]] for line in lines]
    names = [label_name(name, f"--labels={labels}") for name, _ in pairs]
    twice = sorted(name for name, n in collections.Counter(names).items() if n > 1)
    if twice or not names:
        raise InputError(f"--labels={labels} " + (f"names {twice[0]!r} twice" if twice else "is empty"))
    return names, [display or name.replace("_", " ") for name, display in pairs]


def write_vectors(path: str | os.PathLike[str], names: Sequence[str], vectors: np.ndarray) -> None:
    """Writes an ``.npz`` file that ``load_word_vectors`` reads: one array [d] under each of the names.

    Args:
      path: where to; a file there is replaced.
      names: C names.
      vectors: float [C, d].

    Raises:
      InputError: the file cannot be written.
    """
    path = expand(path)
    try:
        with zipfile.ZipFile(path, "w") as archive:  # not np.savez, which takes names as keywords of its own
            for name, vector in zip(names, vectors, strict=True):
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, vector)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    def whole(text: str) -> int:
        if not text.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
        return int(text)

    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
        return int(text)

    parser = Parser("mlfsic_jax.label_embeddings", __doc__)
    parser.add_argument("--encoder", required=True, choices=ENCODERS, metavar="ENCODER", help=", ".join(ENCODERS))
    parser.add_argument(
        "--labels", required=True, help="a benchmark such as voc, or a file: name or name<TAB>display name"
    )
    parser.add_argument("--out", required=True, help="the .npz file to write")
    parser.add_argument("--model", help="a model of huggingface.co, or a folder; default: the published one")
    parser.add_argument("--weights", help="a .pt file of the authors' code, for bert_biencoder and bert_concn")
    parser.add_argument("--sentences", help="a file: label<TAB>sentence; for mirrorwic, bert_avg and bert_concn")
    parser.add_argument("--max_sentences", type=positive, default=500, help="per label, drawn at random; default 500")
    parser.add_argument("--seed", type=whole, default=0, help="of the draw; default 0")
    parser.add_argument("--batch_size", type=positive, default=64, help="texts per step; default 64")
    parser.add_argument("--local_files_only", action="store_true", help="download nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: flags in, an ``.npz`` file out; a mistake ends in one line."""
    flags = _parser().parse_args(arguments)
    with cli_errors("nothing was written"):
        _encode_to_file(flags)


def _encode_to_file(flags: argparse.Namespace) -> None:
    spec = ENCODERS[flags.encoder]
    in_context = spec.prompt is None
    if not flags.out.endswith(".npz"):
        raise InputError(f"--out={flags.out} must end in .npz")
    if in_context != bool(flags.sentences):
        needs = "needs --sentences=FILE with lines label<TAB>sentence" if in_context else "takes no --sentences"
        raise InputError(f"encoder {flags.encoder} {needs}")
    if flags.weights and not spec.prefix:
        raise InputError(f"encoder {flags.encoder} takes no --weights: give the folder of a model as --model")
    names, displays = read_labels(flags.labels)
    taken = set(names)
    for name, display in zip(names, displays, strict=True):
        # load_word_vectors looks for the phrase before the name: that must not be another label's name.
        phrases = (spelling for entry in _phrase_entries(name, display) for spelling in (entry, entry.lower()))
        found = next(spelling for spelling in phrases if spelling in taken)
        if found != name:
            raise InputError(f"--labels={flags.labels}: {name!r} cannot be told from {found!r}, rename one of them")
    out = expand(flags.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder of --out={flags.out} cannot be made: {error.strerror}") from error
    mentions = None
    if in_context:
        kept = {"max_sentences": flags.max_sentences, "seed": flags.seed}
        mentions = read_sentences(flags.sentences, names, displays, **kept)
    vectors = encode_labels(
        flags.encoder,
        displays,
        model=flags.model,
        weights=flags.weights,
        mentions=mentions,
        batch_size=flags.batch_size,
        local_files_only=flags.local_files_only,
    )
    write_vectors(out, names, vectors)
    print(f"wrote {out}: {len(names)} labels, {vectors.shape[1]} numbers each, {flags.encoder}")
