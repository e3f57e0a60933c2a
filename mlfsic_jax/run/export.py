"""A trained model as a folder that works on another machine, without the dataset; ``run.saved`` opens it."""

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mlfsic_jax import __version__
from mlfsic_jax.backbones import BACKBONES
from mlfsic_jax.backbones.clip_text import TextFiles
from mlfsic_jax.backbones.weights import load_text_encoder, save_weights, weights_files
from mlfsic_jax.data.minilm import FILES
from mlfsic_jax.data.words import EMBEDDINGS
from mlfsic_jax.run import inputs, ready, saved
from mlfsic_jax.run.inputs import CLIP, ENCODER
from mlfsic_jax.run.saved import BACKBONE, CARD, MANIFEST, WORDS, Predictor
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import atomic_folder, sha256, write_arrays, write_json, write_tree
from mlfsic_jax.system.untrusted import byte_lines, expand, read_npz

N_WORDS = 50_000


def export(
    workdir: str | os.PathLike[str] | None, out: str | os.PathLike[str], n_words: int = N_WORDS, **options: Any
) -> dict[str, Any]:
    """Writes a self-contained folder, in place of an earlier export; returns the content of ``model.json``.

    Besides vectors of the dataset's labels it carries the first, most frequent ``n_words`` words of the run's file; the
    model out of the box (without ``workdir``, with the ``options`` of ``ready.load``) its sentence encoder.
    Files that the user put beside an earlier export are kept. The folder is replaced whole, or not at all.

    Raises:
      InputError: ``workdir`` is no finished run, or ``out`` cannot be written or holds something else.
    """
    out, predictor = expand(out), ready.load(workdir, **options)
    if "files" in predictor.manifest:
        raise InputError(f"{workdir} is an exported folder already: copy it as it is")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out={out} is a file: give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise InputError(f"--out={out} holds something that is no export: give a new or empty folder")
    if Path.cwd().is_relative_to(out.resolve()):
        raise InputError(f"--out={out} holds the working folder, which cannot be replaced: give another folder")
    words = _words(predictor, n_words)
    try:
        target = out.resolve()  # of a link
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(target) as folder:
            manifest = _write_export(predictor, words, folder)
            _keep_others(target, folder)
    except OSError as error:
        raise InputError(f"--out={out} cannot be written: {error.strerror or error}") from error
    return manifest


def _keep_others(former: Path, folder: Path) -> None:
    """Copies what is not of an earlier export."""
    for path in former.iterdir() if former.is_dir() else ():
        if path.name in (MANIFEST, CARD, BACKBONE, WORDS, ENCODER, CLIP) or path.match("model_*shot.safetensors"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, folder / path.name, symlinks=True)
        else:
            shutil.copy2(path, folder / path.name, follow_symlinks=False)


def _write_export(predictor: Predictor, words: dict[str, np.ndarray], folder: Path) -> dict[str, Any]:
    """Writes all files; returns the manifest."""
    config = ConfigDict(predictor.config)
    for field in ("workdir", "cache_dir", "data_dir", "backbone_weights"):  # paths of this machine
        config[field] = ""
    config.data.source = config.data.prepared_dir = config.data.split = config.labels.vectors = ""
    for trained in predictor.trained:
        write_tree(folder / saved.model_file(trained.n_shot), trained.stores)
    if predictor.backbone_variables is not None:
        write_tree(folder / BACKBONE, predictor.backbone_variables)
    if predictor.word_files:
        write_arrays(folder / WORDS, words)
    if any(method.words_from for trained in predictor.trained for method in trained.methods.values()):
        _write_encoder(predictor.encoder, folder)
    written = (path for path in sorted(folder.rglob("*")) if path.is_file())
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in written}
    card = model_card(predictor.manifest, predictor.config, predictor.image_size, len(words))
    (folder / CARD).write_text(card, encoding="utf-8")  # of which there is no digest: its owner may edit it
    manifest = {"format": saved.FORMAT, "mlfsic_jax": __version__} | dict(predictor.manifest)
    manifest |= {"config": config.to_dict(), "card": card, "files": files}
    manifest |= {"sha256": saved.manifest_digest(manifest)}
    write_json(folder / MANIFEST, manifest)
    return manifest


def _write_encoder(encoder: Path | TextFiles, folder: Path) -> None:
    """Writes what encodes names, unless that is the word vectors."""
    if isinstance(encoder, TextFiles):
        (folder / CLIP).mkdir()
        module, variables = load_text_encoder(encoder.weights)
        save_weights(folder / CLIP / "model.safetensors", variables, module)
        shutil.copyfile(encoder.tokenizer, folder / CLIP / "tokenizer.json")
    elif not encoder.is_file():
        (folder / ENCODER).mkdir()
        for name in FILES:
            shutil.copyfile(encoder / name, folder / ENCODER / name)


def _words(predictor: Predictor, n_words: int) -> dict[str, np.ndarray]:
    """Vectors by name: of the dataset's labels float32, of other words float16."""
    if not predictor.word_files:
        return {}
    vectors = saved.load_arrays(predictor.word_files[0])
    dimension = saved.word_width(predictor.trained[0].stores)
    embedding = EMBEDDINGS.get(predictor.config.labels.embedding)
    if embedding is None or not embedding.source:
        return vectors
    path = predictor.word_files[1]
    if not path.is_file():
        raise InputError(f"the word vectors {path} are missing: work in the folder where the model was trained")
    with saved.readable(path), np.errstate(over="ignore"):
        words = itertools.islice(_words_of(path, dimension, n_words), n_words)
        half = {word: np.asarray(vector, np.float16) for word, vector in words}
    return {word: vector for word, vector in half.items() if np.isfinite(vector).all()} | vectors


