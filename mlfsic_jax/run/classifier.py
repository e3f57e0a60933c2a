"""Labels photos from 1 to 5 examples of each label: python -m mlfsic_jax.predict --workdir=RUN --support=FILE ...

The labels are the user's own; the model need not have seen them. As functions:

    from mlfsic_jax.run import classifier as predict

    model = predict.load("runs/voc_cpu")  # a training run, or a folder of mlfsic_jax.export
    few = predict.fit(model, ["a.jpg", "b.jpg", "c.jpg"], [["sofa"], ["sofa", "cat"], ["bird"]])
    print(few.note)
    found = predict.predict(few, ["d.jpg"])  # found.probabilities, found.label_names, found.labels

The command ends with status 0 when every photo was predicted; 1 after a user's mistake, nothing is written then; 3 when
some photos could not be read: each has a line on standard error, the others stand in the written file.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import glob
import io
import itertools
import logging
import os
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from mlfsic_jax.core import word_ridge
from mlfsic_jax.core.functional import cosine_logits, unit
from mlfsic_jax.core.lcm import select_positions
from mlfsic_jax.core.model import BaseModel, LCMOptions
from mlfsic_jax.data.folder import read_csv
from mlfsic_jax.data.transforms import decode_photo, resize
from mlfsic_jax.data.words import load_word_vectors
from mlfsic_jax.methods import closed_form
from mlfsic_jax.run import evaluate, inputs, train
from mlfsic_jax.run.saved import Predictor, Trained, load
from mlfsic_jax.system.command import Parser, cli_errors
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import write_json
from mlfsic_jax.system.parallel import prefetch
from mlfsic_jax.system.progress import track
from mlfsic_jax.system.untrusted import expand

METHODS = ("region_word_ridge", "word_ridge", "ridge", "lcm", "base", "prototypes")
WORDLESS = ("ridge", "prototypes")  # do without the labels' word vectors
CONTRASTING = ("region_word_ridge", "word_ridge", "ridge")  # need photos with and without each label
THRESHOLD = 0.5
UNREADABLE = 3  # exit status
_BATCH = 8  # photos that go through the backbone together: one program for any number of them
_READERS = 4
_PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")


class State(NamedTuple):
    """What a method keeps of the support; None where it has no use for it.

    Attributes:
      prototypes: float [C, d], in the joint space for "base" and "lcm", of global features for "prototypes".
      adapted: of "word_ridge" and "region_word_ridge".
      features: float [S, n], global features, and
      labels: bool [S, C], for "ridge" and calibration.
      kept: bool [S, L], the regions that LCM keeps.
    """

    prototypes: jax.Array | None = None
    adapted: word_ridge.Adapted | None = None
    features: jax.Array | None = None
    labels: jax.Array | None = None
    kept: jax.Array | None = None


class Classifier(NamedTuple):
    """A model fitted to a user's labels, see ``fit``.

    Attributes:
      predictor: the model.
      trained: which of its shot counts is used.
      method: one of ``METHODS``.
      label_names: C names.
      thresholds: float [C]: a photo has a label where its probability is above.
      state: what the method keeps of the support.
      kept: bool [S, h, w], the regions of the support photos that LCM keeps, or None for other methods.
      note: why this method and this shot count, in one line.
    """

    predictor: Predictor
    trained: Trained
    method: str
    label_names: tuple[str, ...]
    thresholds: np.ndarray
    state: State
    kept: np.ndarray | None
    note: str


class Predictions(NamedTuple):
    """What ``predict`` says of Q photos.

    Attributes:
      probabilities: float32 [Q, C].
      label_names: C names.
      labels: for each photo the labels whose probability is above their threshold, the likeliest first.
    """

    probabilities: np.ndarray
    label_names: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]


def fit(
    predictor: Predictor,
    photos: Sequence[Any],
    labels: Sequence[str | Sequence[str]],
    *,
    method: str | None = None,
    label_names: Sequence[str] | None = None,
    vectors: str | os.PathLike[str] | None = None,
) -> Classifier:
    """Teaches a model labels from a few photos. Nothing is trained: it takes a moment.

    Args:
      predictor: see ``load``. Of several shot counts, the one nearest to the photos per label (median) is used.
      photos: S photos, each a path, a ``PIL.Image`` or an array uint8 [H, W, 3].
      labels: for each photo its label names, or one name; empty where it has none of the labels.
      method: one of ``METHODS``; None for the one that was best on validation labels.
      label_names: the labels, to fix their order; by default as they occur.
      vectors: a further file of word vectors, see ``label_embeddings.load_word_vectors``, looked at before the model's.

    Raises:
      InputError: a label has no photo, no word vector or no counter-example, or a photo cannot be read.
    """
    names, matrix = _label_matrix(photos, labels, label_names)
    if method not in (None, *METHODS):
        raise InputError(f"method {method!r} is unknown: use one of {', '.join(METHODS)}")
    median = statistics.median(matrix.sum(axis=0).tolist())
    trained = min(predictor.trained, key=lambda t: abs(t.n_shot - median))
    note = _note(predictor, trained, method, median)
    method = method or _best(trained)
    everywhere = [name for name, column in zip(names, matrix.T, strict=True) if column.all()]
    if everywhere and method in CONTRASTING:
        raise InputError(
            f"label {everywhere[0]!r} is on every support photo, so {method} has nothing to tell it from: add a photo "
            "without it (it may have no label at all), or use method prototypes"
        )
    words = None
    if method not in WORDLESS:
        words = _word_vectors(predictor, names, trained.fitted.words.shape[1], vectors)
    parts = []
    for pixels, errors in _read_batches(photos, predictor.image_size):
        for error in filter(None, errors):
            raise error
        embedded = _embed(predictor, trained, method, pixels)
        parts.append([np.asarray(x)[: len(errors)] for x in embedded])
    support = evaluate.Embedded(*map(np.concatenate, zip(*parts, strict=True)))
    lcm, ridge = train.lcm_options(predictor.config), train.ridge_options(predictor.config)
    state = _adapt(
        *(predictor.model, method, lcm, ridge, trained.variables, trained.fitted, trained.theta, words),
        *(support, matrix),
    )
    kept = None if state.kept is None else np.asarray(state.kept).reshape(-1, *predictor.grid)
    return Classifier(predictor, trained, method, names, np.full(len(names), THRESHOLD), state, kept, note)


def predict(classifier: Classifier, photos: Any) -> Predictions:
    """Says which of the labels each photo has.

    Args:
      classifier: see ``fit``.
      photos: Q photos as in ``fit``, or a single one.

    Raises:
      InputError: a photo cannot be read.
    """
    rows = []
    for row in predict_each(classifier, photos if _is_many(photos) else [photos]):
        if isinstance(row, InputError):
            raise row
        rows.append(row)
    probabilities = np.array(rows, np.float32).reshape(-1, len(classifier.label_names))
    return Predictions(
        probabilities, classifier.label_names, tuple(labels_above(classifier, row) for row in probabilities)
    )


def predict_each(classifier: Classifier, photos: Iterable[Any]) -> Iterator[np.ndarray | InputError]:
    """``predict`` for any number of photos, in a few photos' memory: float32 [C] for each, or why it cannot be read."""
    predictor, trained, method, *_ = classifier
    slope, intercept = trained.calibration.get(method, (1.0, 0.0))
    for pixels, errors in _read_batches(photos, predictor.image_size):
        embedded = _embed(predictor, trained, method, pixels)
        arguments = (trained.fitted, classifier.state, slope, intercept, embedded)
        rows = np.asarray(_probabilities(method, predictor.model, *arguments))
        yield from (row if error is None else error for row, error in zip(rows, errors, strict=False))


