"""YOLO's folders as labels of photos: the classes that the text file of a photo names."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlfsic_jax.data.photo_files import photos_below
from mlfsic_jax.data.tables import Table
from mlfsic_jax.data.text import text_lines
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import label_name, reported, shown

_NAMES_FILES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names")
_LARGEST = 1 << 18  # bytes of a file of names


def find(folder: pathlib.Path) -> pathlib.Path | None:
    """The file with the names of the classes, if a folder is one of YOLO's: with a text file for some photo."""
    names = next((folder / name for name in _NAMES_FILES if (folder / name).is_file()), None)
    return names if names and any(_text_file(photo, folder) for photo in photos_below(folder)) else None


def read(names_file: pathlib.Path) -> Table:
    """The labels of all photos below the folder of ``names_file``; a photo without a text file has none.

    The text file of ``images/a.jpg`` is ``labels/a.txt``, or stands beside the photo. ``InputError`` names a malformed
    line.
    """
    folder, classes = names_file.parent, _names(names_file)
    labels, n_bare = {}, 0
    for photo in photos_below(folder):
        text = _text_file(photo, folder)
        n_bare += text is None
        found = (
            [_class_of(line, classes, f"{text}, line {number}") for number, line in text_lines(text)] if text else []
        )
        labels[photo] = list(dict.fromkeys(found))
    notes = [f"YOLO's boxes were read as labels: the classes that occur in a photo, named by {names_file.name}."]
    if n_bare:
        notes.append(f"{n_bare} photos have no text file: they were taken for photos without any of the classes.")
    return Table(labels, list(dict.fromkeys(classes.values())), notes)


def _text_file(photo: pathlib.Path, folder: pathlib.Path) -> pathlib.Path | None:
    parts = [*photo.relative_to(folder).parts[:-1], f"{photo.stem}.txt"]
    if "images" in parts:
        place = len(parts) - 1 - parts[::-1].index("images")
        elsewhere = folder.joinpath(*parts[:place], "labels", *parts[place + 1 :])
        if elsewhere.is_file():
            return elsewhere
    beside = folder.joinpath(*parts)
    return beside if beside.is_file() else None


def _names(path: pathlib.Path) -> dict[int, str]:
    """Number -> name of the classes."""
    if path.suffix not in (".yaml", ".yml"):
        lines = text_lines(path, "save it in UTF-8")
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
