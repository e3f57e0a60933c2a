"""Image datasets: ``load`` reads any of them by name."""

import importlib
from types import ModuleType
from typing import Any

import numpy as np

from mlfsic_jax.data import prepared, scenes, splits
from mlfsic_jax.data.card import data_card
from mlfsic_jax.data.dataset import SPLITS, ImageDataset, Split
from mlfsic_jax.system.errors import InputError

__all__ = ["DATASETS", "PHOTO_DATASETS", "ImageDataset", "Split", "data_card", "is_available", "layout", "load"]

PHOTO_DATASETS = ("voc", "coco", "nus_wide", "imaterialist", "folder")
DATASETS = ("scenes", *PHOTO_DATASETS)


def load(config: Any) -> ImageDataset:
    """Loads the dataset ``config.name``; ``InputError`` for an unknown name or unusable input.

    ``config`` is the data section of a config: "scenes" reads image_size, images_per_split and seed; the others source,
    prepared_dir, policy, split and seed.
    """
    if config.name == "scenes":
        return scenes.load(image_size=config.image_size, images_per_split=config.images_per_split, seed=config.seed)
    module = _module(config.name)
    policy = config.policy or usual_policy(config.name)
    laso = policy == "laso"
    if laso and config.name != "coco":
        raise InputError(f"config.data.policy = 'laso' is a protocol for COCO, not for {config.name}")
    if not laso:
        splits.check_policy(policy)
    copy = prepared.open_or_prepare(config.name, config.source, config.prepared_dir, module.scan, module.LAYOUT)
    names = tuple(copy.label_names.tolist())
    if config.split == "auto":
        label_sets = splits.auto_split(names, copy.labels, "exclusive" if laso else policy, config.seed)
    elif config.split == "none":
        label_sets = dict.fromkeys(SPLITS, ())
    elif config.split:
        label_sets = splits.read_label_split(config.split, names)
    else:
        label_sets = splits.label_split(config.name)
    columns = {split: np.array([names.index(name) for name in label_sets[split]], int) for split in SPLITS}
    if laso:
        in_training_set = np.char.startswith(copy.names, f"{module.TRAINING_SET}/")
        image_splits = splits.laso_split(copy.labels, columns, in_training_set)
    else:
        image_splits = splits.split_images(copy.labels, columns, policy, copy.ignored)
    unreadable = {str(copy.names[i]): str(copy.unreadable[i]) for i in np.flatnonzero(copy.unreadable != "")}
    return ImageDataset(
        name=config.name,
        label_names=names,
        display_names=tuple(module.DISPLAY_NAMES.get(name, name.replace("_", " ")) for name in names),
        image_names=tuple(copy.names.tolist()),
        labels=copy.labels,
        load_image=prepared.photos(copy),
        fingerprint=prepared.digest([copy.digest, names, copy.names.tolist(), np.packbits(copy.labels).tobytes()]),
        splits=image_splits,
        notes=(
            *copy.notes.tolist(),
            f"Images are chosen by the {policy!r} policy.",
            f"Images without any positive label: {int((~copy.labels.any(axis=1)).sum())}.",
            f"Photos that cannot be read: {len(unreadable)}.",
        ),
        unreadable=unreadable,
    )


def is_available(config: Any) -> bool:
    """Whether there is data to load: generated, a source folder, or a prepared copy."""
    return config.name == "scenes" or prepared.is_available(config.name, config.source, config.prepared_dir)


def layout(name: str) -> str:
    """Says in a sentence how to get a dataset of photos and how to arrange its folder."""
    return _module(name).LAYOUT


def usual_policy(name: str) -> str:
    """Which images a split may use where a config does not say; "" for generated data."""
    return "" if name == "scenes" else _module(name).POLICY


def _module(name: str) -> ModuleType:
    if name not in PHOTO_DATASETS:
        raise InputError(f"dataset {name!r} is unknown: use one of {', '.join(DATASETS)}")
    return importlib.import_module(f"mlfsic_jax.data.{name}")
