"""iMaterialist (Fashion) 2019, FGVC6, from Kaggle's train.csv, label_descriptions.json and train/."""

import functools
import pathlib

from mlfsic_jax.data import prepared
from mlfsic_jax.data.coco import listing
from mlfsic_jax.data.splits import benchmark_labels
from mlfsic_jax.data.text import csv_rows
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import photo_path, read_json, reported, shown

LABEL_NAMES = benchmark_labels("imaterialist")
DISPLAY_NAMES: dict[str, str] = {}
POLICY = "leakfree"
_MAX_FIELD = 2**31 - 1  # characters: a segment's outline is one long field
LAYOUT = (
    "Get iMaterialist from https://www.kaggle.com/c/imaterialist-fashion-2019-FGVC6/data and give the folder with "
    "train.csv, label_descriptions.json and train/"
)


def scan(source: pathlib.Path) -> prepared.Source:
    """Lists the photos of ``train/``; images are named like their files without the ending.

    A label is positive if the photo has a segment of it; attributes of segments are not labels.
    """
    table, descriptions, photos = source / "train.csv", source / "label_descriptions.json", source / "train"
    absent = [path for path in (table, descriptions) if not path.is_file()] + [photos] * (not photos.is_dir())
    if absent:
        raise InputError(f"{absent[0]} is missing. {LAYOUT}")
    digest = prepared.digest([table, descriptions, listing(photos)])
    return prepared.Source(digest, "train", functools.partial(_read, table, descriptions, photos))


def _read(table: pathlib.Path, descriptions: pathlib.Path, photos: pathlib.Path) -> prepared.Contents:
    names = _category_names(descriptions)
    labels: dict[str, set[str]] = {}
    rows = csv_rows(table, "get it again", _MAX_FIELD)
    _, columns = next(rows)
    if not {"ImageId", "ClassId"} <= set(columns):
        raise InputError(f"{table} needs the columns ImageId and ClassId, it has {shown(columns)}")
    image_column, class_column = columns.index("ImageId"), columns.index("ClassId")
    for where, row in rows:
        image, segment_class = row[image_column], row[class_column]
        category = segment_class.split("_")[0]  # "6_12_3": category 6 with attributes 12 and 3
        if category not in names:
            absent = f"ClassId {shown(segment_class)} is no category of {descriptions.name}"
            raise InputError(f"{where}: {absent}; get the file again")
        if photo_path(image, where, photos).name != image:
            raise InputError(f"{where}: {shown(image)} is not a photo's file name")
        labels.setdefault(image, set()).add(names[category])
    examples = []
    for image, found in labels.items():
        photo = photos / image if pathlib.PurePath(image).suffix else photos / f"{image}.jpg"
        examples.append(prepared.Example(photo.stem, photo, sorted(found)))
    if absent := prepared.missing([example.photo for example in examples], photos.parent):
        raise InputError(f"{absent}. Finish the download")
    return prepared.Contents(LABEL_NAMES, sorted(examples), ["iMaterialist (Fashion) 2019: the photos of train.csv."])


def _category_names(path: pathlib.Path) -> dict[str, str]:
    """Category id, as train.csv writes it -> name."""
    what = f"{path} has no readable list of categories"
    with reported(what, "get it again", (OSError, ValueError, KeyError, TypeError, OverflowError)):
        names = {str(int(c["id"])): str(c["name"]) for c in read_json(path)["categories"]}
    if set(names.values()) != set(LABEL_NAMES):
        differ = sorted(set(names.values()) ^ set(LABEL_NAMES))
        raise InputError(f"{path} has not iMaterialist 2019's 46 categories, see {shown(differ[0])}: get it again")
    return names
