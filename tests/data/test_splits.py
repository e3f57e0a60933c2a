"""The published label split and the two image policies."""

import importlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlfsic_jax.data.dataset import SPLITS
from mlfsic_jax.data.splits import POLICIES, auto_split, label_split, split_images
from mlfsic_jax.system.errors import InputError

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
    labels=hnp.arrays(bool, st.tuples(st.integers(0, 12), st.just(5))), policy=st.sampled_from(POLICIES), data=st.data()
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


@pytest.mark.parametrize(
    "name, counts",
    [("voc", (8, 6, 6)), ("coco", (52, 12, 16)), ("nus_wide", (52, 12, 17)), ("imaterialist", (18, 12, 16))],
)
def test_published_label_splits_are_partitions(name, counts):
    split = label_split(name)
    assert tuple(split) == SPLITS and tuple(map(len, split.values())) == counts
    labels = [label for part in split.values() for label in part]
    module = importlib.import_module(f"mlfsic_jax.data.{name}")
    assert len(labels) == len(set(labels)) == len(module.LABEL_NAMES) and set(labels) == set(module.LABEL_NAMES)


def test_published_label_splits_are_those_at_hand(shared):
    at_hand = json.loads((shared / "data" / "splits.json").read_text(encoding="utf-8"))
    for name in ("voc", "coco", "nus_wide", "imaterialist"):
        assert {part: list(labels) for part, labels in label_split(name).items()} == at_hand[name]


def test_an_automatic_split_keeps_the_rarest_label_alive():
    rng = np.random.default_rng(0)
    labels = rng.random((300, 8)) < 0.2
    labels[:, 3] = rng.random(300) < 0.9  # in the wrong split, this label would leave others with next to nothing
    names = tuple("abcdefgh")
    split = auto_split(names, labels, "leakfree", seed=1)
    assert sorted(name for part in split.values() for name in part) == list(names)
    assert [len(split[part]) for part in SPLITS] == [4, 2, 2] and "d" in split["train"]
    assert auto_split(names, labels, "leakfree", seed=1) == split != auto_split(names, labels, "leakfree", seed=2)


def test_an_automatic_split_never_has_a_single_label_to_evaluate():
    labels = np.eye(7, dtype=bool).repeat(4, axis=0)
    for n in (5, 6, 7):  # a quarter of them would be one
        split = auto_split(tuple("abcdefg"[:n]), labels[:, :n], "leakfree")
        assert [len(split[part]) for part in SPLITS] == [n - 4, 2, 2]
    for n in (1, 4):
        with pytest.raises(InputError, match="needs at least 5 labels, .*--config.data.split=FILE.*; found 'a'"):
            auto_split(tuple("abcd"[:n]), labels[:, :n], "leakfree")


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
