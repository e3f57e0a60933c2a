"""A user's own photos: a folder with a table of their labels, an annotation tool's export, or sub-folders by label.

docs/data.md lists the layouts. ``labels.csv`` and the like come before anything else; what is left is recognised by its
files, and refused where two layouts are there at once. Folders train, valid, test are read together: they are splits of
photos, and splits here are of labels.
"""

import collections
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence

from mlfsic_jax.data import prepared, yolo
from mlfsic_jax.data.photo_files import Finder, is_junk, photos_below, why_unsupported
from mlfsic_jax.data.tables import ENDINGS, Table, is_table, odd_labels, read_csv, read_table
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import label_name, photo_path, shown

__all__ = ["DISPLAY_NAMES", "LAYOUT", "POLICY", "read_csv", "scan"]

DISPLAY_NAMES: dict[str, str] = {}
POLICY = "leakfree"
_OWN = ("labels.csv", "labels.tsv", "labels.json", "labels.jsonl")
# A word for a split, and what people add to it: train2017, test_set, val-images
_SPLIT = re.compile(
    r"(train(ing)?|val(id(ation)?)?|dev|test(ing)?|eval(uation)?|unlabel+ed)([ _-]?(set|data|images?|split|\d+))*",
    re.IGNORECASE,
)
_SHEETS = (".xls", ".xlsx", ".xlsm", ".ods", ".numbers")  # of spreadsheet programs
_PARTS = {"image", "images", "imgs", "jpegimages"}  # of a layout, not of labels
LAYOUT = (
    "Give a folder of photos with labels.csv (columns file, labels; several labels as sand|sea), or with labels.csv of "
    "one 0/1 column per label, or with labels.json in COCO's format, or with one sub-folder of photos per label, or an "
    "export of an annotation tool, see docs/data.md"
)


def scan(source: pathlib.Path) -> prepared.Source:
    """Lists the photos and reads their labels; images are named by their path in the folder.

    What was taken for what, and what looks like a slip, is told on standard error and in the notes.
    """
    if not source.is_dir():
        raise InputError(f"source {source} is not a folder. {LAYOUT}")
    table, described_by = _read(source)
    if described_by and not table.labels:
        raise InputError(f"{described_by[0]} names no photo: add rows such as a.jpg,sand|sea")
    if not table.labels:
        raise InputError(f"{source} holds no labels.csv, no labels.json and no photos in sub-folders. {LAYOUT}")
    if absent := prepared.missing(list(table.labels), source):
        raise InputError(f"{absent}. Correct {', '.join(map(str, described_by[:3])) or 'the folder'}")
    labels = table.labels if described_by else _merged(table.labels)
    examples = sorted(
        prepared.Example(photo.relative_to(source).as_posix(), photo, sorted(names)) for photo, names in labels.items()
    )
    label_names = sorted({name for example in examples for name in example.labels})
    if not label_names:
        raise InputError(f"no photo of {source} has a label. {LAYOUT}")
    told = [*table.notes, *odd_labels(label_names), *_unsupported(examples)]
    for line in told:
        print(line, file=sys.stderr, flush=True)
    origin = ", ".join(path.relative_to(source).as_posix() for path in described_by) or "sub-folders"
    notes = [f"Photos of {source.name}/, labels from {origin}.", *told]
    if described_by and (n_others := len(set(photos_below(source)).difference(labels))):
        notes.append(f"{n_others} photos of {source.name}/ are not named there and are left out.")
    contents = prepared.Contents(label_names, examples, notes)
    listed = [(example.name, example.labels, prepared.stamp(example.photo)) for example in examples]
    return prepared.Source(prepared.digest([listed, notes]), source.resolve().name, lambda: contents)


def _read(folder: pathlib.Path) -> tuple[Table, list[pathlib.Path]]:
    """The labels of the photos below a folder, and the files that say them: none where sub-folders do."""
    own = [path for name in _OWN if (path := folder / name).is_file()][:1]
    tables = own or [path for path in sorted(folder.iterdir()) if _may_be_table(path) and is_table(path)]
    cvat = [] if own else sorted((folder / "annotations").glob("instances_*.json"))
    boxes = None if own else yolo.find(folder)
    kinds = [*([path] for path in tables), *([cvat] if cvat else []), *([boxes.names] if boxes else [])]
    if len(kinds) > 1:
        found = ", ".join(str(paths[0].relative_to(folder)) for paths in kinds[:5])
        raise InputError(
            f"{folder} holds several files that may say the labels: {found}. Keep one, or call it labels.csv"
        )
    if not kinds:
        return _from_folders(folder)
    inside = [] if own else [sub.name for sub in _photos_of_folders(folder) if not _is_part(sub.name)]
    if tables and len(inside) > 1:
        either = f"{tables[0].name} and sub-folders such as {shown(inside[0])}"
        raise InputError(f"{folder}: both {either} may say the labels. Call the file labels.csv, or move it away")
    if boxes:
        return yolo.read(boxes), boxes.names[:1]
    if tables:
        return read_table(tables[0], Finder(folder)), tables
    read = [read_table(path, _finder(folder, path)) for path in cvat]
    return _together(folder, read), cvat


