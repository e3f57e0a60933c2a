"""YOLO's folders as labels of photos: the classes that the text file of a photo names."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlfsic_jax.data.photo_files import folded, is_junk, photos_below
from mlfsic_jax.data.tables import Table
from mlfsic_jax.data.text import text_lines
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import label_name, reported, shown

_NAMES_FILES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names")
_LARGEST = 1 << 18  # bytes of a file of names
# Text files that tools put among those of the photos.
_OTHERS = re.compile(r"(classes|predefined_classes|notes|readme.*|train|val(id)?|test)\.txt", re.IGNORECASE)


class Layout(NamedTuple):
    """A folder of YOLO's."""

    names: list[pathlib.Path]  # files that may have the names of the classes, 1 at least
    texts: dict[pathlib.Path, pathlib.Path | None]  # photo -> its text file


def find(folder: pathlib.Path) -> Layout | None:
    """The layout of a folder, if it is one of YOLO's: with names of classes and a text file for some photo."""
    names = [folder / name for name in _NAMES_FILES if (folder / name).is_file()]
    texts = _text_files(photos_below(folder), folder) if names else {}
    return Layout(names, texts) if any(texts.values()) else None


def read(layout: Layout) -> Table:
    """The labels of all photos of the folder; a photo without a text file has none.

    The text file of ``images/a.jpg`` is ``labels/a.txt``, or stands beside the photo. ``InputError`` names a malformed
    line, and files that name the classes differently.
    """
    (names_file, *others), texts = layout
    classes = _names(names_file)
    for other in others:
        if _names(other, classes) != classes:
            raise InputError(f"{names_file} and {other.name} name the classes differently: keep the one that is right")
    labels: dict[pathlib.Path, list[str]] = {}
    for photo, text in texts.items():
        lines = text_lines(text) if text else ()
        found = [_class_of(line, classes, f"{text}, line {number}") for number, line in lines]
        labels[photo] = list(dict.fromkeys(found))
    notes = [f"YOLO's boxes were read as labels: the classes that occur in a photo, named by {names_file.name}."]
    if n_bare := sum(text is None for text in texts.values()):
        notes.append(f"{n_bare} photos have no text file: they were taken for photos without any of the classes.")
    used = set(filter(None, texts.values()))
    beside = {path for place in {text.parent for text in used} for path in place.glob("*.[tT][xX][tT]")}
    if strays := sorted(path.name for path in beside - used if not _OTHERS.fullmatch(path.name)):
        notes.append(f"{len(strays)} text files, such as {strays[0]}, belong to no photo and are left out.")
    return Table(labels, list(dict.fromkeys(classes.values())), notes)


def _text_files(photos: Sequence[pathlib.Path], folder: pathlib.Path) -> dict[pathlib.Path, pathlib.Path | None]:
    """The text file of each photo, None where there is none; it may differ in how accents and capitals are written."""
    found = {photo: next(filter(pathlib.Path.is_file, _places(photo, folder)), None) for photo in photos}
    used, alike = set(found.values()), {}
    for path in folder.rglob("*.[tT][xX][tT]"):
        if path not in used and not is_junk(path.name):
            alike.setdefault(folded(str(path)), []).append(path)
    for photo in [photo for photo in photos if found[photo] is None]:
        texts = next(filter(None, (alike.get(folded(str(place))) for place in _places(photo, folder))), [])
        if len(texts) > 1:
            raise InputError(f"{texts[0]} and {texts[1].name} may belong to {photo}: keep one of them")
        found[photo] = texts[0] if texts else None
    return found


def _places(photo: pathlib.Path, folder: pathlib.Path) -> list[pathlib.Path]:
    """Where the text file of a photo may be."""
    parts = [*photo.relative_to(folder).parts[:-1], f"{photo.stem}.txt"]
    beside = folder.joinpath(*parts)
    names = [part.casefold() for part in parts]
    if "images" not in names:
        return [beside]
    place = len(parts) - 1 - names[::-1].index("images")
    return [folder.joinpath(*parts[:place], "labels", *parts[place + 1 :]), beside]


def _names(path: pathlib.Path, default: dict[int, str] | None = None) -> dict[int, str]:
    """Number -> name of the classes; ``default`` for a file without names."""
    if path.suffix not in (".yaml", ".yml"):
        lines = list(text_lines(path, "save it in UTF-8"))
        numbered = all(re.match(rf"{number - 1}[\s:,]", line) for number, line in lines)
        for number, line in lines:
            if numbered or line.startswith("#"):
                raise InputError(f"{path}, line {number}: {shown(line)}: write the names of the classes alone")
        return {number - 1: label_name(line, str(path)) for number, line in lines}
    import yaml

    if path.stat().st_size > _LARGEST:
        raise InputError(f"{path} has more than {_LARGEST:,} bytes: it should hold the names of the classes")
    with reported(f"{path} is not valid YAML", "correct it", (OSError, yaml.YAMLError, ValueError, RecursionError)):
        content = yaml.load(path.read_text("utf-8"), Loader=yaml.BaseLoader)  # texts only: "no" is no truth value
    names = content.get("names") if isinstance(content, Mapping) else None
    numbered: Any = names.items() if isinstance(names, Mapping) else enumerate(names) if _is_list(names) else ()
    with reported(f"{path}: the names of the classes are not numbered", "correct it", (ValueError, TypeError)):
        classes = {int(number): label_name(name, str(path)) for number, name in numbered}
    if not classes and default is not None:
        return default
    if not classes:
        raise InputError(f"{path} has no names of classes: add a line such as names: [cat, dog]")
    return classes


def _is_list(names: Any) -> bool:
    return isinstance(names, Sequence) and not isinstance(names, str)


def _class_of(line: str, classes: Mapping[int, str], where: str) -> str:
    number, *box = line.split() or [""]
    if not re.fullmatch(r"\d{1,9}", number, re.ASCII) or len(box) < 4:
        raise InputError(f"{where}: {shown(line)} is no box: expected the number of a class and four numbers")
    if int(number) not in classes:
        raise InputError(f"{where}: class {number} has no name: the classes are {shown(sorted(classes.items()))}")
    return classes[int(number)]
