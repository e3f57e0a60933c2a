"""The model out of the box: any labels from their names and a few photos, no dataset and no training.

A frozen network with its own ImageNet classifier and a sentence encoder, both published; ``methods.class_words`` does
the rest. What it needs besides photos comes with the package.
"""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from mlfsic_jax.backbones import BACKBONES
from mlfsic_jax.data import assets, class_words, download
from mlfsic_jax.run import classifier, inputs, saved
from mlfsic_jax.run import config as defaults
from mlfsic_jax.run.saved import Predictor, Trained
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import expand

METHOD = "class_word_ridge"
# name -> backbone and side of the photos in pixels
QUALITIES = {
    "standard": ("efficientnet_lite0", 320),
    "high": ("efficientnet_lite2", 384),
    "highest": ("efficientnet_lite0_lite2", 384),
}
# Photos per label -> slope and intercept of the probabilities, and Ma-AP, all from validation labels: logistic
# regression on episodes of 2 to 6 labels, means over VOC and COCO.
_CHOSEN = {0: ((17.2, -2.56), 0.897), 1: ((14.0, -2.6), 0.902), 5: ((13.0, -2.9), 0.908)}


def load(
    path: str | os.PathLike[str] | None = None,
    n_shot: int | None = None,
    *,
    quality: str = "standard",
    data_dir: str | os.PathLike[str] = "data",
    fetch: bool = False,
) -> Predictor:
    """Opens a model: without ``path`` the one out of the box, else as ``saved.load`` does.

    Args:
      path: the workdir of a training run, or a folder that ``export`` wrote.
      n_shot: only the model for this shot count.
      quality: of the model out of the box: "standard", or "high" and "highest", slower and a little better.
      data_dir: where its published files are.
      fetch: whether to download those that are missing.

    Raises:
      InputError: the folder holds no model, or files are missing; the message says what to run.
    """
    if path is not None:
        if quality != "standard":
            raise InputError(f"quality {quality!r} is of the model out of the box, not of {path}: leave it out")
        return saved.load(path, n_shot)
    if quality not in QUALITIES:
        raise InputError(f"quality {quality!r} is unknown: use one of {', '.join(QUALITIES)}")
    (name, size), folder = QUALITIES[quality], expand(data_dir)
    if n_shot not in (None, *_CHOSEN):
        raise InputError(
            f"the model out of the box is for {', '.join(map(str, _CHOSEN))} photos per label, not {n_shot}"
        )
    _need_files(name, folder, fetch)
    config = defaults.default()
    config.backbone, config.data.image_size, config.data_dir, config.augment = name, size, str(folder), False
    config.data.name, config.eval.methods = "folder", (METHOD,)
    backbone, variables, digest = inputs.load_backbone(config)
    grid = inputs.shapes(backbone, size).features.shape[1:3]
    leaves = (*inputs.classifier_head(config), *class_words.backbone_means(name, size))
    stores = {"classes": dict(zip(("weight", "bias", "mean", "mean_logits"), map(jnp.asarray, leaves), strict=True))}
    methods = {METHOD: defaults.create_methods(config, 1, (METHOD,))[METHOD].explaining()}
    trained, entries = [], []
    for k, (calibration, ap) in _CHOSEN.items():
        if n_shot in (None, k):
            chosen = {"tuned": {}, "calibration": {METHOD: calibration}, "validation_macro_ap": {METHOD: ap}}
            trained.append(Trained(k, methods, stores, {}, chosen["calibration"], chosen["validation_macro_ap"]))
            entries.append({"n_shot": k} | chosen)
    identity = {"weights": digest}
    manifest = {"ready": True, "config": config.to_dict(), "identity": identity, "labels": {}, "models": entries}
    fixed = (FrozenConfigDict(config), backbone, variables, size, grid, tuple(trained))
    predictor = Predictor(folder, manifest, *fixed, word_files=(), encoder=inputs.encoder_folder(config))
    # Compiles what all labels and photos share, so that they take moments.
    classifier.fit(predictor, [], [], label_names=("photo", "picture")).predict(np.zeros((1, 1, 3), np.uint8))
    return predictor


def _need_files(backbone: str, folder: Path, fetch: bool) -> None:
    """Downloads what is missing, or says in one line what to run."""
    table, names = assets.with_backbones(BACKBONES), (backbone, "minilm")
    missing = [name for name in names if not all(assets.local(asset, folder) for asset in table[name])]
    if not missing:
        return
    wanted = assets.find(missing, table)
    sizes = sum(asset.size or asset.about for asset in wanted)
    if not fetch:
        where = "" if str(folder) == "data" else f" --data_dir={folder}"
        raise InputError(
            f"the model out of the box needs {' and '.join(missing)} in {folder}, {sizes / 1e6:.0f} MB to download: "
            f"run python -m mlfsic_jax.fetch {' '.join(missing)}{where}"
        )
    for name in missing:
        print(assets.describe(name, table[name]), flush=True)
    download.fetch_and_unpack(wanted, folder)
