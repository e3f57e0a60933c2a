"""A model without its dataset: opens a training run, or a folder that ``run.export`` wrote.

An exported folder holds

- ``model.json``: config, scores, the card, and a sha256 of every file, so that a folder that was cut short is noticed;
- ``model_<K>shot.safetensors`` for each shot count, ``backbone.safetensors`` unless the backbone was trained with it;
- ``words.safetensors``: word vectors of the dataset's labels, and of the most frequent other words;
- ``card.md``: what it was trained on, its scores and licences, for people.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict, FrozenConfigDict
from safetensors.numpy import load_file

from mlfsic_jax import methods
from mlfsic_jax.backbones.clip_text import TextFiles
from mlfsic_jax.backbones.weights import weights_files
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.data import class_words
from mlfsic_jax.methods import METHODS, Method
from mlfsic_jax.run import config as defaults
from mlfsic_jax.run import inputs
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import read_arrays, sha256, write_arrays, write_tree
from mlfsic_jax.system.untrusted import expand, read_json, reason, reported, shown

FORMAT = 2  # of an exported folder
MANIFEST, CARD, BACKBONE, WORDS = "model.json", "card.md", "backbone.safetensors", inputs.WORDS
_LABEL_VECTORS = "label_vectors.safetensors"  # of a run


class Trained(NamedTuple):
    """The methods as they were trained for one shot count."""

    n_shot: int  # K
    methods: Mapping[str, Method]  # name -> method, those whose stores are there, without controls
    stores: Mapping[str, Any]  # store -> what its training gave
    tuned: Mapping[str, float]  # method -> the value that was chosen on validation labels
    calibration: Mapping[str, tuple[float, float]]  # method -> slope and intercept of its probabilities
    validation: Mapping[str, float]  # method -> Ma-AP on validation labels, a fraction, of those that were evaluated


class Predictor(NamedTuple):
    """A trained or exported model, see ``load``."""

    path: Path  # where it was loaded from
    # as in ``model.json``: "config", "identity" (hashes of data, weights, words), "labels" (split -> names), "models"
    # (scores and choices for each shot count)
    manifest: Mapping[str, Any]
    config: FrozenConfigDict  # of the run
    backbone: inputs.PhotoBackbone  # photos -> local features
    backbone_variables: Mapping[str, Any] | None  # where it is frozen; None where each ``Trained`` has its own
    image_size: int  # photos are resized to this square
    grid: tuple[int, int]  # h and w of the backbone's local features
    trained: tuple[Trained, ...]  # one for each shot count, ascending
    word_files: tuple[Path, ...]  # where word vectors are looked up, in this order
    encoder: Path | TextFiles  # see ``inputs.text_encoder``, for methods that encode names


def trained_of(trained: Trained, name: str) -> dict[str, Any]:
    """The ``trained`` of one of its methods."""
    return methods.trained_of(trained.methods[name], trained.stores, trained.tuned.get(name))


def load(path: str | os.PathLike[str], n_shot: int | None = None) -> Predictor:
    """Opens the workdir of a training run, or a folder that ``export`` wrote; no dataset is needed.

    With ``n_shot`` only the model that was trained for this shot count; else ``classifier.fit`` chooses.

    Raises:
      InputError: the folder holds no model, is incomplete or damaged, or has none for ``n_shot``.
    """
    path = expand(path)
    exported = (path / MANIFEST).is_file()
    try:
        manifest = _read_export(path) if exported else _describe_run(path)
        return _assemble(path, manifest, n_shot, exported)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        file, why = path / (MANIFEST if exported else "results.json"), f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"{file} was altered or is of another version of mlfsic_jax ({why}): copy it again") from error


def save_for_prediction(workdir: Path, run: inputs.Inputs, n_shot: int, stores: Mapping[str, Any]) -> None:
    """Writes what ``load`` needs besides the results: what was trained, and the labels' word vectors."""
    write_tree(workdir / model_file(n_shot), stores)
    vectors: dict[str, np.ndarray] = {}
    for split in run.splits.values():
        vectors |= zip(split.label_names, split.word_vectors, strict=True)
    splits = {name: list(split.label_names) for name, split in run.splits.items()}
    write_arrays(workdir / _LABEL_VECTORS, vectors, {"splits": json.dumps(splits)})


