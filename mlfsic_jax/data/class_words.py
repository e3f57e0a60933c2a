"""Labels as mixtures of ImageNet's 1,000 classes, by how near their texts are: for ``methods.class_words``.

``class_texts.json`` has WordNet's facts about the classes; ``class_vectors.safetensors`` all-MiniLM-L6-v2's vectors of
two kinds of text, "gloss" of "a photo of a LEMMA: GLOSS" and "photo", the mean over "a photo of a LEMMA"; and
``backbone_means.safetensors`` means over photos for each backbone that labels photos without a dataset.
"""

import functools
import hashlib
import importlib.resources
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.linalg
from safetensors.numpy import load

from mlfsic_jax.data.text import package_json
from mlfsic_jax.data.words import load_word_vectors
from mlfsic_jax.system.errors import InputError

N_SOURCES = 2  # kinds of text
PROMPT = "a photo of a {}"
WITHOUT = ("", "kinds", "names")  # classes to leave out: none; kinds of a label; and those with a label in their name
_SHARPNESS, _REGULARISER = 5.0, 0.1  # of the kernel regression


def class_names() -> tuple[str, ...]:
    """The first lemma of every class, in the order of the classifiers' outputs."""
    return tuple(entry["lemmas"][0] for entry in _texts()["classes"])


def prompts() -> tuple[list[str], list[list[str]]]:
    """The texts behind ``class_vectors``: with the gloss, one per class, and of every lemma."""
    classes = _texts()["classes"]
    with_gloss = [f"{PROMPT.format(entry['lemmas'][0])}: {entry['gloss']}" for entry in classes]
    return with_gloss, [[PROMPT.format(lemma) for lemma in entry["lemmas"]] for entry in classes]


def left_out(labels: Sequence[str], without: str) -> np.ndarray:
    """Which classes are left out for these labels: bool [K].

    "kinds" leaves out the classes that are, or are kinds of, something that WordNet calls by a label's name; "names"
    those as well that have a label in their own name: for honest numbers on labels that the classifier was trained on.
    """
    if without not in WITHOUT:
        raise ValueError(f"without = {without!r} is none of {WITHOUT}")
    texts, wanted = _texts(), {_plain(label) for label in labels}
    hypernyms = [wanted & {_plain(lemma) for lemma in lemmas} for lemmas in texts["hypernyms"]]
    named = re.compile(r"\b(" + "|".join(map(re.escape, sorted(wanted))) + r")\b")

    def leave(entry):
        own = [_plain(lemma) for lemma in entry["lemmas"]]
        kind = not wanted.isdisjoint(own) or any(hypernyms[i] for i in entry["hypernyms"])
        return kind or (without == "names" and any(map(named.search, own)))

    return np.array([bool(without) and leave(entry) for entry in texts["classes"]])


def made_up_word(name: str) -> str:
    """A word of four syllables that means nothing, such as "kuvoteri"; always the same for a name."""
    digits = hashlib.sha256(name.encode()).digest()
    return "".join("bdfgklmnprstvz"[a % 14] + "aeiou"[b % 5] for a, b in zip(digits[:4], digits[4:8], strict=True))


def mixtures(label_vectors: np.ndarray, leave: np.ndarray | None = None, classes: np.ndarray | None = None):
    """Kernel regression from the texts of classes to those of labels: float32 [C, s, K].

    a_s = k(w, E_s) (k(E_s, E_s) + 0.1 I)^-1 with k(u, v) = exp(5 (u.v - 1)); E_s are the vectors of the classes.

    Args:
      label_vectors: float [C, e], of length 1, by the encoder that made the vectors of the classes.
      leave: bool [K], classes that get nothing.
      classes: float [s, K, e], of length 1; by default those of all-MiniLM-L6-v2, two kinds of text.
    """
    classes, published = (class_vectors() if classes is None else classes), classes is None
    if label_vectors.shape[1] != classes.shape[2]:
        width = f"vectors of {label_vectors.shape[1]} numbers, but those of the classes have {classes.shape[2]}"
        raise InputError(f"the labels have {width}: use the same text encoder for both")
    keep = np.ones(classes.shape[1], bool) if leave is None else ~leave
    found = np.zeros((len(label_vectors), *classes.shape[:2]))
    for source, vectors in enumerate(classes):
        factor = _published_factor(source, keep.tobytes()) if published else _factor(vectors[keep])
        to_labels = _kernel(vectors[keep], label_vectors)
        found[:, source, keep] = scipy.linalg.cho_solve(factor, to_labels).T
    return found.astype(np.float32)


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.exp(_SHARPNESS * (a.astype(np.float64) @ b.astype(np.float64).T - 1))


def _factor(vectors: np.ndarray):
    return scipy.linalg.cho_factor(_kernel(vectors, vectors) + _REGULARISER * np.eye(len(vectors)))


@functools.lru_cache(maxsize=2 * N_SOURCES)
def _published_factor(source: int, keep: bytes):
    return _factor(class_vectors()[source][np.frombuffer(keep, bool)])


@functools.cache
def class_vectors() -> np.ndarray:
    """Vectors of the classes' texts, of length 1: float32 [2, K, 384]."""
    arrays = _arrays("class_vectors")
    vectors = np.stack([arrays["gloss"], arrays["photo"]]).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=2, keepdims=True)


@functools.lru_cache(maxsize=1)
def class_vectors_of_words(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Means over a class's lemmas, of length 1, from a file of word vectors: float32 [1, K, d], as ``class_vectors``.

    Also bool [K]: classes that have no lemma there, whose vectors are zero. ``InputError`` as of ``load_word_vectors``.
    """
    lemmas = [entry["lemmas"] for entry in _texts()["classes"]]
    flat = [lemma for names in lemmas for lemma in names]
    found = load_word_vectors(path, flat, flat, missing_as_nan=True)
    known = ~np.isnan(found[:, 0])
    if not known.any():
        raise InputError(f"{path} has no word of ImageNet's classes: use GloVe's file, or fetch minilm")
    starts = np.cumsum([0, *map(len, lemmas[:-1])])
    sums = np.add.reduceat(np.where(known[:, None], found, 0), starts)
    means = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return means[None], ~np.logical_or.reduceat(known, starts)


def backbone_means(backbone: str, image_size: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Means over photos of local features, float32 [n], and of the highest logits, [K]; None for other backbones."""
    arrays = _arrays("backbone_means")
    names = [f"{backbone}.{image_size}.{what}" for what in ("features", "logits")]
    return tuple(arrays[name].astype(np.float32) for name in names) if names[0] in arrays else None


@functools.cache
def _texts() -> dict:
    return package_json("class_texts.json")


@functools.cache
def _arrays(name: str) -> Mapping[str, np.ndarray]:
    return load(importlib.resources.files("mlfsic_jax.data").joinpath(f"{name}.safetensors").read_bytes())


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.casefold().strip()))
