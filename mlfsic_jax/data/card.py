"""The data card: the contents of a dataset and its splits as plain text."""

import textwrap
from collections.abc import Iterator

import numpy as np

from mlfsic_jax.data.dataset import SPLITS, ImageDataset

WIDTH = 100
LABEL_WIDTH = 44


def data_card(dataset: ImageDataset) -> str:
    """A plain-text card of at most 100 columns, without a final newline.

    It counts the images and labels of each split, the split's own labels per image (mean, and images with 1, 2, 3, or 4
    and more), and the images of each split in which every label is positive.
    """
    n_images, n_labels = dataset.labels.shape
    used = np.unique(np.concatenate([dataset.splits[split].images for split in SPLITS]))
    title = f"{dataset.name}: {_count(n_images, 'image')}, {_count(n_labels, 'label')}"
    if len(used) < n_images:
        title += f", {_count(n_images - len(used), 'image')} in no split"
    lines = [title, "=" * len(title), ""]
    lines.append("Images and labels of each split, and how many of its own labels an image has")
    header = ["", "images", "labels", "mean", "1", "2", "3", "4+"]
    lines += _table([header, *(_split_row(dataset, split) for split in SPLITS)], width=9)
    lines += ["", "Images in which a label is positive"]
    lines += _table([["label", *SPLITS, "whole set"], *_label_rows(dataset)], width=12)
    if dataset.notes:
        lines += ["", "Notes"]
        for note in dataset.notes:
            lines += textwrap.wrap(note, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(line.rstrip() for line in lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _split_row(dataset: ImageDataset, split: str) -> list[str]:
    own_labels = dataset.split_labels(split).sum(axis=1)  # [I_split]
    mean = f"{own_labels.mean():.2f}" if len(own_labels) else "-"
    numbers = np.bincount(np.minimum(own_labels, 4), minlength=5)[1:]
    return [split, str(len(own_labels)), str(len(dataset.splits[split].labels)), mean, *map(str, numbers)]


def _label_rows(dataset: ImageDataset) -> Iterator[list[str]]:
    counts = [dataset.labels[dataset.splits[split].images].sum(axis=0) for split in SPLITS]  # each [C]
    counts = np.stack([*counts, dataset.labels.sum(axis=0)], axis=1)
    groups = {f"{split} labels": dataset.splits[split].labels.tolist() for split in SPLITS}
    groups["labels in no split"] = sorted({*range(len(dataset.label_names))}.difference(*groups.values()))
    for title, columns in groups.items():
        if columns:
            yield [title]
        for column in columns:
            name = textwrap.shorten(dataset.display_names[column], LABEL_WIDTH, placeholder=" ..")
            yield [f"  {name}", *map(str, counts[column])]


def _table(rows: list[list[str]], width: int) -> list[str]:
    """Left-aligned first column, right-aligned numbers ``width`` apart."""
    first = max(len(row[0]) for row in rows)
    return [row[0].ljust(first) + "".join(cell.rjust(width) for cell in row[1:]) for row in rows]
