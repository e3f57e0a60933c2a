"""COCO 2014 from the official folders train2014/, val2014/ and annotations/instances_*.json."""

import collections
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from mlfsic_jax.data import prepared
from mlfsic_jax.data.splits import benchmark_labels
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import label_name, photo_path, read_json, reported, shown

LABEL_NAMES = benchmark_labels("coco")
DISPLAY_NAMES: dict[str, str] = {}
TRAINING_SET = "train2014"
IMAGE_SETS = (TRAINING_SET, "val2014")
POLICY = "exclusive"
LAYOUT = (
    "Get COCO with: python -m mlfsic_jax.fetch coco, or unpack train2014.zip, val2014.zip and "
    "annotations_trainval2014.zip of https://cocodataset.org/#download into one folder; give the folder that holds "
    "train2014/, val2014/ and annotations/instances_train2014.json, instances_val2014.json"
)


def scan(source: pathlib.Path) -> prepared.Source:
    """Lists the photos and instances files of the sets found.

    Images are named like ``"train2014/COCO_train2014_000000000009"``. A label is positive if the image has any
    annotated instance of it, crowds included.
    """
    annotations = {name: source / "annotations" / f"instances_{name}.json" for name in IMAGE_SETS}
    sets = [name for name in IMAGE_SETS if annotations[name].is_file() or (source / name).is_dir()]
    if not sets:
        raise InputError(f"source {source} holds neither train2014 nor val2014. {LAYOUT}")
    parts: list[Any] = []
    for name in sets:
        if not annotations[name].is_file():
            unpack = f"unpack annotations_trainval2014.zip, or move {name} away"
            raise InputError(f"{annotations[name]} is missing: {unpack}")
        if not (source / name).is_dir():
            raise InputError(f"the photo folder {source / name} is missing: unpack {name}.zip in {source}")
        parts += [name, annotations[name], listing(source / name)]
    digest = prepared.digest(parts)
    read = functools.partial(_read, source, {name: annotations[name] for name in sets})
    return prepared.Source(digest, "_".join(sets), read)


def training_images(source: pathlib.Path) -> list[str]:
    """Names of train2014's images as its instances file orders them, which is pycocotools' ``COCO.getImgIds`` too."""
    path = source / "annotations" / f"instances_{TRAINING_SET}.json"
    return [f"{TRAINING_SET}/{stem}" for stem, _, _ in instances(path, source / TRAINING_SET)]


def listing(folder: pathlib.Path) -> list[tuple[str, int, int]]:
    """(name, size in bytes, time of the last change in nanoseconds) of every file of a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries if e.is_file())


def _read(source: pathlib.Path, annotations: dict[str, pathlib.Path]) -> prepared.Contents:
    examples = []
    for name, path in annotations.items():
        for stem, photo, labels in instances(path, source / name):
            unknown = sorted(set(labels) - set(LABEL_NAMES))
            if unknown:
                raise InputError(f"{path} names {shown(unknown[0])}, which is none of COCO's 80 labels: get it again")
            examples.append(prepared.Example(f"{name}/{stem}", photo, labels))
    if absent := prepared.missing([example.photo for example in examples], source):
        raise InputError(f"{absent}. Finish the download, or move that set and its instances file away")
    notes = [f"COCO 2014: {' and '.join(annotations)}; any annotated instance makes a label positive."]
    return prepared.Contents(LABEL_NAMES, sorted(examples), notes)


def instances(path: pathlib.Path, folder: pathlib.Path) -> list[tuple[str, pathlib.Path, Sequence[str]]]:
    """(File name without its ending, photo, sorted label names) of every image in a COCO instances file.

    Photos lie in ``folder``. ``InputError`` for a file that is no such JSON, refers to an unknown image or category, or
    has one twice.
    """
    with (
        reported(f"{path} cannot be read", "get it again", OSError),
        reported(f"{path} is not valid JSON", "is the download complete?", ValueError),  # JSON's and Unicode's
    ):
        content = read_json(path)
    images, strays = annotated(content, path)
    if strays:
        raise InputError(f"{path} has annotations of {shown(strays[0])}, which it does not list: get it again")
    files = [(photo_path(file, str(path), folder), labels) for file, labels in images]
    if twice := [file for file, n in collections.Counter(file for file, _ in files).items() if n > 1]:
        raise InputError(f"{path} names the photo {shown(str(twice[0]))} twice: correct the file, or get it again")
    return [(str(file.with_suffix("")), folder / file, labels) for file, labels in files]


def annotated(content: Any, path: pathlib.Path) -> tuple[list[tuple[Any, list[str]]], list[Any]]:
    """(File, sorted label names) of every image in the content of a COCO instances file, and the stray ids.

    Those are in annotations, and no image and no category with a name has them. ``InputError`` for any other content.
    """
    needs = 'it needs "images", "annotations" and "categories" whose ids match'
    with reported(f"{path} is not a COCO instances file", needs, (KeyError, TypeError, AttributeError)):
        categories, images = [c for c in content["categories"] if "name" in c], content["images"]
        names = {category["id"]: label_name(category["name"], str(path)) for category in categories}
        files = {image["id"]: image["file_name"] for image in images}
        for what, found, listed in (("categories", names, categories), ("images", files, images)):
            if len(found) < len(listed):
                raise InputError(f"{path} gives two of its {what} the same id: correct the file, or get it again")
        labels: dict[Any, set[str]] = {image: set() for image in files}
        strays = []
        for annotation in content["annotations"]:
            image, category = annotation["image_id"], annotation["category_id"]
            if image in labels and category in names:
                labels[image].add(names[category])
            else:
                strays.append(category if image in labels else image)
    return [(file, sorted(labels[image])) for image, file in files.items()], strays