def _assemble(path: Path, manifest: Mapping[str, Any], n_shot: int | None, exported: bool) -> Predictor:
    config = defaults.default().lock()
    try:
        config.update(manifest["config"])  # fields that came later keep their defaults
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"the config of {path} is of another version of mlfsic_jax ({reason(error)})") from error
    allowed = config.copy_and_resolve_references()
    allowed.backbone_weights = BACKBONE  # an exported config names none
    defaults.validate(allowed)
    chosen = [entry for entry in manifest["models"] if n_shot in (None, entry["n_shot"])]
    if not chosen:
        there = " and ".join(str(entry["n_shot"]) for entry in manifest["models"])
        raise InputError(f"{path} has no model for {n_shot} shots, only for {there}")
    backbone, weights = _backbone(path, config, manifest, exported)
    size = inputs.image_size(config)
    photo, features, variables, _ = inputs.shapes(backbone, size)
    if exported and not config.train_backbone:
        _need_shapes(path / BACKBONE, weights, variables)
    chosen = sorted(chosen, key=lambda entry: entry["n_shot"])
    word_files = (path / (WORDS if exported else _LABEL_VECTORS),)
    if not exported and config.labels.embedding != "dataset":
        word_files += (Path(inputs.vectors_path(config)),)
    trained = tuple(_trained(path, config, entry, photo, features, backbone) for entry in chosen)
    frozen, grid = FrozenConfigDict(config), features.shape[1:3]
    encoder = inputs.text_encoder(config, path if exported else None)
    return Predictor(path, manifest, frozen, backbone, weights, size, grid, trained, word_files, encoder)


def _trained(path: Path, config, entry: Mapping[str, Any], photo, features, backbone) -> Trained:
    file = path / model_file(entry["n_shot"])
    stores = _read_tree(file)
    if "variables" in stores:  # of format 1
        stores["episodes"] = {"variables": stores.pop("variables")}
    model = defaults.create_model(config, backbone if config.train_backbone else None)
    images = photo if config.train_backbone else features
    expected = _shapes(model, images, features, stores) if "episodes" in stores else {}
    _need_shapes(file, {name: tree for name, tree in stores.items() if name in expected}, expected)
    every = defaults.create_methods(config, entry["n_shot"], tuple(METHODS))
    every = {name: method.explaining() for name, method in every.items() if not method.control}
    there = {name: method for name, method in every.items() if stores.keys() >= set(method.stores)}
    for name, method in there.items():
        if not expected.keys() >= set(method.stores):
            _need_usable(file, name, method, stores, features)
    calibration = {name: tuple(values) for name, values in entry["calibration"].items()}
    validation = {name: ap for name, ap in entry["validation_macro_ap"].items() if name in every}
    return Trained(entry["n_shot"], there, stores, entry["tuned"], calibration, validation)


def _describe_run(path: Path) -> dict[str, Any]:
    """The content of ``model.json``, gathered from a workdir."""
    if not (path / "results.json").is_file():
        raise InputError(f"{path} holds no model: give the workdir of a finished training run, or an exported folder")
    results, trained_with = (_json(path / name) for name in ("results.json", "trained_with.json"))
    old = f"{path} was trained by an older version: run its training command again, which adds what prediction needs"
    if not (path / _LABEL_VECTORS).is_file():
        raise InputError(old)
    _, metadata = read_arrays(path / _LABEL_VECTORS)
    same = ("n_shot", "tuned", "dataset", "episodes", "methods", "calibration_error")

    def model(entry):
        validation = entry["validation"]
        chosen = {"calibration": validation["calibration"], "validation_macro_ap": validation["macro_ap"]}
        return {name: entry[name] for name in same} | chosen

    try:
        found = {"config": results[0]["config"], "identity": trained_with["inputs"]}
        return found | {"labels": json.loads(metadata["splits"]), "models": list(map(model, results))}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(old) from error


def _read_export(path: Path) -> dict[str, Any]:
    """The manifest of an exported folder, whose files are all as they were written."""
    manifest = _json(path / MANIFEST)
    again = "copy or export the folder again"
    if not isinstance(manifest, dict) or manifest.get("sha256") != manifest_digest(manifest):
        raise InputError(f"{path / MANIFEST} was altered or is damaged: {again}")
    if manifest["format"] == 1:
        manifest |= _from_format_1(manifest)
    elif manifest["format"] != FORMAT:
        raise InputError(f"{path} has format {manifest['format']}, this version reads {FORMAT}: {again}")
    for name, digest in manifest["files"].items():
        if not (path / name).is_file():
            raise InputError(f"{path / name} is missing: {again}")
        if sha256(path / name) != digest:
            raise InputError(f"{path / name} is cut short or was altered: {again}")
    return manifest