def labels_above(classifier: Classifier, probabilities: np.ndarray) -> tuple[str, ...]:
    """The labels of one photo, float [C], whose probability is above their threshold, the likeliest first."""
    order = np.argsort(-probabilities, kind="stable")
    return tuple(classifier.label_names[c] for c in order if probabilities[c] > classifier.thresholds[c])


def _label_matrix(photos, labels, label_names) -> tuple[tuple[str, ...], np.ndarray]:
    """C names and bool [S, C]."""
    if len(photos) != len(labels):
        raise InputError(f"{len(photos)} support photos but labels for {len(labels)}: give every photo its labels")
    each = [[names] if isinstance(names, str) else list(names) for names in labels]
    given = list(dict.fromkeys(itertools.chain.from_iterable(each)))
    for name in (*given, *(label_names or ())):
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{name!r} is no label name: give text")
    names = tuple(dict.fromkeys(given if label_names is None else label_names))
    if not names:
        raise InputError("the support has no label: name at least one, with 1 to 5 photos")
    for name in names:
        if name not in given:
            raise InputError(f"label {name!r} has no support photo: give it 1 to 5, or take it out")
    for name in given:
        if name not in names:
            raise InputError(f"label {name!r} of a support photo is not among the labels {', '.join(names)}")
    return names, np.array([[name in photo for name in names] for photo in each])


