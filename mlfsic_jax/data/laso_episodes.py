"""LaSO's own episodes (Alfassy et al. 2019): ten supports of 1 and ten of 5 images for each of COCO's novel labels.

The authors published them in ``data_for_augmentation/`` of github.com/leokarlin/LaSO, as two pickles each:
``<K>shotRun<R>ClassIdxDict.pkl`` leads from labels to lists of images, ``<K>shotRun<R>UsedIndices.pkl`` lists them all.
A label is its place among COCO's 80 in the order of their ids, an image its place in instances_train2014.json.
"""

import dataclasses
import io
import itertools
import os
import pathlib
import pickle
import pickletools
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlfsic_jax.data import coco
from mlfsic_jax.data.dataset import ImageDataset
from mlfsic_jax.data.splits import label_split
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import expand, reported, shown

SHOTS, RUNS = (1, 5), 10
_MOST_BYTES = 1 << 15  # of a pickle; a list of 80 images takes one or two thousand
_GET = "give the folder data_for_augmentation/ of github.com/leokarlin/LaSO as it is"


def with_published_supports(
    dataset: ImageDataset, folder: str | os.PathLike[str], source: str | os.PathLike[str]
) -> ImageDataset:
    """COCO under LaSO's protocol, with the supports of the pickles in ``folder`` in the place of random ones.

    ``support`` of the novel split becomes a structured array [I_split]: field "pool" is what it was, bool, and fields
    "1" and "5", bool [10], tell for a number of shots in which runs an image is support. ``source`` is COCO's own
    folder, whose instances file gives the order of the images.

    Raises:
      InputError: a file is missing or is no such pickle; its labels are not LaSO's novel ones; an image lacks the label
        that it is listed for, or cannot be read; there are not K images for each label.
    """
    folder, names, novel = expand(folder), coco.training_images(expand(source)), dataset.splits["novel"]
    support = np.zeros(len(novel.images), [("pool", bool), *((str(n_shot), bool, RUNS) for n_shot in SHOTS)])
    support["pool"] = novel.support
    for n_shot, run in itertools.product(SHOTS, range(RUNS)):
        path = folder / f"{n_shot}shotRun{run + 1}ClassIdxDict.pkl"
        rows = _rows(path, names, dataset)
        counts = dataset.labels[np.ix_(rows, novel.labels)].sum(axis=0)
        if counts.min() < n_shot or len(rows) > n_shot * len(counts):
            found = f"{len(rows)} images, with {counts.min()} of the rarest label"
            raise InputError(f"{path} lists {found}, which is no support of {n_shot} for each label: {_GET}")
        support[str(n_shot)][:, run] = np.isin(novel.images, rows)
    note = f"Supports of 1 and 5 images per label: the {RUNS} each of LaSO's authors, from {folder}."
    splits = {**dataset.splits, "novel": novel._replace(support=support)}
    return dataclasses.replace(dataset, splits=splits, notes=(*dataset.notes, note))


def _rows(path: pathlib.Path, names: Sequence[str], dataset: ImageDataset) -> list[int]:
    """The images of a run as rows of the dataset, once each; all have the labels that they are listed for."""
    row_of, rows = {name: row for row, name in enumerate(dataset.image_names)}, set()
    for label, places in _places(path, len(names)).items():
        column = dataset.label_names.index(label)
        for name in (names[place] for place in places):
            row = row_of.get(name)
            if row is None or not dataset.labels[row, column]:
                hint = f"is this file, or COCO's instances_{coco.TRAINING_SET}.json, not the official one?"
                raise InputError(f"{path} lists {name} for {label!r}, a label that it does not have: {hint}")
            if name in dataset.unreadable:
                raise InputError(f"{path} lists {name}, which cannot be read: get that photo again")
            rows.add(row)
    return sorted(rows)


def _places(path: pathlib.Path, n_images: int) -> dict[str, list[int]]:
    """Novel label -> its images, from the two files of a run, which must agree."""
    by_label, used_file = _unpickle(path), path.with_name(path.name.replace("ClassIdxDict", "UsedIndices"))
    used, novel = _unpickle(used_file), {coco.LABEL_NAMES.index(name): name for name in label_split("coco")["novel"]}
    if not isinstance(by_label, dict) or by_label.keys() != novel.keys():
        found = shown(list(by_label) if isinstance(by_label, dict) else by_label)
        raise InputError(f"{path} is of the labels {found}, not of LaSO's 16 novel ones, {sorted(novel)}: {_GET}")
    for file, places in ((used_file, used), *((path, places) for places in by_label.values())):
        wrong = [p for p in places if type(p) is not int or not 0 <= p < n_images] if type(places) is list else [places]
        if wrong:
            raise InputError(f"{file} lists {shown(wrong[0])}, none of the {n_images:,} training images: {_GET}")
    if set(used) != set(itertools.chain(*by_label.values())):
        raise InputError(f"{used_file} lists other images than {path.name}: {_GET}")
    return {novel[place]: places for place, places in by_label.items()}


def _unpickle(path: pathlib.Path) -> Any:
    """Dicts, lists, tuples, texts and numbers of a pickle; ``InputError`` for anything else."""
    with reported(f"{path} cannot be read", _GET), open(path, "rb") as file:
        pickled = file.read(_MOST_BYTES + 1)
        if len(pickled) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        for opcode, argument, _ in pickletools.genops(pickled):
            # The unpickler allocates as many places as the highest place to put a value in.
            most = len(pickled) if "PUT" in opcode.name else 1 << 63
            if isinstance(argument, int) and abs(argument) > most:
                raise ValueError(f"the number of its instruction {opcode.name} is too large")
        return _Unpickler(io.BytesIO(pickled)).load()


class _Unpickler(pickle.Unpickler):
    """Calls nothing of what a pickle names, but for NumPy's integers."""

    def find_class(self, module: str, name: str) -> Any:
        # A new function each time: what a pickle sets on it is gone with it.
        match module.replace("_core", "core"), name:
            case "numpy", "dtype":
                return lambda code, *_: _Dtype(code)
            case "numpy.core.multiarray", "scalar":
                return lambda dtype, data: dtype.integer(data)
            case "_codecs", "encode":  # bytes, before protocol 3
                return lambda text, _: text.encode("latin1")
        raise ValueError(f"it names {module}.{name}")


class _Dtype:
    """The dtype of a NumPy integer."""

    def __init__(self, code: str):
        if code not in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"):
            raise ValueError(f"it has numbers of the type {shown(code)}")
        self._code, self._order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = state[1]

    def integer(self, data: bytes) -> int:
        """The number whose bytes these are."""
        if len(data) != int(self._code[1]):
            raise ValueError(f"it has a number of {len(data)} bytes")
        return int.from_bytes(data, "big" if self._order == ">" else "little", signed=self._code[0] == "i")
