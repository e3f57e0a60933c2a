"""The published label split and the two image policies."""

import json
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlfsic_jax.data.dataset import SPLITS
from mlfsic_jax.data.splits import POLICIES, label_split, split_images
from mlfsic_jax.errors import InputError

COLUMNS = {"train": np.array([0, 3]), "validation": np.array([1]), "novel": np.array([4])}  # column 2 is in no split


def membership_by_loop(labels, policy):
    """The definition of the policies, image by image, with sets."""
    members = {split: [] for split in SPLITS}
    sets = {split: set(COLUMNS[split].tolist()) for split in SPLITS}
    for i, row in enumerate(labels):
        mine = set(np.flatnonzero(row).tolist())
        if policy == "exclusive":
            for split in SPLITS:
                if mine and mine <= sets[split]:
                    members[split].append(i)
        elif mine & sets["novel"]:
            members["novel"].append(i)
        elif mine & sets["validation"]:
            members["validation"].append(i)
        elif mine & sets["train"]:
            members["train"].append(i)
    return members


@settings(max_examples=40, deadline=None)
@given(
    labels=hnp.arrays(bool, st.tuples(st.integers(0, 12), st.just(5))),
    policy=st.sampled_from(POLICIES),
    data=st.data(),
)
def test_images_go_where_a_plain_loop_sends_them(labels, policy, data):
    ignored = data.draw(hnp.arrays(bool, labels.shape))
    splits = split_images(labels, COLUMNS, policy, ignored)
    expected = membership_by_loop(labels & ~ignored, policy)
    for split in SPLITS:
        assert splits[split].images.tolist() == expected[split]
        assert splits[split].images.dtype == np.int32 and splits[split].labels.dtype == np.int32
        np.testing.assert_array_equal(splits[split].labels, COLUMNS[split])


def test_leakfree_keeps_every_later_label_out_of_the_earlier_splits():
    labels = np.array([[1, 0, 1, 0, 0], [1, 1, 0, 0, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    splits = split_images(labels, COLUMNS, "leakfree")
    assert [splits[split].images.tolist() for split in SPLITS] == [[0], [1], [2]]


def test_a_difficult_object_does_not_keep_an_image_out_of_the_train_split():
    labels = np.array([[1, 0, 0, 0, 1]], bool)
    difficult = np.array([[0, 0, 0, 0, 1]], bool)
    assert split_images(labels, COLUMNS, "leakfree")["novel"].images.tolist() == [0]
    assert split_images(labels, COLUMNS, "leakfree", difficult)["train"].images.tolist() == [0]


def test_voc_label_split_is_a_partition_of_twenty_labels():
    split = label_split("voc")
    assert {name: len(labels) for name, labels in split.items()} == {"train": 8, "validation": 6, "novel": 6}
    assert len(set().union(*split.values())) == 20
    assert split["novel"] == ("cat", "dog", "pottedplant", "sheep", "sofa", "tvmonitor")


def test_mistakes_are_named():
    with pytest.raises(InputError, match="'vog'.*voc"):
        label_split("vog")
    with pytest.raises(InputError, match="'strict'.*exclusive, leakfree"):
        split_images(np.zeros((1, 5), bool), COLUMNS, "strict")
    with pytest.raises(ValueError, match="bool"):
        split_images(np.zeros((1, 5)), COLUMNS, "leakfree")
    with pytest.raises(ValueError, match="ignored"):
        split_images(np.zeros((1, 5), bool), COLUMNS, "leakfree", np.zeros((1, 4), bool))
    with pytest.raises(ValueError, match="two splits"):
        split_images(np.zeros((1, 5), bool), {**COLUMNS, "novel": np.array([0])}, "leakfree")


def test_exclusive_gives_the_known_image_counts_on_coco_2014():
    shared = pathlib.Path(os.environ.get("MLFSIC_SHARED", "../shared")) / "data"
    if not (shared / "coco2014_labels80.npz").is_file() or not (shared / "splits.json").is_file():
        pytest.skip(f"COCO's label matrix is not at {shared}; set MLFSIC_SHARED to the folder that holds data/")
    with np.load(shared / "coco2014_labels80.npz") as archive:
        labels, names = archive["labels"].astype(bool), archive["names"].tolist()
    label_sets = json.loads((shared / "splits.json").read_text(encoding="utf-8"))["coco"]
    columns = {split: np.array([names.index(name) for name in label_sets[split]]) for split in SPLITS}

    splits = split_images(labels, columns, "exclusive")

    assert [len(splits[split].images) for split in SPLITS] == [26690, 8306, 3934]
    novel = labels[np.ix_(splits["novel"].images, splits["novel"].labels)].sum(axis=0)
    assert (label_sets["novel"][novel.argmin()], novel.min()) == ("backpack", 14)