def _best(trained: Trained) -> str:
    return max(METHODS, key=lambda name: trained.validation.get(name, -1.0))


def _note(predictor: Predictor, trained: Trained, method: str | None, median: float) -> str:
    name = method or _best(trained)
    why = "chosen by you" if method else "best on validation labels"
    note = f"method {name}: {why} ({100 * trained.validation[name]:.1f} Ma-AP"
    note += f" there, {trained.n_shot}-shot)" if method else f", {trained.n_shot}-shot)"
    if "validation" in predictor.config.ridge.fit_on:
        note += ", on which the ridge methods were fitted too"
    if len(predictor.trained) > 1:
        note += f"; the support has {median:g} per label, {trained.n_shot}-shot is nearest to that"
    return note


def _word_vectors(predictor: Predictor, names: Sequence[str], dimension: int, vectors) -> np.ndarray:
    """float32 [C, d_w]: of each label from the first file that has it."""
    given = [Path(vectors)] if vectors else []
    files, found = [*given, *predictor.word_files], {}
    for file in files:
        missing = [name for name in names if name not in found]
        if not missing:
            break
        try:
            rows = load_word_vectors(file, missing, [name.replace("_", " ") for name in missing])
            found |= {name: (row, file) for name, row in zip(missing, rows, strict=True)}
        except InputError as error:
            hint = "name another with --vectors=FILE, rename the label, or use --method=ridge, which needs no words"
            if file == files[-1]:
                raise InputError(f"{error}; {hint}") from error
            for name in missing:
                with contextlib.suppress(InputError):
                    found[name] = load_word_vectors(file, [name], [name.replace("_", " ")])[0], file
            if file in given and not found:
                raise
    for row, file in found.values():
        if len(row) != dimension:
            raise InputError(f"{file} has vectors of {len(row)} numbers, but the model was trained with {dimension}")
    return np.stack([found[name][0] for name in names])


def _embed(predictor: Predictor, trained: Trained, method: str, pixels: np.ndarray) -> evaluate.Embedded:
    """One batch of photos through backbone and A_visual, the way that evaluation did it."""
    if predictor.frozen is not None:
        pixels = _frozen_features(predictor.frozen, predictor.frozen_variables, pixels)
    fitted = trained.fitted if method == "region_word_ridge" else None
    return evaluate.embed_batch(predictor.model, trained.variables, pixels, fitted)


