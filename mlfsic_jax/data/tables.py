"""Tables of labels as people and annotation tools write them: CSV, JSON and JSON Lines.

A table has a column that names the photos, and one column of label names or a column of 0 and 1 for each label. Label
Studio's tasks are turned into such a table; a COCO instances file has its own reader.
"""

import itertools
import json
import pathlib
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mlfsic_jax.data.coco import annotated
from mlfsic_jax.data.photo_files import Finder
from mlfsic_jax.data.text import csv_rows, is_separator_line, text_lines
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import label_name, read_json, reported, shown

ENDINGS = (".csv", ".tsv", ".json", ".jsonl")
_FILE_COLUMNS = {"file", "filename", "file_name", "file_path", "filepath", "path", "photo", "url"}
_FILE_COLUMNS |= {"image", "image_name", "image_path", "image_url", "img"}
_LABEL_COLUMNS = {"labels", "label", "tags", "tag", "choice", "choices", "class", "category"}
_YES, _NO = {"1", "1.0", "true", "x"}, {"", "0", "0.0", "false"}
FLAGS = (_YES | _NO) - {""}  # capitals do not matter
_MISSING = {"nan", "none", "null", "n/a", "na", "<na>", "undefined"}
_MAX_FIELD = 1 << 17  # characters
_SEPARATORS = "|;#,"  # the first that a file has separates its labels
_MUST = "the columns must be file,labels or file and one column per label"


class Table(NamedTuple):
    """Labels of photos."""

    labels: dict[pathlib.Path, list[str]]  # photo -> its labels
    names: list[str]  # all of them, in the order of the columns or of the photos
    notes: list[str]  # what was taken for what, in lines for the data card


class _Rows(NamedTuple):
    """A table before its columns are understood. A cell is a text, a list or object, or None: nothing was said."""

    where: str  # of the columns, for messages
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Any]]]  # (where, cells)


def read_csv(path: pathlib.Path, anywhere: bool = False) -> tuple[dict[pathlib.Path, list[str]], list[str]]:
    """Photo -> its labels, and all labels, as ``read_table``; notes and warnings go to standard error."""
    table = read_table(path, Finder(path.parent, anywhere))
    for line in (*table.notes, *odd_labels(table.names)):
        print(line, file=sys.stderr)
    return table.labels, table.names


def read_table(path: pathlib.Path, finder: Finder) -> Table:
    """Reads a table of labels, of the kind that its ending and content say.

    Several rows of a photo are put together where a row has label names. ``InputError`` names a malformed line, and
    what can be read in two ways.
    """
    if path.suffix.lower() not in (".json", ".jsonl"):
        return _read_rows(path, _csv(path), finder)
    content = _json(path)
    if isinstance(content, list):
        return _read_rows(path, _tasks(path, content) if _has_tasks(content) else _records(path, content), finder)
    images, strays = annotated(content, path)
    labels: dict[pathlib.Path, list[str]] = {}
    for file, names in images:
        photo = finder.find(file, str(path))
        if photo in labels:
            raise InputError(f"{path} names the photo {shown(file)} twice: correct the file")
        labels[photo] = names
    left_out = f"{len(strays)} annotations of {path.name} name no image or category that it lists and are left out."
    return Table(labels, _in_order(labels.values()), [left_out] if strays else [])


def is_table(path: pathlib.Path) -> bool:
    """Whether a file looks like a table of labels; ``InputError`` when it cannot be read."""
    if path.suffix.lower() not in (".json", ".jsonl"):
        return not _FILE_COLUMNS.isdisjoint(map(_plain, next(csv_rows(path, *_CSV, _delimiter(path)))[1]))
    content = _json(path)
    if isinstance(content, list):
        first = content[0] if content and isinstance(content[0], dict) else {}
        return _has_tasks(content) or not _FILE_COLUMNS.isdisjoint(map(_plain, first))
    return isinstance(content, dict) and {"images", "annotations"} <= set(content)


