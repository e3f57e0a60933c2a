"""A user's own photos: a folder, and their labels in one of these forms, tried in this order:

- ``labels.csv`` with the columns ``file`` and ``labels``, several labels separated by ``|``: ``beach.jpg,sand|sea``;
- ``labels.csv`` with the column ``file`` and one column of 0 and 1 per label;
- ``labels.json``, a COCO instances file;
- one sub-folder per label. Photos with several labels stand in several: copies and links of a file are one image.
"""

import collections
import pathlib
from collections.abc import Iterator

from PIL import Image

from mlfsic_jax.data import prepared
from mlfsic_jax.data.coco import instances
from mlfsic_jax.data.text import csv_rows
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import label_name, photo_path, shown

DISPLAY_NAMES: dict[str, str] = {}
POLICY = "leakfree"
_MAX_FIELD = 1 << 17  # characters
LAYOUT = (
    "Give a folder of photos with labels.csv (columns file, labels; several labels as sand|sea), or with labels.csv of "
    "one 0/1 column per label, or with labels.json in COCO's format, or with one sub-folder of photos per label"
)


def scan(source: pathlib.Path) -> prepared.Source:
    """Lists the photos and reads their labels; images are named by their path in the folder."""
    if not source.is_dir():
        raise InputError(f"source {source} is not a folder. {LAYOUT}")
    table, instances_file = source / "labels.csv", source / "labels.json"
    described_by = [path for path in (table, instances_file) if path.is_file()][:1]
    if table.is_file():
        labels = read_csv(table)[0]
    elif described_by:
        labels = {photo: names for _, photo, names in instances(instances_file, source)}
    else:
        labels = _from_folders(source)
    if absent := prepared.missing(list(labels), source):
        raise InputError(f"{absent}. Correct {described_by[0] if described_by else 'the folder'}")
    examples = sorted(
        prepared.Example(photo.relative_to(source).as_posix(), photo, sorted(names)) for photo, names in labels.items()
    )
    label_names = sorted({name for example in examples for name in example.labels})
    if not label_names:
        raise InputError(f"no photo of {source} has a label. {LAYOUT}")
    sizes = [(example.name, example.labels, example.photo.stat().st_size) for example in examples]
    notes = [f"Photos of {source.name}/, labels from {described_by[0].name if described_by else 'sub-folders'}."]
    contents = prepared.Contents(label_names, examples, notes)
    return prepared.Source(prepared.digest([*described_by, sizes]), source.resolve().name, lambda: contents)


def read_csv(path: pathlib.Path, anywhere: bool = False) -> tuple[dict[pathlib.Path, list[str]], list[str]]:
    """Photo -> its labels, and all labels named, from a file in either of the two forms of ``labels.csv``.

    Photos are relative to its folder and, unless ``anywhere``, inside of it. ``InputError`` names a malformed line.
    """
    rows = csv_rows(path, "save it as CSV in UTF-8", _MAX_FIELD)
    where, columns = next(rows)
    columns = [column.strip() for column in columns]
    if columns[:1] != ["file"] or len(columns) < 2 or "" in columns:
        must = "the columns must be file,labels or file and one column per label"
        raise InputError(f"{where}: {must}, not {shown(columns)}")
    columns = ["file", *(label_name(column, where) for column in columns[1:])]
    if len(set(columns)) != len(columns):
        raise InputError(f"{where}: a column occurs twice in {shown(columns)}")
    labels: dict[pathlib.Path, list[str]] = {}
    for where, (file, *cells) in rows:
        names = _names(dict(zip(columns[1:], cells, strict=True)), where)
        photo = path.parent / photo_path(file.strip(), where, path.parent, anywhere)
        if photo in labels:
            raise InputError(f"{where}: {shown(file)} occurs twice; put all labels of a photo into one line")
        labels[photo] = names
    if columns == ["file", "labels"]:
        return labels, list(dict.fromkeys(name for names in labels.values() for name in names))
    return labels, columns[1:]


def _names(cells: dict[str, str], where: str) -> list[str]:
    """The labels of one line."""
    if list(cells) == ["labels"]:
        names = [label_name(name.strip(), where) for name in cells["labels"].split("|") if name.strip()]
        if len(set(names)) != len(names):
            raise InputError(f"{where}: a label occurs twice in {shown(cells['labels'])}")
        return names
    for column, cell in cells.items():
        if cell.strip() not in ("0", "1", ""):
            raise InputError(f"{where}, column {column!r}: {cell.strip()[:20]!r}, expected 0 or 1")
    return [column for column, cell in cells.items() if cell.strip() == "1"]


def _from_folders(source: pathlib.Path) -> dict[pathlib.Path, set[str]]:
    """Photo -> its labels; files of equal content are one image, named after the first."""
    sizes = [(label, photo, photo.stat().st_size) for label, photo in _photos(source)]
    if not sizes:
        raise InputError(f"{source} holds no labels.csv, no labels.json and no photos in sub-folders. {LAYOUT}")
    n_of_size = collections.Counter(size for *_, size in sizes)
    labels: dict[pathlib.Path, set[str]] = {}
    first: dict[tuple[int, str], pathlib.Path] = {}
    for label, photo, size in sizes:
        content = prepared.digest([photo]) if n_of_size[size] > 1 else ""  # only files of equal size need be read
        labels.setdefault(first.setdefault((size, content), photo), set()).add(label)
    return labels


def _photos(source: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    endings = Image.registered_extensions()
    for folder in sorted(source.iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            label = label_name(folder.name, f"a sub-folder of {folder.parent}")
            for photo in sorted(folder.rglob("*")):
                if photo.suffix.lower() in endings and photo.is_file():
                    photo_path(str(photo.relative_to(folder)), str(folder), folder)
                    yield label, photo
