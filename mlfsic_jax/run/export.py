"""A trained model as a folder that works on another machine, without the dataset; ``run.saved`` opens it."""

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from mlfsic_jax import __version__
from mlfsic_jax.data.words import EMBEDDINGS, text_lines
from mlfsic_jax.run.card import model_card
from mlfsic_jax.run.saved import (
    BACKBONE,
    CARD,
    FORMAT,
    MANIFEST,
    WORDS,
    Predictor,
    damaged,
    load,
    load_arrays,
    manifest_digest,
    model_file,
    word_width,
)
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import sha256, write_arrays, write_json, write_tree
from mlfsic_jax.system.untrusted import expand, read_npz

N_WORDS = 50_000


def export(workdir: str | os.PathLike[str], out: str | os.PathLike[str], n_words: int = N_WORDS) -> dict[str, Any]:
    """Writes a self-contained folder from a training run.

    Args:
      workdir: of the run.
      out: the folder; an earlier export there is replaced.
      n_words: word vectors to carry besides those of the dataset's labels: the first, most frequent words of the file.

    Returns:
      The content of ``model.json``.

    Raises:
      InputError: ``workdir`` is no finished run, or ``out`` cannot be written or holds something else.
    """
    out = expand(out)
    predictor = load(workdir)
    if "files" in predictor.manifest:
        raise InputError(f"{workdir} is an exported folder already: copy it as it is")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out={out} is a file: give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise InputError(f"--out={out} holds something that is no export: give a new or empty folder")
    words = _words(predictor, n_words)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
            manifest = _write_export(predictor, words, Path(folder))
            out.mkdir(exist_ok=True)
            for name in manifest["files"]:
                os.replace(Path(folder) / name, out / name)
            write_json(out / MANIFEST, manifest)  # last: a folder that was not finished is no model
    except OSError as error:
        raise InputError(f"--out={out} cannot be written: {error.strerror}") from error
    return manifest


def _write_export(predictor: Predictor, words: dict[str, np.ndarray], folder: Path) -> dict[str, Any]:
    """Writes all files but the manifest, which it returns."""
    config = ml_collections.ConfigDict(predictor.config)
    for field in ("workdir", "cache_dir", "data_dir", "backbone_weights"):  # paths of this machine
        config[field] = ""
    config.data.source = config.data.prepared_dir = config.data.split = config.labels.vectors = ""
    for trained in predictor.trained:
        write_tree(folder / model_file(trained.n_shot), trained.stores)
    if predictor.backbone_variables is not None:
        write_tree(folder / BACKBONE, predictor.backbone_variables)
    write_arrays(folder / WORDS, words)
    card = model_card(predictor.manifest, predictor.config, predictor.image_size, len(words))
    (folder / CARD).write_text(card, encoding="utf-8")
    files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "mlfsic_jax": __version__} | dict(predictor.manifest)
    manifest |= {"config": config.to_dict(), "card": card, "files": files}
    return manifest | {"sha256": manifest_digest(manifest)}


def _words(predictor: Predictor, n_words: int) -> dict[str, np.ndarray]:
    """Vectors by name: of the dataset's labels float32, of other words float16."""
    vectors = load_arrays(predictor.word_files[0])
    dimension = word_width(predictor.trained[0])
    embedding = EMBEDDINGS.get(predictor.config.labels.embedding)
    if embedding is None or not embedding.source:
        return vectors
    path = predictor.word_files[1]
    if not path.is_file():
        raise InputError(f"the word vectors {path} are missing: work in the folder where the model was trained")
    try:
        with np.errstate(over="ignore"):
            words = itertools.islice(_words_of(path, dimension, n_words), n_words)
            half = {word: np.asarray(vector, np.float16) for word, vector in words}
    except InputError:
        raise
    except Exception as error:  # gzip, zip, word2vec and text fail in many ways
        raise damaged(path, error) from error
    return {word: vector for word, vector in half.items() if np.isfinite(vector).all()} | vectors


def _words_of(path: Path, dimension: int, n_words: int) -> Iterator[tuple[str, np.ndarray]]:
    """The words of a file of word vectors in its order, see ``label_embeddings.load_word_vectors`` for the kinds."""
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".bin":
        from gensim.models import KeyedVectors

        vectors = KeyedVectors.load_word2vec_format(str(path), binary=True, limit=n_words, unicode_errors="replace")
        yield from ((word, vectors[word]) for word in vectors.index_to_key)
    elif kind in (".npz", ".safetensors"):
        yield from load_arrays(path).items() if kind == ".safetensors" else read_npz(path)
    else:
        for _, line in text_lines(path):
            word, *numbers = line.rsplit(" ", dimension)
            if len(numbers) == dimension:  # not so in the first line of some files
                yield word, np.array(numbers, np.float32)
