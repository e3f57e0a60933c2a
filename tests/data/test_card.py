"""The data card of a small made-up dataset, to the letter."""

import types

import numpy as np
import pytest

from mlfsic_jax import data
from mlfsic_jax.data.dataset import ImageDataset, Split
from mlfsic_jax.system.errors import InputError


def small_dataset(**changes):
    labels = np.zeros((9, 6), bool)
    for image, columns in enumerate([[0, 1, 2, 3], [0], [0, 5], [1, 2], [4], [4, 0], [5, 4], [], [5]]):
        labels[image, columns] = True
    fields = {
        "name": "small",
        "label_names": ("cat", "dog", "cow", "hen", "tvmonitor", "headgear"),
        "display_names": (
            "cat",
            "dog",
            "cow",
            "hen",
            "tv monitor",
            "headband, head covering, hair accessory, other " * 2,
        ),
        "image_names": tuple(f"{i}" for i in range(9)),
        "labels": labels,
        "load_image": lambda i: np.zeros((2, 2, 3), np.uint8),
        "fingerprint": "0",
        "splits": {
            "train": Split(np.arange(4), np.array([0, 1, 3])),
            "validation": Split(np.array([4]), np.array([4, 5, 6])),
            "novel": Split(np.array([5]), np.array([], int)),
        },
        "notes": ("One note.", "another " * 20),
    }
    return ImageDataset(**{**fields, **changes})


def test_the_card_shows_splits_labels_and_notes():
    card = data.data_card(small_dataset())
    assert card.splitlines() == [
        "small: 9 images, 6 labels, 3 images in no split",
        "===============================================",
        "",
        "Images and labels of each split, and how many of its own labels an image has",
        "             images   labels     mean        1        2        3       4+",
        "train             3        4     2.33        1        1        0        1",
        "validation        3        1     1.00        3        0        0        0",
        "novel             0        1        -        0        0        0        0",
        "",
        "Images in which a label is positive",
        "label                                               train  validation       novel   whole set",
        "train labels",
        "  cat                                                   2           1           0           4",
        "  dog                                                   2           0           0           2",
        "  cow                                                   2           0           0           2",
        "  hen                                                   1           0           0           1",
        "validation labels",
        "  tv monitor                                            0           3           0           3",
        "novel labels",
        "  headband, head covering, hair accessory, ..           0           1           0           3",
        "",
        "Notes",
        "- One note.",
        "- " + ("another " * 12).strip(),
        "  " + ("another " * 8).strip(),
    ]
    assert max(map(len, card.splitlines())) <= 100


def test_labels_in_no_split_are_shown_and_missing_notes_are_not():
    splits = {
        split: Split(np.array([column]), np.arange(2)) for column, split in enumerate(("train", "validation", "novel"))
    }
    card = data.data_card(small_dataset(splits=splits, notes=()))
    assert "labels in no split\n  hen " in card
    assert "Notes" not in card


def test_load_builds_the_dataset_that_the_config_names():
    config = types.SimpleNamespace(name="scenes", image_size=32, images_per_split=(6, 6, 6), seed=0)
    assert data.load(config).name == "scenes"


def test_load_names_an_unknown_dataset():
    with pytest.raises(InputError, match="'vok' is unknown: use one of scenes, voc, coco, nus_wide, .*folder"):
        data.load(types.SimpleNamespace(name="vok", policy=""))