@functools.partial(jax.jit, static_argnums=0)
def _frozen_features(backbone: inputs.PhotoBackbone, variables, pixels):
    return backbone.apply(variables, pixels).astype(jnp.float16)  # as the cache stores them


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _adapt(
    model: BaseModel, method: str, lcm: LCMOptions, ridge: evaluate.RidgeOptions,
    variables, fitted, theta, word_vectors, support: evaluate.Embedded, labels,
) -> State:  # fmt: skip
    """What a method takes from the support."""
    if method == "prototypes":
        return State(prototypes=labels.T.astype(jnp.float32) @ support.pooled / labels.sum(axis=0)[:, None])
    if method == "ridge":
        return State(features=support.pooled, labels=labels)
    if method in ("base", "lcm"):
        words, keep = model.apply(variables, word_vectors, method="words"), None
        if method == "lcm":
            score = model.apply(variables, support.regions, labels, words, lcm, method="lcm_scores")
            keep = select_positions(score, theta, scale=model.scale, score_scaling=lcm.score_scaling)
        prototypes = model.apply(variables, support.regions, labels, words, keep, method="prototypes")
        return State(prototypes=prototypes, kept=keep)
    by_regions = method == "region_word_ridge"
    adapted = word_ridge.adapt(
        *(fitted, support.pooled, support.regions if by_regions else None, labels, word_vectors),
        beta=ridge.beta,
        regulariser=ridge.region_regulariser if by_regions else ridge.regulariser,
    )
    return State(adapted=adapted, labels=labels)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _probabilities(method: str, model: BaseModel, fitted, state: State, slope, intercept, query: evaluate.Embedded):
    """float32 [Q, C] for one batch of photos."""
    if state.prototypes is not None:
        if method == "prototypes":
            return jax.nn.sigmoid(cosine_logits(query.pooled, state.prototypes, model.scale))
        return jax.nn.sigmoid(model.query_logits(query.regions, state.prototypes))
    if method == "ridge":
        x, x_query = unit(state.features - fitted.mean), unit(query.pooled - fitted.mean)
        return jnp.clip(closed_form.ridge(x, state.labels, x_query), 0, 1)
    regions = query.regions if method == "region_word_ridge" else None
    scores = word_ridge.scores(fitted, state.adapted, query.pooled, regions)
    prediction = word_ridge.Prediction(scores, state.adapted.left_out)
    return word_ridge.probabilities(prediction, state.labels, slope, intercept)


def _is_many(photos: Any) -> bool:
    single = isinstance(photos, (str, os.PathLike, Image.Image)) or (isinstance(photos, np.ndarray) and photos.ndim < 4)
    return not single


def _read_batches(photos: Iterable[Any], size: int) -> Iterator[tuple[np.ndarray, list[InputError | None]]]:
    """Photos, read ahead: uint8 [_BATCH, size, size, 3], the last filled up, with None or an error for each photo."""
    read = prefetch(lambda numbered: _read(size, *numbered), enumerate(photos, 1), readers=_READERS, ahead=2 * _BATCH)
    while batch := list(itertools.islice(read, _BATCH)):
        pixels = np.zeros((_BATCH, size, size, 3), np.uint8)
        for i, photo in enumerate(batch):
            if not isinstance(photo, InputError):
                pixels[i] = photo
        yield pixels, [photo if isinstance(photo, InputError) else None for photo in batch]


def _read(size: int, number: int, photo: Any) -> np.ndarray | InputError:
    try:
        return resize(_pixels(photo, number), size)
    except InputError as error:
        return error


def _pixels(photo: Any, number: int) -> np.ndarray:
    """uint8 [H, W, 3] of a path, an image or an array."""
    if isinstance(photo, (str, os.PathLike)):
        return decode_photo(photo, str(photo))
    name = f"number {number}"
    try:
        image = photo if isinstance(photo, Image.Image) else Image.fromarray(np.asarray(photo))
        image = ImageOps.exif_transpose(image)
        if image.mode not in (*_PNG_MODES, "F"):
            image = image.convert("RGB")
        with io.BytesIO() as file:  # transparency, 16 bits and the like are treated as in a file
            image.save(file, "png", compress_level=0)
            return decode_photo(file.getvalue(), name)
    except InputError:
        raise
    except Exception as error:  # an image that Pillow has not decoded yet fails as files do
        what = f"{photo.dtype} {list(photo.shape)}" if isinstance(photo, np.ndarray) else type(photo).__name__
        raise InputError(f"photo {name} is {what}: give a path, an image or an array uint8 [H, W, 3]") from error