def odd_labels(names: Sequence[str]) -> Iterator[str]:
    """Warnings of labels that look like slips."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"[\s_-]+", " ", name.casefold()), []).append(name)
    for spellings in alike.values():
        if len(spellings) > 1:
            yield f"The labels {', '.join(map(repr, spellings))} are several: write them alike if they are one."
    for name in names:
        if name.casefold() in _MISSING:
            yield f"{name!r} was taken for a label: leave the cell empty where a photo has none."
    pieces = {name: [p for p in re.split(r"[|;#,/&+\\、，；\s]+|\band\b", name) if p] for name in names}
    known = {*names, *_first_and_later(pieces.values())}
    if lists := [name for name in names if len(pieces[name]) > 1 and known.issuperset(pieces[name])]:
        taken = f"{lists[0]!r} was taken for one label" + f", and {len(lists) - 1} more like it" * (len(lists) > 1)
        yield f"{taken}, but its parts look like labels: separate labels by | if they are several."


# --- kinds of files

_CSV = ("save it as CSV in UTF-8, with several labels as a|b", _MAX_FIELD)


def _csv(path: pathlib.Path) -> _Rows:
    rows = csv_rows(path, *_CSV, _delimiter(path))
    where, columns = next(rows)
    return _Rows(where, columns, list(rows))


def _delimiter(path: pathlib.Path) -> str:
    """Of comma, semicolon and tab the one with which the first line has a column for files; a comma where none has."""
    first = next((line for _, line in text_lines(path, _CSV[0]) if not is_separator_line(line)), "")
    return next((d for d in ",;\t" if not _FILE_COLUMNS.isdisjoint(map(_plain, first.split(d)))), ",")


def _json(path: pathlib.Path) -> Any:
    with (
        reported(f"{path} cannot be read", "check it", OSError),
        reported(
            f"{path} is not valid JSON",
            "is it whole? If it holds no labels, move it away",
            (ValueError, RecursionError),
        ),
    ):
        if path.suffix.lower() == ".jsonl":
            return [json.loads(line) for _, line in text_lines(path, "save it in UTF-8")]
        return read_json(path)


def _records(path: pathlib.Path, content: list[Any]) -> _Rows:
    """Flat objects, one per photo or one per photo and label."""
    for number, record in enumerate(content, 1):
        if not isinstance(record, dict):
            raise InputError(f"{path}, entry {number}: {shown(record)} is no object such as {{file, labels}}")
    columns = list(dict.fromkeys(itertools.chain.from_iterable(content)))
    rows = [
        (f"{path}, entry {number}", [record.get(column) for column in columns])
        for number, record in enumerate(content, 1)
    ]
    return _Rows(str(path), columns, rows)


def _has_tasks(content: list[Any]) -> bool:
    return bool(content) and isinstance(content[0], dict) and isinstance(content[0].get("data"), dict)


def _tasks(path: pathlib.Path, content: list[Any]) -> _Rows:
    """Label Studio's tasks: a row per annotation, or with None for a task without one."""
    rows, questions = [], set()
    needs = 'a task needs "data" with the photo and "annotations"'
    for number, task in enumerate(content, 1):
        where = f"{path}, task {number}"
        with reported(f"{where} is none of Label Studio's", needs, (KeyError, TypeError, AttributeError)):
            photos = [value for name, value in task["data"].items() if _plain(name) in _FILE_COLUMNS]
            if len(photos) != 1:
                raise InputError(f"{where}: one of {', '.join(sorted(_FILE_COLUMNS))} must name the photo in its data")
            done = [a for a in task.get("annotations", ()) if not a.get("was_cancelled")]
            for annotation in done:
                choices = [result for result in annotation["result"] if result["type"] == "choices"]
                questions |= {result["from_name"] for result in choices}
                names = _in_order([_list(result["value"]["choices"], where) for result in choices])
                rows.append((where, [photos[0], names, ""]))
            if not done:
                rows.append((where, [photos[0], None, ""]))
    if not any(names is not None for _, (_, names, _) in rows):
        raise InputError(f"{path}: no task has an annotation yet: submit some in Label Studio and export again")
    if len(questions) != 1:
        asked = f"the choices of {shown(sorted(map(str, questions)))}" if questions else "no choices"
        raise InputError(f"{path} holds {asked}: labels are read from the choices of one question, export that alone")
    return _Rows(str(path), ["image", "choice", "annotation_id"], rows)


# --- columns and cells


def _read_rows(path: pathlib.Path, table: _Rows, finder: Finder) -> Table:
    plain = [_plain(column) for column in table.columns]
    file, column = _columns(table, plain)
    annotations = "annotation_id" in plain  # Label Studio: a row is all that one person said of a photo
    notes = []
    if column is None:
        names, each = _marked(table, file)
        blank = [name for name in names if not any(name in found for found in each)] if each else []
        notes = [f"Columns of {path.name} taken for labels that no photo has: {shown(blank)}."] * bool(blank)
    else:
        each, note = _named([(where, cells[column]) for where, cells in table.rows], annotations, path.name)
        names = _in_order(filter(None, each))
        rest = [name for name in plain if name not in (plain[file], plain[column], "annotation_id", "")]
        notes = note + [f"Columns of {path.name} that were not read: {shown(rest)}."] * bool(rest)
    labels: dict[pathlib.Path, list[str]] = {}
    for (where, cells), found in zip(table.rows, each, strict=True):
        if found is None:
            continue
        photo = finder.find(cells[file].strip() if isinstance(cells[file], str) else cells[file], where)
        if photo in labels and column is None:
            raise InputError(f"{where}: {shown(cells[file])} occurs twice; put all labels of a photo into one line")
        if annotations and set(labels.get(photo, found)) != set(found):
            raise InputError(f"{where}: {shown(cells[file])} has two annotations that differ: keep one of them")
        labels[photo] = _in_order([labels.get(photo, []), found])
    if n_open := sum(found is None for found in each):
        notes.append(f"{n_open} entries of {path.name} have no annotation and are left out.")
    return Table(labels, names, notes)


