"""Which labels are train, validation and novel, and which images follow from that."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping

import numpy as np

from mlfsic_jax.data.dataset import SPLITS, Split
from mlfsic_jax.errors import InputError

POLICIES = ("exclusive", "leakfree")


def label_split(name: str) -> dict[str, tuple[str, ...]]:
    """The published label split of a benchmark, from ``label_splits.json`` (which also says where it is published).

    Args:
      name: the benchmark, e.g. ``"voc"``.

    Returns:
      ``{"train": names, "validation": names, "novel": names}``, spelled as the dataset spells them.

    Raises:
      InputError: no such benchmark.
    """
    text = importlib.resources.files("mlfsic_jax.data").joinpath("label_splits.json").read_text(encoding="utf-8")
    benchmarks = json.loads(text)
    if name not in benchmarks:
        raise InputError(f"no label split is known for {name!r}: use one of {', '.join(sorted(benchmarks))}")
    return {split: tuple(benchmarks[name][split]) for split in SPLITS}


def check_policy(policy: str) -> None:
    """Raises ``InputError`` if ``policy`` is not one of ``POLICIES``."""
    if policy not in POLICIES:
        raise InputError(f"policy {policy!r} is unknown: use one of {', '.join(POLICIES)}")


def split_images(
    labels: np.ndarray, label_columns: Mapping[str, np.ndarray], policy: str, ignored: np.ndarray | None = None
) -> dict[str, Split]:
    """Gives every image to the split that its labels allow, or to none.

    ``exclusive``: all labels of the image are labels of the split, and it has at least one.
    ``leakfree``: a novel image has a novel label; a validation image has a validation label and no novel one; a train
    image has a train label and neither a validation nor a novel one. Labels outside the three splits do not matter.

    Args:
      labels: bool [I, C].
      label_columns: ``{split: int [C_split]}``, disjoint columns of ``labels``; the columns keep this order.
      policy: ``"exclusive"`` or ``"leakfree"``.
      ignored: bool [I, C] or None; where it is true the image counts as not having the label. VOC's objects marked
        difficult are given here: they neither bring an image into a split nor keep it out of one.

    Returns:
      ``{"train": Split, "validation": Split, "novel": Split}``, images in ascending order. No image is in two splits.

    Raises:
      InputError: unknown policy.
      ValueError: arrays of the wrong shape or type, or label sets that overlap.
    """
    check_policy(policy)
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.dtype != bool:
        raise ValueError(f"labels must be bool [images, labels], got {labels.dtype} {list(labels.shape)}")
    if ignored is not None:
        if ignored.shape != labels.shape or ignored.dtype != bool:
            raise ValueError(f"ignored must be bool {list(labels.shape)}, got {ignored.dtype} {list(ignored.shape)}")
        labels = labels & ~ignored
    columns = {split: np.asarray(label_columns[split], np.int32) for split in SPLITS}
    every_column = np.concatenate(list(columns.values()))
    if len(np.unique(every_column)) != len(every_column):
        raise ValueError("a label is in two splits, or twice in one")

    has = {split: labels[:, columns[split]].any(axis=1) for split in SPLITS}  # each [I]
    if policy == "exclusive":
        n_labels = labels.sum(axis=1)
        member = {split: has[split] & (labels[:, columns[split]].sum(axis=1) == n_labels) for split in SPLITS}
    else:
        member = {
            "train": has["train"] & ~has["validation"] & ~has["novel"],
            "validation": has["validation"] & ~has["novel"],
            "novel": has["novel"],
        }
    return {split: Split(columns[split], np.flatnonzero(member[split]).astype(np.int32)) for split in SPLITS}