def _from_format_1(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest of the first format says, in the words of today's; its LCM had no fit to the support."""
    config = manifest["config"] | {"ridge": dict(manifest["config"]["ridge"])}
    for field in ("variants", "variants_threshold"):
        config["ridge"].pop(field, None)

    def renamed(values):
        return {"lcm_untuned" if name == "lcm" else name: value for name, value in values.items()}

    models = [
        entry | {"tuned": {"lcm_untuned": entry["theta"]}, "validation_macro_ap": renamed(entry["validation_macro_ap"])}
        for entry in manifest["models"]
    ]
    return {"config": config, "models": models}


def _backbone(path: Path, config: ConfigDict, manifest: Mapping[str, Any], exported: bool):
    """The module, and its variables where it is frozen."""
    if exported or config.train_backbone:
        bare = config.copy_and_resolve_references()
        bare.backbone_weights = ""
        backbone, _, _ = inputs.load_backbone(bare)
        return backbone, None if config.train_backbone else _read_tree(path / BACKBONE)
    names = inputs.weights_path(config)
    for file in weights_files(names):
        if not file.is_file():
            hint = "work in the folder where the model was trained, or export the model there"
            raise InputError(f"{file}, the backbone weights of {path}, is missing: {hint}")
    backbone, weights, digest = inputs.load_backbone(config)
    if digest != manifest["identity"]["weights"]:
        raise InputError(f"{names} holds other backbone weights than those that {path} was trained with")
    return backbone, weights


def word_width(stores: Mapping[str, Any]) -> int:
    """Length of the word vectors that a model was trained with."""
    joint = stores["episodes"]["variables"]["params"]["joint"]
    return len(joint["a_text"]["kernel"]) if "a_text" in joint else 1  # where absent, its shape is refused soon


def _shapes(model: BaseModel, images: jax.ShapeDtypeStruct, features, stores: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes of the stores, for images as the model takes them and local features [1, h, w, n]."""
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    rngs = dict.fromkeys(("params", "dropout", "augment"), jax.random.key(0))
    labels, words = float32((1, 1)), float32((1, word_width(stores)))
    variables = jax.eval_shape(model.init, rngs, images, images, labels, labels, words)
    variables = {name: variables[name] for name in ("params", "batch_stats") if name in variables}
    shapes = {"episodes": {"variables": variables}}
    if "fitted" in stores:
        (n_labels, d_words), (_, d) = (stores["fitted"][name].shape for name in ("words", "components"))
        n = features.shape[-1]
        sizes = {"mean": (n,), "components": (n, d), "words": (n_labels, d_words), "mapping": (n_labels, n)}
        shapes["fitted"] = {name: float32(size) for name, size in (sizes | {"offset": (n,)}).items()}
    return shapes


def _need_shapes(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    found, expected = (
        {key: array.shape for key, array in traverse_util.flatten_dict(dict(tree), sep="/").items()}
        for tree in (found, expected)
    )
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            there, wanted = (list(shapes[key]) if key in shapes else "absent" for shapes in (found, expected))
            what = f"{shown(key)} is {there}, expected {wanted}"
            raise InputError(f"{path} does not fit its config: {what}; copy it again")


def _need_usable(path: Path, name: str, method: Method, stores: Mapping[str, Any], features) -> None:
    """Traces a method whose stores have shapes of its own: what was altered is told here, not when photos are read."""
    some = jax.ShapeDtypeStruct((2, features.shape[1] * features.shape[2], features.shape[3]), jnp.float32)
    if method.words_from:  # CLIP's texts, or classes by each kind of text
        width = len(stores["classes"]["mean_logits"]) * (1 if "pooling" in stores["classes"] else class_words.N_SOURCES)
    else:
        width = word_width(stores)
    words = jax.ShapeDtypeStruct((2, width), jnp.float32)

    def scores(trained, features, words):
        images, labels = method.embed(trained, features), jnp.eye(2, dtype=bool)
        images = {**images, **method.embed_support(trained, images, labels, words)}
        return method.score(trained, method.fit(trained, images, labels, words), images)

    try:
        jax.eval_shape(scores, methods.trained_of(method, stores, 0.5), some, words)
    except Exception as error:  # JAX and Flax have many for shapes that do not fit, and KeyError
        why = f"{name}: {type(error).__name__}: {reason(error)}"
        raise InputError(f"{path} does not fit its config: {why}; copy it again") from error


def model_file(n_shot: int) -> str:
    """The name of the file with the stores."""
    return f"model_{n_shot}shot.safetensors"


def readable(path: Path) -> AbstractContextManager[None]:
    """Reports whatever fails when a file of a model is read."""
    return reported(f"{path} is missing, cut short or damaged", "copy it again, or run the training again")


def _json(path: Path) -> Any:
    with readable(path):
        return read_json(path)


def _read_tree(path: Path) -> dict[str, Any]:
    with readable(path):
        arrays = _finite(read_arrays(path)[0])
    return traverse_util.unflatten_dict({name: jnp.asarray(array) for name, array in arrays.items()}, sep="/")


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file, all of them finite."""
    with readable(path):  # besides its own errors, KeyError and others for number types that NumPy lacks
        return _finite(load_file(path))


def _finite(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinity")
    return arrays


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest without its own digest."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