def _unsupported(examples: Sequence[prepared.Example]) -> list[str]:
    """A line for each kind of photos that cannot be read here; ``InputError`` when there are no others."""
    by_why: dict[str, list[str]] = {}
    for example in examples:
        by_why.setdefault(why_unsupported(example.photo), []).append(example.name)
    readable = by_why.pop("", [])
    lines = [
        f"{len(names)} photos ({', '.join(names[:3])}{', ..' * (len(names) > 3)}) {why}."
        for why, names in by_why.items()
    ]
    if not readable:
        raise InputError(f"there is no photo that can be read: {lines[0]}")
    return lines


def _may_be_table(path: pathlib.Path) -> bool:
    return path.suffix.lower() in ENDINGS and not is_junk(path.name) and path.is_file()


def _finder(folder: pathlib.Path, path: pathlib.Path) -> Finder:
    """Looks for the photos of a subset, annotations/instances_<subset>.json, where CVAT and COCO put them."""
    subset = path.stem.removeprefix("instances_")
    return Finder(folder, first=[folder / "images" / subset, folder / subset, folder / "images"])


def _together(folder: pathlib.Path, read: Sequence[Table]) -> Table:
    labels: dict[pathlib.Path, list[str]] = {}
    for table in read:
        if twice := sorted(labels.keys() & table.labels):
            raise InputError(f"two files of annotations in {folder} name the photo {twice[0]}: keep one of them")
        labels |= table.labels
    return Table(labels, [], list(dict.fromkeys(note for table in read for note in table.notes)))


def _photos_of_folders(folder: pathlib.Path) -> dict[pathlib.Path, list[pathlib.Path]]:
    """Sub-folder -> the photos in it, where there are any."""
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and not is_junk(path.name)]
    return {path: photos for path in folders if (photos := photos_below(path))}


def _is_part(name: str) -> bool:
    """Whether a folder of this name is part of a layout, not a label."""
    return bool(_SPLIT.fullmatch(name)) or name.casefold() in _PARTS


def _from_folders(folder: pathlib.Path) -> tuple[Table, list[pathlib.Path]]:
    inside = _photos_of_folders(folder)
    splits = [path for path in inside if _SPLIT.fullmatch(path.name)]
    names = ", ".join(f"{path.name}/" for path in splits)
    if splits and len(splits) < len(inside):
        other = next(path.name for path in inside if path not in splits)
        choice = "if it holds splits, move the others away; if all are labels, write them into labels.csv"
        raise InputError(f"{folder} holds {names} which look like splits, beside {shown(other)}: {choice}")
    if splits:
        read = [_read(path) for path in splits]
        table = _together(folder, [table for table, _ in read])
        note = f"Photos of {names} are read together: splits here are of labels."
        return table._replace(notes=[note, *table.notes]), [path for _, paths in read for path in paths]
    if parts := [path.name for path in inside if _is_part(path.name)]:
        tells = "labels.csv, COCO's JSON in annotations/ or YOLO's data.yaml would"
        raise InputError(f"{folder}: nothing tells the labels of the photos in {shown(parts[0])}; {tells}")
    labels: dict[pathlib.Path, list[str]] = {}
    for path, photos in inside.items():
        label = label_name(path.name, f"a sub-folder of {folder}")
        for photo in photos:
            photo_path(str(photo.relative_to(path)), str(path), path)
            labels[photo] = [label]
    loose = len(photos_below(folder)) - len(labels)
    notes = [f"{loose} photos of {folder.name}/ lie in no sub-folder, have no label and are left out."] * (loose > 0)
    others = [path for path in sorted(folder.iterdir()) if path not in inside and not is_junk(path.name)]
    if empty := [path.name for path in others if path.is_dir()]:
        notes.append(f"Sub-folders without photos are left out: {shown(empty)}.")
    if sheets := [path.name for path in others if path.suffix.lower() in _SHEETS]:
        notes.append(f"{', '.join(sheets)} was not read: if it says the labels, save it as labels.csv.")
    if deep := sorted({photo.parent.name for path in inside for photo in inside[path] if photo.parent != path}):
        notes.append(f"Sub-folders of labels, such as {shown(deep[0])}, were taken for parts of the label.")
    return Table(labels, [], notes), []


def _merged(labels: Mapping[pathlib.Path, Sequence[str]]) -> dict[pathlib.Path, set[str]]:
    """Photo -> its labels; files of equal content are one image, named after the first."""
    sizes = {photo: prepared.size(photo) for photo in labels}
    n_of_size = collections.Counter(sizes.values())
    merged: dict[pathlib.Path, set[str]] = {}
    first: dict[tuple[int, str], pathlib.Path] = {}
    for photo, names in labels.items():
        size = sizes[photo]
        # Only files of equal size need be read; those that nobody can read are listed one by one.
        content = str(photo) if why_unsupported(photo) else prepared.digest([photo]) if n_of_size[size] > 1 else ""
        merged.setdefault(first.setdefault((size, content), photo), set()).update(names)
    return merged
