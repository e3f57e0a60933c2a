"""Which labels are train, validation and novel, and which images follow from that."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from mlfsic_jax.data.dataset import SPLITS, Split
from mlfsic_jax.data.text import package_json
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import expand, label_name, read_json, reported

POLICIES = ("exclusive", "leakfree")
_EVALUATED, _LEAST = ("validation", "novel"), 2  # labels: of a single one, every photo of an episode is positive
_AUTO_DRAWS = 200
_MOST_LISTED = 20  # labels in a message


def _benchmark(name: str) -> dict[str, list[str]]:
    """Labels and published split, with its source; ``InputError`` for an unknown benchmark."""
    benchmarks = package_json("label_splits.json")
    if name not in benchmarks:
        raise InputError(f"no label split is known for {name!r}: use one of {', '.join(sorted(benchmarks))}")
    return benchmarks[name]


def benchmark_labels(name: str) -> tuple[str, ...]:
    """The labels of a benchmark, in the order and spelling of the dataset."""
    return tuple(_benchmark(name)["labels"])


def label_split(name: str) -> dict[str, tuple[str, ...]]:
    """The published label split of a benchmark such as "voc": train, validation, novel -> names in its spelling."""
    benchmark = _benchmark(name)
    return {split: tuple(benchmark[split]) for split in SPLITS}


def read_label_split(path: str | os.PathLike[str], label_names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Reads a user's label split, JSON of the form that ``label_split`` returns; labels may be left out.

    ``InputError`` when it cannot be read, has a split without labels or an evaluation split with one, where chance is
    100 %, or names a label twice or an unknown one.
    """
    where = f'{os.fspath(path)} must be JSON with the lists "train", "validation" and "novel"'
    with (
        reported(f"config.data.split = {os.fspath(path)!r} cannot be read", "check the path", OSError),
        reported(where, "correct it", (ValueError, KeyError, TypeError)),
    ):
        content = read_json(expand(path))
        if not all(isinstance(content[name], list) for name in SPLITS):
            raise TypeError("one of them is no list")
        split = {name: tuple(label_name(label, os.fspath(path)) for label in content[name]) for name in SPLITS}
    labels = [label for name in SPLITS for label in split[name]]
    for name in SPLITS:
        if not split[name]:
            raise InputError(f"{path} has no {name} label")
    for label in labels:
        if label not in label_names:
            raise InputError(
                f"{path} names the label {label!r}, which the dataset does not have: {_listed(label_names)}"
            )
        if labels.count(label) > 1:
            raise InputError(f"{path} names the label {label!r} twice")
    for name in _EVALUATED:
        if len(split[name]) < _LEAST:
            raise InputError(f"{path} has one {name} label, with which chance is 100 %: name at least {_LEAST}")
    return split


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_MOST_LISTED])) + (", .." * (len(names) > _MOST_LISTED))


class TooFewLabels(InputError):
    """There are too few labels for an automatic split."""


def auto_split(
    label_names: Sequence[str], labels: np.ndarray, policy: str, seed: int = 0
) -> dict[str, tuple[str, ...]]:
    """Splits C labels at random: half train, a quarter each validation and novel (at least two each).

    A label of most photos can empty the other splits, so the best of 200 random splits is taken: the one whose rarest
    label keeps most images. ``labels`` and ``policy`` are as in ``split_images``. ``InputError`` for fewer than five.
    """
    n_labels = len(label_names)
    least = 1 + _LEAST * len(_EVALUATED)
    if n_labels < least:
        needs = f"1 to train and {_LEAST} each for validation and novel (--config.data.split=FILE chooses which)"
        raise TooFewLabels(f"an automatic split needs at least {least} labels, {needs}; found {_listed(label_names)}")
    n_held_out = max(_LEAST, n_labels // 4)
    rng = np.random.default_rng(seed)
    best, best_rarest = None, -1
    for _ in range(_AUTO_DRAWS):
        order = rng.permutation(n_labels)
        validation, novel, train = map(np.sort, np.split(order, [n_held_out, 2 * n_held_out]))
        columns = {"train": train, "validation": validation, "novel": novel}
        splits = split_images(labels, columns, policy)
        rarest = min(int(labels[np.ix_(s.images, s.labels)].sum(axis=0).min()) for s in splits.values())
        if rarest > best_rarest:
            best, best_rarest = columns, rarest
    return {name: tuple(label_names[c] for c in best[name]) for name in SPLITS}


def laso_split(labels: np.ndarray, label_columns: Mapping[str, np.ndarray], in_training_set: np.ndarray) -> dict:
    """The protocol of LaSO (Alfassy et al. 2019) on COCO: 64 seen labels, 16 novel ones, COCO's own two image sets.

    Training images are those of train2014 without a novel label. Novel episodes draw their support from train2014's
    images with a novel label; their queries are all images of val2014 with one. LaSO has no validation labels: ours are
    12 of the seen labels, on val2014's images without a novel label.

    Takes bool [I, C], the 52/12/16 split, and bool [I], whether an image is from train2014; the novel ``Split`` has
    ``support``.
    """
    seen = np.concatenate([label_columns["train"], label_columns["validation"]])
    has_novel = labels[:, label_columns["novel"]].any(axis=1)
    images = {
        "train": in_training_set & ~has_novel & labels[:, seen].any(axis=1),
        "validation": ~in_training_set & ~has_novel & labels[:, label_columns["validation"]].any(axis=1),
        "novel": has_novel,
    }
    columns = {"train": seen, "validation": label_columns["validation"], "novel": label_columns["novel"]}
    splits = _splits(columns, images)
    splits["novel"] = splits["novel"]._replace(support=in_training_set[splits["novel"].images])
    return splits


def check_policy(policy: str) -> None:
    """Raises ``InputError`` if ``policy`` is not one of ``POLICIES``."""
    if policy not in POLICIES:
        raise InputError(f"policy {policy!r} is unknown: use one of {', '.join(POLICIES)}")


def split_images(
    labels: np.ndarray, label_columns: Mapping[str, np.ndarray], policy: str, ignored: np.ndarray | None = None
) -> dict[str, Split]:
    """Assigns every image to one split or to none, by its labels.

    ``exclusive``: the image has labels of one split only.
    ``leakfree``: a novel image has a novel label; a validation image has a validation label and no novel one; a train
    image has a train label and no other. Labels outside the three splits do not matter.

    ``labels`` are bool [I, C]; ``label_columns`` gives the disjoint columns of the splits, kept in this order;
    ``ignored``, bool [I, C], is true where a label does not count, as for VOC's difficult objects.

    Returns:
      Split name -> ``Split``, images in ascending order.

    Raises:
      InputError: unknown policy.
      ValueError: arrays of the wrong shape or type, or overlapping label sets.
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

    train, validation, novel = (labels[:, columns[split]].any(axis=1) for split in SPLITS)  # each [I]
    if policy == "leakfree":
        member = {"train": train & ~validation & ~novel, "validation": validation & ~novel, "novel": novel}
    else:
        own, n_labels = {split: labels[:, columns[split]].sum(axis=1) for split in SPLITS}, labels.sum(axis=1)
        member = {split: (own[split] > 0) & (own[split] == n_labels) for split in SPLITS}
    return _splits(columns, member)


def _splits(columns: Mapping[str, np.ndarray], member: Mapping[str, np.ndarray]) -> dict[str, Split]:
    """Splits from label columns int [C_split] and bool [I], whether an image belongs to them."""
    return {
        name: Split(columns[name].astype(np.int32), np.flatnonzero(member[name]).astype(np.int32)) for name in SPLITS
    }