def _columns(table: _Rows, plain: Sequence[str]) -> tuple[int, int | None]:
    """Places of the column of photos and of the column of labels, None where each label has a column."""
    cells = list(zip(*(cells for _, cells in table.rows), strict=True)) or [()] * len(plain)
    blank = [not any(isinstance(one, list) or str(one or "").strip() for one in cell) for cell in cells]
    flags = [len(plain) > 2 and bool(cell) and None not in map(_flag, cell) for cell in cells]
    files, labels = (
        [i for i, name in enumerate(plain) if name in known and (not flags[i] or blank[i])]
        for known in (_FILE_COLUMNS, _LABEL_COLUMNS)
    )
    files, labels = ([i for i in found if not blank[i]] or found for found in (files, labels))
    for what, found in (("photo", files), ("labels", labels)):
        if len(found) > 1:
            raise InputError(f"{table.where}: columns {shown([plain[i] for i in found])} may hold the {what}: keep one")
    if not files or len(plain) < 2:
        raise InputError(f"{table.where}: {_MUST}, not {shown(list(table.columns))}")
    if not labels:
        return files[0], None
    marked = [table.columns[i] for i, cell in enumerate(cells) if flags[i] and True in map(_flag, cell)]
    if "annotation_id" not in plain and len(marked) > (0 if blank[labels[0]] else 1):
        either = f"in column {plain[labels[0]]!r} or in the 0/1 columns {shown(marked)}"
        raise InputError(f"{table.where}: labels may stand {either}: take one out")
    said = {str(cell).strip() for cell in cells[labels[0]]} - {"", "None"}
    if said and None not in map(_flag, said):
        raise InputError(
            f"{table.where}: column {plain[labels[0]]!r} has {' and '.join(sorted(said))} only: "
            "rename it to the label, or write names of labels in it"
        )
    return files[0], labels[0]


def _marked(table: _Rows, file: int) -> tuple[list[str], list[list[str]]]:
    """All labels and those of each row, from one column of 0 and 1 per label."""
    columns = [i for i in range(len(table.columns)) if i != file and not _is_index(table, i)]
    if not all(_plain(table.columns[i]) for i in columns):
        raise InputError(f"{table.where}: {_MUST}, not {shown(list(table.columns))}")
    names = [label_name(table.columns[i], table.where) for i in columns]
    if len(set(names)) != len(names):
        raise InputError(f"{table.where}: a column occurs twice in {shown(list(table.columns))}")
    each = []
    for where, cells in table.rows:
        for name, i in zip(names, columns, strict=True):
            if _flag(cells[i]) is None:
                hint = "expected 0 or 1; call a column of names labels"
                raise InputError(f"{where}, column {name!r}: {shown(cells[i])}, {hint}")
        each.append([name for name, i in zip(names, columns, strict=True) if _flag(cells[i])])
    return names, each


def _is_index(table: _Rows, i: int) -> bool:
    """Whether a column without a name numbers the rows from 0, as pandas writes them unless it is told not to."""
    if _plain(table.columns[i]):
        return False
    return all(str(cells[i]).strip() == str(number) for number, (_, cells) in enumerate(table.rows))


def _named(cells: Sequence[tuple[str, Any]], whole: bool, file: str) -> tuple[list[list[str] | None], list[str]]:
    """The labels of each cell, (where, cell), and a note; ``whole``: a text is one label."""
    read = [(where, _decoded(cell, where)) for where, cell in cells]
    texts: dict[str, str] = {}  # -> where it stands first
    for where, cell in read:
        if isinstance(cell, str) and cell:
            texts.setdefault(cell, where)
    lists = [cell for _, cell in read if isinstance(cell, list)]
    separator = _separator(texts, set(_in_order(lists)), whole or bool(lists))
    each: list[list[str] | None] = []
    for where, cell in read:
        parts = _parts(cell, separator) if isinstance(cell, str) else cell
        names = parts if parts is None else [label_name(part, where) for part in parts]
        if names is not None and len(set(names)) != len(names):
            raise InputError(f"{where}: a label occurs twice in {shown(cell)}")
        each.append(names)
    notes = [f"Labels in {file} are separated by {separator!r}."] if separator and separator != "|" else []
    from_texts = _in_order(names or () for (_, cell), names in zip(read, each, strict=True) if isinstance(cell, str))
    if (separator or lists) and (ones := [name for name in from_texts if re.search(r"[|;,][^|;,]", name)]):
        notes.append(f"Taken for one label each in {file}: {shown(ones)}.")
    return each, notes


