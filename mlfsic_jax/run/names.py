"""What a method is told of label names: vectors of words, or mixtures of ImageNet's classes."""

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mlfsic_jax.data.words import load_word_vectors
from mlfsic_jax.methods import Method
from mlfsic_jax.run import inputs
from mlfsic_jax.run.saved import Predictor, Trained, word_width
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import label_name


def label_names_of(names: str | Iterable[str], where: str) -> list[str]:
    """One name or several, as ``label_name`` gives them."""
    if not isinstance(names, Iterable):  # as None and NaN, of an empty cell
        raise InputError(f"{where}: {names!r} is neither a label nor a list of labels: give [] for none")
    return [label_name(name, where) for name in ([names] if isinstance(names, str) else names)]


def words_of(
    predictor: Predictor,
    trained: Trained,
    method: Method,
    names: Sequence[str],
    has_photo: np.ndarray,
    *,
    vectors: str | os.PathLike[str] | None,
    wordings: Mapping[str, str | Sequence[str]] | None,
) -> tuple[np.ndarray | None, str]:
    """What ``Method.fit`` gets as words, None for nothing, and what a note about the fit has to add.

    ``has_photo``, bool [C], is of the labels; ``vectors`` and ``wordings`` are those of ``classifier.fit``,
    with its errors.
    """
    if not method.needs_words:
        return None, ""
    if not method.words_from:
        return _word_vectors(predictor, names, word_width(trained.stores), vectors), ""
    if wordings is not None and not isinstance(wordings, Mapping):
        raise InputError('wordings must be a dict from labels to wordings, such as {"dog": ["dog", "puppy"]}')
    given = {label_name(name, "wordings"): label_names_of(texts, name) for name, texts in (wordings or {}).items()}
    if unknown := [name for name in given if name not in names]:
        raise InputError(f"wordings has {unknown[0]!r}, which is not among the labels {', '.join(names)}")
    if empty := [name for name, texts in given.items() if not texts]:
        raise InputError(f"wordings has none for {empty[0]!r}: give one, or leave it out")
    each = [given.get(name) or [name.replace("_", " ")] for name in names]
    unread = np.array(inputs.unread(each, predictor.encoder))
    # By its name alone such a label would get the probabilities of any other one.
    for c in np.flatnonzero(unread & ~has_photo):
        how = f'give it photos, or an English wording: --labels="{names[c]} = cat", wordings={{"{names[c]}": "cat"}}'
        raise InputError(f"the text encoder cannot read the label {names[c]!r}: {how}")
    listed = ", ".join(names[c] for c in np.flatnonzero(unread))
    note = f"; the text encoder cannot read {listed}: English wordings would help" if listed else ""
    return inputs.class_mixtures(method.words_from, each, predictor.encoder), note


def _word_vectors(predictor: Predictor, names: Sequence[str], dimension: int, vectors) -> np.ndarray:
    """float32 [C, d_w]: of each label from the first file that has it."""
    files = [*([Path(vectors)] if vectors else []), *predictor.word_files]
    found: dict[str, np.ndarray] = {}

    def look_up(file, names):
        rows = load_word_vectors(file, names, [name.replace("_", " ") for name in names])
        return dict(zip(names, rows, strict=True))

    for file in files:
        missing = [name for name in names if name not in found]
        if not missing:
            break
        try:
            rows = look_up(file, missing)
        except InputError as error:
            hint = "name another with --vectors=FILE, rename the label, or use --method=ridge, which needs no words"
            if file == files[-1]:
                raise InputError(f"{error}; {hint}") from error
            rows = {}
            for name in missing:
                with contextlib.suppress(InputError):
                    rows |= look_up(file, [name])
            if vectors and file == files[0] and not rows:
                raise
        for row in rows.values():
            if len(row) != dimension:
                wrong = f"vectors of {len(row)} numbers, but the model was trained with {dimension}"
                raise InputError(f"{file} has {wrong}")
        found |= rows
    return np.stack([found[name] for name in names])
