"""Models without their dataset: ``load`` opens a training run or an exported folder, ``export`` writes such a folder.

python -m mlfsic_jax.export --workdir=RUN --out=FOLDER

writes all that ``mlfsic_jax.predict`` needs on another machine:

- ``model.json``: config, scores, the card, and a sha256 of every file, so that a folder that was cut short is noticed;
- ``model_<K>shot.safetensors`` for each shot count, ``backbone.safetensors`` unless the backbone was trained with it;
- ``words.safetensors``: word vectors of the dataset's labels, and of the most frequent other words;
- ``card.md``: what it was trained on, its scores and licences, for people.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file

import mlfsic_jax
from mlfsic_jax.backbones import BACKBONES
from mlfsic_jax.backbones.weights import weights_files
from mlfsic_jax.core import word_ridge
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.data.words import EMBEDDINGS, text_lines
from mlfsic_jax.run import config as defaults
from mlfsic_jax.run import inputs
from mlfsic_jax.system.command import Parser, cli_errors
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import read_arrays, sha256, write_arrays, write_json, write_tree
from mlfsic_jax.system.untrusted import expand, read_json, read_npz, reason, shown

FORMAT = 1  # of an exported folder
_MANIFEST, _CARD, _BACKBONE, _WORDS = "model.json", "card.md", "backbone.safetensors", "words.safetensors"
_LABEL_VECTORS = "label_vectors.safetensors"  # of a run
_N_WORDS = 50_000


class Trained(NamedTuple):
    """The model that was trained for one shot count.

    Attributes:
      n_shot: K.
      variables: of the model.
      fitted: what the base images taught the methods in closed form.
      theta: LCM's threshold, chosen on validation labels.
      calibration: method -> slope and intercept of ``word_ridge.probabilities``.
      validation: method -> Ma-AP on validation labels, a fraction.
    """

    n_shot: int
    variables: Mapping[str, Any]
    fitted: word_ridge.Fitted
    theta: float
    calibration: Mapping[str, tuple[float, float]]
    validation: Mapping[str, float]


class Predictor(NamedTuple):
    """A trained or exported model, see ``load``.

    Attributes:
      path: where it was loaded from.
      manifest: what ``model.json`` of an exported folder holds: "config", "identity" (hashes of data, weights, words),
        "labels" (split -> names), "models" (scores and choices for each shot count).
      config: of the run.
      model: the model; inside it the backbone, where that was trained.
      frozen: the backbone otherwise, or None.
      frozen_variables: of ``frozen``, or None.
      image_size: photos are resized to this square.
      grid: h and w of the backbone's local features.
      trained: one for each shot count, ascending.
      word_files: where word vectors are looked up, in this order.
    """

    path: Path
    manifest: Mapping[str, Any]
    config: ml_collections.FrozenConfigDict
    model: BaseModel
    frozen: inputs.PhotoBackbone | None
    frozen_variables: Mapping[str, Any] | None
    image_size: int
    grid: tuple[int, int]
    trained: tuple[Trained, ...]
    word_files: tuple[Path, ...]


def load(path: str | os.PathLike[str], n_shot: int | None = None) -> Predictor:
    """Opens a model; no dataset is needed.

    Args:
      path: the workdir of a training run, or a folder that ``export`` wrote.
      n_shot: use only the model that was trained for this shot count; None leaves the choice to ``predict.fit``.

    Raises:
      InputError: the folder holds no model, is incomplete or damaged, or has none for ``n_shot``.
    """
    path = expand(path)
    exported = (path / _MANIFEST).is_file()
    try:
        manifest = _read_export(path) if exported else _describe_run(path)
        return _assemble(path, manifest, n_shot, exported)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        file, why = path / (_MANIFEST if exported else "results.json"), f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"{file} was altered or is of another version of mlfsic_jax ({why}): copy it again") from error


def _assemble(path: Path, manifest: Mapping[str, Any], n_shot: int | None, exported: bool) -> Predictor:
    config = defaults.default().lock()
    try:
        config.update(manifest["config"])  # fields that came later keep their defaults
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"the config of {path} is of another version of mlfsic_jax ({reason(error)})") from error
    allowed = config.copy_and_resolve_references()
    allowed.backbone_weights = _BACKBONE  # an exported config names none
    defaults.validate(allowed)
    chosen = [entry for entry in manifest["models"] if n_shot in (None, entry["n_shot"])]
    if not chosen:
        there = " and ".join(str(entry["n_shot"]) for entry in manifest["models"])
        raise InputError(f"{path} has no model for {n_shot} shots, only for {there}")

    backbone, weights = _backbone(path, config, manifest, exported)
    size = inputs.image_size(config)
    photo = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    features, initial = jax.eval_shape(backbone.init_with_output, jax.random.key(0), photo)
    if exported and not config.train_backbone:
        _need_shapes(path / _BACKBONE, weights, initial)
    model = BaseModel(**config.model, backbone=backbone if config.train_backbone else None)
    trained = []
    for entry in sorted(chosen, key=lambda entry: entry["n_shot"]):
        file = path / _model_file(entry["n_shot"])
        arrays = _read_tree(file)
        fitted = word_ridge.Fitted(**arrays["fitted"])
        _need_shapes(file, arrays, _shapes(model, photo if config.train_backbone else features, features, fitted))
        trained.append(
            Trained(
                n_shot=entry["n_shot"],
                variables=arrays["variables"],
                fitted=fitted,
                theta=entry["theta"],
                calibration={name: tuple(values) for name, values in entry["calibration"].items()},
                validation=entry["validation_macro_ap"],
            )
        )
    if exported:
        word_files = (path / _WORDS,)
    elif config.labels.embedding == "dataset":
        word_files = (path / _LABEL_VECTORS,)
    else:
        word_files = (path / _LABEL_VECTORS, Path(inputs.vectors_path(config)))
    return Predictor(
        path=path,
        manifest=manifest,
        config=ml_collections.FrozenConfigDict(config),
        model=model,
        frozen=None if config.train_backbone else backbone,
        frozen_variables=weights,
        image_size=size,
        grid=features.shape[1:3],
        trained=tuple(trained),
        word_files=word_files,
    )


def export(workdir: str | os.PathLike[str], out: str | os.PathLike[str], n_words: int = _N_WORDS) -> dict[str, Any]:
    """Writes a self-contained folder from a training run.

    Args:
      workdir: of the run.
      out: the folder; an earlier export there is replaced.
      n_words: so many word vectors are carried besides those of the dataset's labels, the first of the file, which are
        the most frequent words; embeddings that were made for the dataset's labels have no others.

    Returns:
      What ``model.json`` holds.

    Raises:
      InputError: ``workdir`` is no finished run, or ``out`` cannot be written or holds something else.
    """
    out = expand(out)
    predictor = load(workdir)
    if "files" in predictor.manifest:
        raise InputError(f"{workdir} is an exported folder already: copy it as it is")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out={out} is a file: give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / _MANIFEST).is_file():
        raise InputError(f"--out={out} holds something that is no export: give a new or empty folder")
    config = ml_collections.ConfigDict(predictor.config)
    words = _words(predictor, n_words)
    card = _card(predictor, len(words))
    for field in ("workdir", "cache_dir", "data_dir", "backbone_weights"):  # paths of this machine
        config[field] = ""
    config.data.source = config.data.prepared_dir = config.data.split = config.labels.vectors = ""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
            part = Path(folder)
            for trained in predictor.trained:
                tree = {"variables": trained.variables, "fitted": trained.fitted._asdict()}
                write_tree(part / _model_file(trained.n_shot), tree)
            if predictor.frozen is not None:
                write_tree(part / _BACKBONE, predictor.frozen_variables)
            write_arrays(part / _WORDS, words)
            (part / _CARD).write_text(card, encoding="utf-8")
            files = {path.name: sha256(path) for path in sorted(part.iterdir())}
            manifest = {"format": FORMAT, "mlfsic_jax": mlfsic_jax.__version__} | dict(predictor.manifest)
            manifest |= {"config": config.to_dict(), "card": card, "files": files}
            manifest["sha256"] = _manifest_digest(manifest)
            out.mkdir(exist_ok=True)
            for name in files:
                os.replace(part / name, out / name)
            write_json(out / _MANIFEST, manifest)  # last: a folder that was not finished is no model
    except OSError as error:
        raise InputError(f"--out={out} cannot be written: {error.strerror}") from error
    return manifest


def _describe_run(path: Path) -> dict[str, Any]:
    """What ``model.json`` would hold, gathered from a workdir."""
    if not (path / "results.json").is_file():
        raise InputError(f"{path} holds no model: give the workdir of a finished training run, or an exported folder")
    results, trained_with = (_read_json(path / name) for name in ("results.json", "trained_with.json"))
    old = f"{path} was trained by an older version: run its training command again, which adds what prediction needs"
    if not (path / _LABEL_VECTORS).is_file():
        raise InputError(old)
    _, metadata = read_arrays(path / _LABEL_VECTORS)
    try:
        labels = json.loads(metadata["splits"])
        models = [
            {
                "n_shot": entry["n_shot"],
                "theta": entry["theta"]["chosen"],
                "calibration": entry["validation"]["calibration"],
                "validation_macro_ap": entry["validation"]["macro_ap"],
                "dataset": entry["dataset"],
                "episodes": entry["episodes"],
                "methods": entry["methods"],
                "calibration_error": entry["calibration_error"],
            }
            for entry in results
        ]
        identity, config = trained_with["inputs"], results[0]["config"]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(old) from error
    return {"config": config, "identity": identity, "labels": labels, "models": models}


def _read_export(path: Path) -> dict[str, Any]:
    """The manifest of an exported folder, whose files are all as they were written."""
    manifest = _read_json(path / _MANIFEST)
    again = "copy or export the folder again"
    if not isinstance(manifest, dict) or manifest.get("sha256") != _manifest_digest(manifest):
        raise InputError(f"{path / _MANIFEST} was altered or is damaged: {again}")
    if manifest["format"] != FORMAT:
        raise InputError(f"{path} has format {manifest['format']}, this version reads {FORMAT}: {again}")
    for name, digest in manifest["files"].items():
        if not (path / name).is_file():
            raise InputError(f"{path / name} is missing: {again}")
        if sha256(path / name) != digest:
            raise InputError(f"{path / name} is cut short or was altered: {again}")
    return manifest


def _backbone(path: Path, config: ml_collections.ConfigDict, manifest: Mapping[str, Any], exported: bool):
    """The module, and its variables where it is frozen."""
    if exported or config.train_backbone:
        bare = config.copy_and_resolve_references()
        bare.backbone_weights = ""
        backbone, _, _ = inputs.load_backbone(bare)
        return backbone, None if config.train_backbone else _read_tree(path / _BACKBONE)
    names = inputs.weights_path(config)
    for file in weights_files(names):
        if not file.is_file():
            raise InputError(
                f"{file}, the backbone weights of {path}, is missing: work in the folder where the model was trained, "
                "or export the model there"
            )
    backbone, weights, digest = inputs.load_backbone(config)
    if digest != manifest["identity"]["weights"]:
        raise InputError(f"{names} holds other backbone weights than those that {path} was trained with")
    return backbone, weights


def _words(predictor: Predictor, n_words: int) -> dict[str, np.ndarray]:
    """Vectors by name: of the dataset's labels float32, of other words float16."""
    vectors = _load_arrays(predictor.word_files[0])
    dimension = predictor.trained[0].fitted.words.shape[1]
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
        raise _damaged(path, error) from error
    return {word: vector for word, vector in half.items() if np.isfinite(vector).all()} | vectors