def _separator(texts: Mapping[str, str], listed: set[str], whole: bool) -> str:
    """What separates labels in these texts, text -> where it stands; "" for nothing.

    It is "|" if any text has it, else ";", else "#", else ",". The last two occur in labels too: they separate where
    each text that they part shares a label with others, which stands alone there, or both first and later.
    ``InputError`` where that leaves two readings.
    """
    present = [s for s in _SEPARATORS if any(_separates(s, text) for text in texts)]
    separator = "" if whole else next(iter(present), "")
    parts = {text: _parts(text, separator) for text in texts}
    doubtful = _unshared(parts) if separator in ("#", ",") else []
    labels = listed.union(*parts.values())
    for text, other in itertools.product(texts, present):
        inside = separator != "" and separator in text  # the text itself shows which of the two separates
        for part in parts[text] if other != separator else ():
            pieces = _parts(part, other)
            known = [piece in labels for piece in pieces]
            if len(pieces) > 1 and ((separator and other == ";") or (all(known) if inside else any(known))):
                doubtful.append(text)
    if doubtful:
        pieces = re.split(r"[|;#,]", doubtful[0])
        several = "|".join(piece.strip() for piece in pieces if piece.strip())
        ways = f"write {shown(several)} for several, {shown(doubtful[0] + '|')} for one"
        raise InputError(f"{texts[doubtful[0]]}: is {shown(doubtful[0])} one label or several? {ways}")
    return separator


def _separates(separator: str, text: str) -> bool:
    """Whether it stands between labels, or before or after one, as some programs write it."""
    at_an_end = separator in ";," and separator in (text[:1], text[-1:])
    return separator in text if separator == "|" else at_an_end or len(_parts(text, separator)) > 1


def _unshared(parts: Mapping[str, Sequence[str]]) -> list[str]:
    """The texts of several parts none of which is known to be a label, by itself or through other texts."""
    lists = {text: set(names) for text, names in parts.items() if len(names) > 1}
    known = {names[0] for names in parts.values() if len(names) == 1} | _first_and_later(parts.values())
    while shared := [text for text, names in lists.items() if names & known]:
        known.update(*(lists.pop(text) for text in shared))
    return list(lists)


def _first_and_later(lists: Iterable[Sequence[str]]) -> set[str]:
    """What comes first in one list of several and later in another."""
    several = [names for names in lists if len(names) > 1]
    return {names[0] for names in several} & {name for names in several for name in names[1:]}


def _parts(text: str, separator: str) -> list[str]:
    parts = [part.strip() for part in text.split(separator) if part.strip()] if separator else [text]
    # "C#" is a label, "#cat" is cat.
    whole = text and separator == "#" and len(parts) < 2 and not text.lstrip().startswith("#")
    return [text] if whole else [part for part in parts if part]


def _plain(column: Any) -> str:
    name = str(column).strip().strip('"').strip().casefold()
    return "" if re.fullmatch(r"unnamed: \d+(\.\d+)?", name) else name  # pandas calls columns without a name so


def _flag(cell: Any) -> bool | None:
    """Whether a cell says yes or no; None for anything else."""
    text = "" if cell is None else str(cell).strip().casefold()
    return True if text in _YES else False if text in _NO else None


def _decoded(cell: Any, where: str) -> str | list[str] | None:
    """A cell of labels: a text, or a list, which CSV has in JSON, as {"choices": [..]}, or as Python writes it."""
    if not isinstance(cell, str):
        return _list(cell, where) if isinstance(cell, (list, dict)) else cell if cell is None else str(cell)
    text = unicodedata.normalize("NFC", cell.strip())
    if not text.startswith(("[", "{")):
        return text
    with reported(f"{where}: {shown(text)} is no list of labels", "write a|b", (ValueError, RecursionError)):
        return _list(json.loads(text if '"' in text else text.replace("'", '"')), where)


def _list(value: Any, where: str) -> list[str]:
    """The labels of a list in JSON, without those that are given twice."""
    found = value.get("choices") if isinstance(value, dict) else value
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise InputError(f"{where}: {shown(value)} is no list of labels: write a|b")
    return list(dict.fromkeys(unicodedata.normalize("NFC", name.strip()) for name in found))


def _in_order(lists: Iterable[Iterable[str]]) -> list[str]:
    """All that the lists hold, once each."""
    return list(dict.fromkeys(itertools.chain.from_iterable(lists)))