def find_photos(patterns: Sequence[str]) -> list[Path]:
    """The photos that ``--images`` names: folders with all photos in them, files, and patterns such as ``a/*.jpg``.

    Raises:
      InputError: one of them is not there, or a folder holds no photo.
    """
    endings = Image.registered_extensions()
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = expand(pattern)
        if path.is_dir():
            photos = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in endings and p.is_file()]
            photos = [p for p in photos if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        else:
            photos = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        if not photos:
            why = "holds no photos" if path.is_dir() else "is no file, no folder and no pattern of files"
            raise InputError(f"--images={pattern} {why}")
        found |= dict.fromkeys(photos)
    return list(found)


def run(flags: argparse.Namespace) -> int:
    """The command.

    Returns:
      How many photos could not be read.

    Raises:
      InputError: a mistake; nothing was written.
    """
    out, table = expand(flags.out), expand(flags.support)
    if out.suffix not in (".csv", ".json"):
        raise InputError(f"--out={flags.out} must end in .csv or .json")
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise InputError(f"--out={flags.out} cannot be written: give a file in a folder that exists")
    if not table.is_file():
        raise InputError(f"--support={flags.support}: no such file; it has the columns file,labels, see the README")
    labels, names = read_csv(table, anywhere=True)
    if not labels:
        raise InputError(f"{table} names no photo: add lines such as a.jpg,sofa|cat")
    if out.suffix == ".csv" and not {"file", "labels"}.isdisjoint(names):
        raise InputError("a label called file or labels cannot be told from a column: give an --out that ends in .json")
    photos = find_photos(flags.images)
    predictor = load(flags.workdir, flags.n_shot)
    classifier = fit(
        *(predictor, list(labels), list(labels.values())),
        method=flags.method,
        label_names=names,
        vectors=flags.vectors,
    )
    print(classifier.note, flush=True)
    rows, unreadable = [], []
    each = track(predict_each(classifier, photos), total=len(photos), description="predicting", unit="photos")
    for photo, row in zip(photos, each, strict=True):
        if isinstance(row, InputError):
            unreadable.append((photo, row))
        else:
            rows.append((photo, row))
    for _, error in unreadable:
        print(f"unreadable: {error}", file=sys.stderr)
    if not rows:
        raise InputError(f"none of the {len(photos)} photos can be read")
    try:
        (_write_csv if out.suffix == ".csv" else _write_json)(out, classifier, rows, unreadable)
    except OSError as error:
        raise InputError(f"--out={flags.out} cannot be written: {error.strerror}") from error
    left_out = f", {len(unreadable)} unreadable photos left out" if unreadable else ""
    print(f"wrote {out}: {len(rows)} photos, {len(names)} labels{left_out}")
    return len(unreadable)


def _write_csv(out: Path, classifier: Classifier, rows, unreadable) -> None:
    part = out.with_suffix(".part")
    # A photo's name need not be text in UTF-8: it is written byte for byte.
    with open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "labels", *classifier.label_names])
        for photo, row in rows:
            writer.writerow([photo, "|".join(labels_above(classifier, row)), *(f"{p:.4f}" for p in row)])
    os.replace(part, out)


def _write_json(out: Path, classifier: Classifier, rows, unreadable) -> None:
    photos = [
        {
            "file": str(photo),
            "labels": labels_above(classifier, row),
            "probabilities": dict(zip(classifier.label_names, map(float, row), strict=True)),
        }
        for photo, row in rows
    ]
    content = {
        "method": classifier.method,
        "n_shot": classifier.trained.n_shot,
        "thresholds": dict(zip(classifier.label_names, classifier.thresholds.tolist(), strict=True)),
        "photos": photos,
        "unreadable": [{"file": str(photo), "why": str(error)} for photo, error in unreadable],
    }
    write_json(out, content)


def main(arguments: Sequence[str] | None = None) -> None:
    """Flags in, a file of predictions out."""
    parser = Parser("mlfsic_jax.predict", __doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="of a training run, or an exported folder")
    parser.add_argument("--support", required=True, help="a CSV file: columns file,labels; several labels as sofa|cat")
    parser.add_argument("--images", required=True, nargs="+", action="extend", help="a folder, files, or 'a/*.jpg'")
    parser.add_argument("--out", required=True, help="the .csv or .json file to write")
    parser.add_argument("--method", choices=METHODS, help="default: the one that was best on validation labels")
    parser.add_argument("--n_shot", type=int, help="default: of the trained shot counts the nearest to the support's")
    parser.add_argument("--vectors", help="a further file of word vectors, for labels that the model has none for")
    parser.add_argument("--cache_dir", default="cache", help="where compiled programs are kept; default cache")
    flags = parser.parse_args(arguments)
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)  # which devices it looked for in vain
    jax.config.update("jax_compilation_cache_dir", str(Path(flags.cache_dir).absolute() / "compiled"))
    with cli_errors("nothing was written"):
        unreadable = run(flags)
    if unreadable:
        sys.exit(UNREADABLE)
