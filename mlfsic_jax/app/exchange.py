"""What people decided, as files that other programs and ``--support`` read, and such files read back."""

import csv
import itertools
import json
import tempfile
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple
from urllib.parse import unquote

from mlfsic_jax.data.photo_files import Finder
from mlfsic_jax.data.tables import ENDINGS, Table, read_table
from mlfsic_jax.run import label_studio
from mlfsic_jax.run.labels import cell_writer
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import label_name, photo_path, shown

# kind -> name of the file, media type
KINDS = {
    "csv": ("labels.csv", "text/csv; charset=utf-8"),
    "coco": ("coco.json", "application/json"),
    "label-studio": ("label-studio.json", "application/json"),
    "label-studio-config": ("label-studio.xml", "application/xml"),  # which a project needs before it takes the tasks
}


class Marked(NamedTuple):
    """One photo for an export."""

    name: str  # relative to the folder, with slashes
    size: tuple[int, int]  # width, height in pixels, upright
    yes: tuple[str, ...]  # decided labels, in the labels' order
    no: tuple[str, ...]
    proposed: Mapping[str, float]  # undecided label -> probability; empty while not known


class _FromOutside(Finder):
    """Takes paths that lead to the folder, as predictions and exports have them: folder/a.jpg, .../folder/a.jpg."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._name = folder.resolve().name

    def find(self, name: Any, where: str) -> Path:
        path = name.replace("\\", "/") if isinstance(name, str) else ""
        path = unquote(path.partition("?d=")[2]) or path  # of Label Studio's server
        from_inside = path.startswith("./") and (self._folder / path).exists()
        if not from_inside and not path.startswith(self._tops):
            name = f"/{path}".partition(f"/{self._name}/")[2] or name
        return super().find(name, where)


class _Row(NamedTuple):
    photo: Marked
    path: str  # of the photo, as seen from the folder
    labels: list[str]  # decided and, if asked for, proposed, in the labels' order
    score: float | None  # probability of what is proposed about the least certain label; None where nothing is known


def export(
    photos: Iterable[Marked],
    label_names: Sequence[str],
    thresholds: Mapping[str, float],
    kind: str,
    proposals: bool,
    folder: str = "",
    skipped: list[str] | None = None,
) -> tuple[str, str, Iterator[bytes]]:
    """The name, media type and content, in pieces, of a file of one of ``KINDS``.

    Without ``proposals`` it has the photos with a label, or with none of all, and the labels that they were given; with
    them all photos, and undecided labels whose probability is above the threshold as well. Label Studio's tasks name
    the photos below ``folder``, as seen from the folder that its server serves. Photos whose names would not be read
    back as they are are left out, with a line for each in ``skipped``. ``InputError`` for another kind, when there is
    nothing to write, and for the name of a label that would not be read back as it is.
    """
    if kind not in KINDS:
        raise InputError(f"the format {shown(kind)} must be one of {', '.join(KINDS)}")
    for name in label_names:
        if label_name(name, "labels") != name:
            raise InputError(
                f"the label {shown(name)} has spaces around it, accents in pieces or invisible characters: rename it"
            )
    if kind == "label-studio-config":
        return *KINDS[kind], iter([label_studio.prepare(label_names, (), ".").config.encode()])
    chosen = [photo for photo in photos if proposals or _is_told(photo, label_names)]
    if not chosen:
        raise InputError("no photo has a label yet, or none of all: decide on one, or export the proposals too")
    problems = {photo.name: why for photo in chosen if (why := _problem(photo.name, kind))}
    if len(problems) == len(chosen):
        raise InputError(next(iter(problems.values())))
    if skipped is not None:
        skipped += problems.values()
    chosen = [photo for photo in chosen if photo.name not in problems]
    rows = [_row(photo, folder, label_names, thresholds if proposals else {}) for photo in chosen]
    if kind == "csv":
        lines = _csv(rows, label_names)
    elif kind == "coco":
        lines = [json.dumps(_coco(rows, label_names))]
    else:
        label_studio.prepare(label_names, (), ".")  # refuses what its configuration could not have
        lines = [json.dumps([_task(row, folder, label_names) for row in rows])]
    return *KINDS[kind], _encoded(lines)


def read(
    name: str, content: bytes, known: Collection[str], folder: Path
) -> tuple[dict[str, tuple[str, ...]], list[str], list[str]]:
    """Photo -> its labels, the names of all labels, and a line for each photo that is not ``known`` in the folder.

    ``name`` and ``content`` are a file as ``data.tables.read_table`` reads them: a CSV file, a COCO instances file,
    Label Studio's tasks and the like. ``InputError`` when it is none of these, or malformed.
    """
    ending = PurePath(name).suffix.lower()
    if ending not in ENDINGS:
        raise InputError(f"{shown(name)} must end in one of {', '.join(ENDINGS)}")
    if "\ufffd".encode() in content:  # put there by a page that took other text for UTF-8
        raise InputError(f"{shown(name)} is not UTF-8 text: save it in UTF-8")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, f"labels{ending}")
        file.write_bytes(content)
        try:
            table = _read(file, folder, set(known), prefer=_FromOutside if b"local-files/?d=" in content else None)
        except InputError as error:
            raise InputError(str(error).replace(str(file), shown(name))) from error
    found = {photo.relative_to(folder).as_posix(): tuple(names) for photo, names in table.labels.items()}
    strays = found.keys() - set(known)
    if strays and len(strays) == len(found):
        way = f"write paths as seen from {folder.resolve().name}"
        raise InputError(f"{shown(name)}: no photo of it is in the folder, such as {shown(min(strays))}: {way}")
    labels = {photo: names for photo, names in found.items() if photo not in strays}
    return labels, table.names, [f"{shown(photo)} is not among the photos" for photo in sorted(strays)]


def _read(file: Path, folder: Path, known: set[str], prefer: type[Finder] | None) -> Table:
    """The table, its paths seen from the folder or from outside of it: the way that finds more photos."""
    read, errors = {}, []
    for finder in (Finder, _FromOutside):
        try:
            table = read_table(file, finder(folder))
            found = [photo for photo in table.labels if photo.relative_to(folder).as_posix() in known]
            read[finder] = len(found), table
        except InputError as error:
            errors.append(error)
    if not read:
        raise errors[0]
    most = max(n for n, _ in read.values())
    ways = {finder: table for finder, (n, table) in read.items() if n == most}
    if len(ways) > 1 and not prefer and ways[Finder].labels != ways[_FromOutside].labels and most:
        way_out = "write paths as seen from the folder of photos, beginning with ./"
        raise InputError(f"{file}: its paths lead to other photos from {folder} and from the folder above: {way_out}")
    return ways.get(prefer) or next(iter(ways.values()))


def _problem(name: str, kind: str) -> str:
    """Why a photo's name would not be read back as it is; "" if it would."""
    if name[1:3] in (":/", ":\\"):
        return f"photo {shown(name)}: it would be read as a path on a Windows machine: rename the photo"
    if kind == "csv" and name != name.strip():
        return f"photo {shown(name)}: CSV files are read without the spaces around a name: rename the photo"
    try:
        photo_path(name, "the export", Path("the folder"))
        if kind == "label-studio":
            label_studio.address(name)
    except InputError as error:
        return str(error)
    return ""