def _words_of(path: Path, dimension: int, n_words: int) -> Iterator[tuple[str, np.ndarray]]:
    """The words of a file of word vectors in its order, of the kinds that ``words.load_word_vectors`` reads."""
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".bin":
        from gensim.models import KeyedVectors

        vectors = KeyedVectors.load_word2vec_format(str(path), binary=True, limit=n_words, unicode_errors="replace")
        yield from ((word, vectors[word]) for word in vectors.index_to_key)
    elif kind in (".npz", ".safetensors"):
        yield from saved.load_arrays(path).items() if kind == ".safetensors" else read_npz(path)
    else:
        for _, line in byte_lines(path):
            word, *numbers = line.rsplit(b" ", dimension)
            with contextlib.suppress(UnicodeDecodeError):  # published files have such entries
                if len(numbers) == dimension:  # not so in the first line of some files
                    yield word.decode(), np.array(numbers, np.float32)


def model_card(manifest: Mapping[str, Any], config, image_size: int, n_words: int) -> str:
    """The model in plain words, as Markdown: what it was trained on, its scores and licences."""
    if manifest.get("ready"):
        return _ready_card(manifest, config, image_size)
    spec, embedding = BACKBONES[config.backbone], EMBEDDINGS.get(config.labels.embedding)
    labels, dataset = manifest["labels"], config.data.name
    scenes, trained = "", "trained with the model" if config.train_backbone else "frozen"
    if dataset == "scenes":
        scenes = "- These are generated scenes with made-up word vectors, for a demonstration: it knows no photos.\n"
    words = f"Only the dataset's labels have vectors here ({config.labels.embedding})."
    if n_words > sum(map(len, labels.values())):
        words = f"""{n_words} labels and words have vectors here ({config.labels.embedding}), which may make up the
names of your labels."""
    backbone = "trained from random weights."
    if not config.train_backbone or config.backbone_weights:
        names = ", ".join(file.name for file in weights_files(inputs.weights_path(config)))
        backbone = f"""{names}, sha256 {manifest["identity"]["weights"]}. Published weights of this
  architecture: {spec.pretrained or "none"}."""
    return f"""# {dataset}, {config.backbone}: labels for photos from a few examples

Give it 1 to 5 photos of each of your own labels, and it says which of the labels another photo has:

    python -m mlfsic_jax.predict --workdir=THIS_FOLDER --support=support.csv --images=PHOTOS --out=labels.csv

Written by mlfsic_jax {__version__}.

## What it was trained on

- Dataset {dataset}, {len(labels["train"])} labels: {", ".join(labels["train"])}.
- Chosen and calibrated on {len(labels["validation"])} others: {", ".join(labels["validation"])}.
- Backbone {config.backbone}, photos at {image_size} x {image_size}, {trained}.
{scenes}
## Scores

On {len(labels["novel"])} labels that it was not trained on: {", ".join(labels["novel"])}. In %,
mean ± 95 % interval over episodes; ECE is the calibration error; F1 at probability 0.5.
{"".join(map(_scores, manifest["models"]))}
## Words

{words}
Labels of other words need --vectors=FILE, or --method=ridge or prototypes, which need no words.

## Licences

- Backbone: {backbone}
- Word vectors: {embedding.licence if embedding else "of the dataset"}.
- No photo is in this folder; the terms of the photos that it was trained on may still concern you.
"""


def _ready_card(manifest: Mapping[str, Any], config, image_size: int) -> str:
    return f"""# {config.backbone}: labels for photos from names and a few examples

Name your labels, and if you like give it a few photos of each:

    python -m mlfsic_jax.predict --workdir=THIS_FOLDER --labels="cat,dog" --images=PHOTOS --out=labels.csv

Written by mlfsic_jax {__version__}.

## How it works

A name reaches the 1,000 ImageNet classes that {config.backbone} was trained on, by how near their texts
are to it; photos correct what comes of that. Labels are not new to it, as far as ImageNet has classes of their kind.
Photos at {image_size} x {image_size}. Probabilities were calibrated on photos of VOC 2007 and COCO.

## Licences

- Backbone: sha256 {manifest["identity"]["weights"]}. Published weights of this architecture:
  {BACKBONES[config.backbone].pretrained}.
- Sentence encoder: all-MiniLM-L6-v2, Apache-2.0. Texts of the classes: WordNet 3.0.
"""


def _scores(entry: Mapping[str, Any]) -> str:
    title = f"{entry['n_shot']}-shot, {entry['episodes']} episodes"
    lines = ["", f"| {title} | Ma-AP | Ma-F1 | ECE | Ma-AP on validation |", "|---|---|---|---|---|"]
    for name, scores in entry["methods"].items():
        cells = [f"{100 * scores[m]['mean']:.1f} ± {100 * scores[m]['ci95']:.1f}" for m in ("macro_ap", "macro_f1")]
        cells += [f"{100 * entry[part][name]:.1f}" for part in ("calibration_error", "validation_macro_ap")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