def _words_of(path: Path, dimension: int, n_words: int) -> Iterator[tuple[str, np.ndarray]]:
    """The words of a file of word vectors in its order, see ``label_embeddings.load_word_vectors`` for the kinds."""
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".bin":
        from gensim.models import KeyedVectors

        vectors = KeyedVectors.load_word2vec_format(str(path), binary=True, limit=n_words, unicode_errors="replace")
        yield from ((word, vectors[word]) for word in vectors.index_to_key)
    elif kind in (".npz", ".safetensors"):
        yield from _load_arrays(path).items() if kind == ".safetensors" else read_npz(path)
    else:
        for _, line in text_lines(path):
            word, *numbers = line.rsplit(" ", dimension)
            if len(numbers) == dimension:  # not so in the first line of some files
                yield word, np.array(numbers, np.float32)


def _card(predictor: Predictor, n_words: int) -> str:
    """What the model is, in plain words, as Markdown."""
    config, manifest = predictor.config, predictor.manifest
    spec, embedding = BACKBONES[config.backbone], EMBEDDINGS.get(config.labels.embedding)
    labels = manifest["labels"]
    lines = [
        f"# {config.data.name}, {config.backbone}: labels for photos from a few examples",
        "",
        "Give it 1 to 5 photos of each of your own labels, and it says which of the labels another photo has:",
        "",
        "    python -m mlfsic_jax.predict --workdir=THIS_FOLDER --support=support.csv --images=PHOTOS --out=labels.csv",
        "",
        f"Written by mlfsic_jax {mlfsic_jax.__version__}.",
        "",
        "## What it was trained on",
        "",
        f"- Dataset {config.data.name}, {len(labels['train'])} labels: {', '.join(labels['train'])}.",
        f"- Chosen and calibrated on {len(labels['validation'])} others: {', '.join(labels['validation'])}.",
        f"- Backbone {config.backbone}, photos at {predictor.image_size} x {predictor.image_size}, "
        + ("trained with the model." if config.train_backbone else "frozen."),
    ]
    if config.data.name == "scenes":
        lines.append("- These are generated scenes with made-up word vectors, for a demonstration: it knows no photos.")
    lines += ["", "## Scores", ""]
    lines.append(f"On {len(labels['novel'])} labels that it was not trained on: {', '.join(labels['novel'])}. In %,")
    lines.append("mean ± 95 % interval over episodes; ECE is the calibration error; F1 at probability 0.5.")
    for entry in manifest["models"]:
        title = f"{entry['n_shot']}-shot, {entry['episodes']} episodes"
        lines += ["", f"| {title} | Ma-AP | Ma-F1 | ECE | Ma-AP on validation |", "|---|---|---|---|---|"]
        for name, scores in entry["methods"].items():
            cells = [f"{100 * scores[m]['mean']:.1f} ± {100 * scores[m]['ci95']:.1f}" for m in ("macro_ap", "macro_f1")]
            cells.append(f"{100 * entry['calibration_error'][name]:.1f}")
            cells.append(f"{100 * entry['validation_macro_ap'][name]:.1f}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "## Words", ""]
    if n_words > sum(map(len, labels.values())):
        lines.append(f"{n_words} labels and words have vectors here ({config.labels.embedding}), which may make up the")
        lines.append("names of your labels.")
    else:
        lines.append(f"Only the dataset's labels have vectors here ({config.labels.embedding}).")
    lines.append("Labels of other words need --vectors=FILE, or --method=ridge or prototypes, which read no words.")
    lines += ["", "## Licences", ""]
    if config.train_backbone and not config.backbone_weights:
        lines.append("- Backbone: trained from random weights.")
    else:
        names = ", ".join(file.name for file in weights_files(inputs.weights_path(config)))
        lines.append(f"- Backbone: {names}, sha256 {manifest['identity']['weights']}. Published weights of this")
        lines.append(f"  architecture: {spec.pretrained or 'none'}.")
    lines.append(f"- Word vectors: {embedding.licence if embedding else 'of the dataset'}.")
    lines.append("- No photo is in this folder; the terms of the photos that it was trained on may still concern you.")
    return "\n".join(lines) + "\n"


def _shapes(model: BaseModel, images: jax.ShapeDtypeStruct, features, fitted: word_ridge.Fitted) -> dict[str, Any]:
    """What a model's file holds, as shapes: for images as it takes them, and local features [1, h, w, n]."""
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    (n_labels, d_words), (_, d), n = fitted.words.shape, fitted.components.shape, features.shape[-1]
    rngs = dict.fromkeys(("params", "dropout", "augment"), jax.random.key(0))
    labels = float32((1, 1))
    variables = jax.eval_shape(model.init, rngs, images, images, labels, labels, float32((1, d_words)))
    return {
        "variables": {name: variables[name] for name in ("params", "batch_stats") if name in variables},
        "fitted": {
            "mean": float32((n,)),
            "components": float32((n, d)),
            "words": float32((n_labels, d_words)),
            "mapping": float32((n_labels, n)),
            "offset": float32((n,)),
        },
    }


def _need_shapes(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    found, expected = (
        {key: array.shape for key, array in traverse_util.flatten_dict(dict(tree), sep="/").items()}
        for tree in (found, expected)
    )
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            there, wanted = (list(shapes[key]) if key in shapes else "absent" for shapes in (found, expected))
            raise InputError(
                f"{path} does not fit its config: {shown(key)} is {there}, expected {wanted}; copy it again"
            )


def _model_file(n_shot: int) -> str:
    return f"model_{n_shot}shot.safetensors"


def _read_tree(path: Path) -> dict[str, Any]:
    arrays, _ = read_arrays(path)
    _need_finite(path, arrays)
    return traverse_util.unflatten_dict({name: jnp.asarray(array) for name, array in arrays.items()}, sep="/")


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        arrays = load_file(path)
    except Exception as error:  # besides its own errors, KeyError and others for number types that NumPy lacks
        raise _damaged(path, error) from error
    _need_finite(path, arrays)
    return arrays


def _need_finite(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise _damaged(path, ValueError(f"{name} holds NaN or infinity"))


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is missing, cut short or damaged ({reason(error)}): copy it again, or run the training again"
    )


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _run(flags: argparse.Namespace) -> None:
    if flags.words < 0:
        raise InputError(f"--words={flags.words} must be 0 or more")
    export(flags.workdir, flags.out, flags.words)
    size = sum(path.stat().st_size for path in expand(flags.out).iterdir())
    print(f"wrote {flags.out}: {size / 1e6:.1f} MB; {_CARD} says what it is")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = Parser("mlfsic_jax.export", "Writes a trained model as a folder that works on another machine.")
    parser.add_argument("--workdir", required=True, help="of a training run")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--words", type=int, default=_N_WORDS, help=f"word vectors to carry; default {_N_WORDS}")
    with cli_errors("nothing was written"):
        _run(parser.parse_args(arguments))