def _is_told(photo: Marked, label_names: Sequence[str]) -> bool:
    """Whether its confirmed labels say what it shows: none of them means that it has none, not that some are open."""
    return bool(photo.yes) or len(photo.no) == len(label_names) > 0


def _row(photo: Marked, folder: str, label_names: Sequence[str], thresholds: Mapping[str, float]) -> _Row:
    """``thresholds``: none where proposals are not asked for."""
    known = {name: p for name, p in photo.proposed.items() if name in thresholds}
    labels = {*photo.yes, *(name for name, p in known.items() if p > thresholds[name])}
    score = min((p if name in labels else 1 - p for name, p in known.items()), default=None)
    # A path through a sub-folder that is called like the folder could be one from outside.
    path = f"./{photo.name}" if f"/{folder}/" in f"/{photo.name}" else photo.name
    return _Row(photo, path, [name for name in label_names if name in labels], score)


def _csv(rows: Iterable[_Row], label_names: Iterable[str]) -> Iterator[str]:
    as_text = cell_writer(label_names)
    line = csv.writer(types.SimpleNamespace(write=str)).writerow  # what is "written" is what it returns
    yield line(("file", "labels"))
    yield from (line((row.path, as_text(row.labels))) for row in rows)


def _coco(rows: Sequence[_Row], label_names: Sequence[str]) -> dict[str, Any]:
    ids = {name: i for i, name in enumerate(label_names, 1)}
    numbered = list(enumerate(rows, 1))
    marks = [(image, ids[name]) for image, row in numbered for name in row.labels]
    return {
        "images": [
            {"id": i, "file_name": row.path, "width": row.photo.size[0], "height": row.photo.size[1]}
            for i, row in numbered
        ],
        "annotations": [{"id": i, "image_id": m, "category_id": c} for i, (m, c) in enumerate(marks, 1)],
        "categories": [{"id": i, "name": name} for name, i in ids.items()],
    }


def _task(row: _Row, folder: str, label_names: Sequence[str]) -> dict[str, Any]:
    photo = row.photo
    address = label_studio.address(f"{folder}/{photo.name}" if folder else photo.name)
    decided = photo.yes if _is_told(photo, label_names) else None
    proposed = None if row.score is None else label_studio.prediction(row.labels, row.score, "app")
    return label_studio.task(address, decided, proposed)


def _encoded(texts: Iterable[str]) -> Iterator[bytes]:
    """Few large pieces of many small ones."""
    texts = iter(texts)
    while block := list(itertools.islice(texts, 1000)):
        yield "".join(block).encode()
