"""Prepared copies: a dataset's photos, byte for byte, in array_record files, and a small table of names and labels.

A hundred thousand photo files are slow to list and to read; a copy is a few dozen files with random access, written and
read by TFDS (without TensorFlow). It is made in parts, so that an interrupted run resumes.
"""

import collections
import contextlib
import functools
import hashlib
import io
import json
import os
import pathlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from mlfsic_jax.data.photo_files import why_unsupported
from mlfsic_jax.data.transforms import decode_photo
from mlfsic_jax.system.errors import DamagedCopy, InputError
from mlfsic_jax.system.files import atomic, lock, sha256
from mlfsic_jax.system.progress import track
from mlfsic_jax.system.untrusted import expand, reported, shown

_VERSION, _TFDS_SPLIT = "1.1.0", "images"
_TABLE_FILE, _PART_FILE = "table.npz", "photos.json"
_PART_SIZE = 4096  # photos
_OWN = ("folder",)  # whose source is what it is: a copy of another folder does not stand in for it
_READERS = 4


class Example(NamedTuple):
    """One photo of a source folder."""

    name: str  # unique in the dataset
    photo: pathlib.Path
    labels: Sequence[str]
    ignored: Sequence[str] = ()  # labels that do not count in the choice of images (``splits.split_images``)


class Contents(NamedTuple):
    """What a source folder holds."""

    label_names: Sequence[str]
    examples: Sequence[Example]  # in the order of their names
    notes: Sequence[str] = ()  # lines for the data card


class Source(NamedTuple):
    """A listed source folder."""

    digest: str  # changes with the photos or annotations; dates and sizes tell a photo's change
    title: str  # part of the copy's folder name
    read: Callable[[], Contents]


class Copy(NamedTuple):
    """A prepared copy, images in the order of their names."""

    names: np.ndarray  # str [I]
    label_names: np.ndarray  # str [C]
    labels: np.ndarray  # bool [I, C]
    ignored: np.ndarray  # bool [I, C]
    records: np.ndarray  # int64 [I, 2], part and place of a photo
    unreadable: np.ndarray  # str [I], why a photo cannot be read, or ""
    notes: np.ndarray  # str [N], lines for the data card
    digest: str  # of the photos' content
    path: pathlib.Path


def open_or_prepare(
    name: str,
    source: str | os.PathLike[str] | None,
    prepared_dir: str | os.PathLike[str],
    scan: Callable[[pathlib.Path], Source],
    layout: str,
) -> Copy:
    """The prepared copy of a source folder, made or finished if needed.

    Without a source, the one copy in ``prepared_dir`` is used. A source whose photos or annotations changed gets a new
    copy. ``scan`` lists a source folder; ``layout`` tells in error messages how to get and arrange it. ``InputError``
    when the source is missing, incomplete or malformed, or the prepared copy is damaged.
    """
    if not prepared_dir:
        raise InputError(f"prepared_dir is empty: give a folder for a copy of the photos of {name}")
    root = expand(prepared_dir) / f"{name}_photos"
    path = expand(source) if source else None
    if path is None or (not path.exists() and name not in _OWN):
        copy = _only_copy(name, path, root, layout)
        note = f"The source folder {path or '(none given)'} is absent: using the prepared copy {copy}."
        print(note, file=sys.stderr, flush=True)
        table = _read_table(copy)
        return table._replace(notes=np.array([*table.notes, note]))
    if not path.exists():
        raise InputError(f"{path}: no such folder; {layout}")
    scanned = scan(path)
    copy = root / f"{scanned.title}-{scanned.digest[:12]}" / _VERSION
    if not (copy / _TABLE_FILE).is_file():
        contents = scanned.read()
        waiting_for = f"another process that prepares {name} in {root}"
        cannot = f"the prepared copy of {name} cannot be made under {root}"
        errors = (OSError, RuntimeError)  # the second of array_record
        with reported(cannot, "make room, or set another folder", errors), lock(root / ".lock", waiting_for):
            if not (copy / _TABLE_FILE).is_file():  # another process may have made it meanwhile
                _prepare(name, contents, copy)
    return _read_table(copy)


def is_available(name: str, source: str | os.PathLike[str] | None, prepared_dir: str | os.PathLike[str]) -> bool:
    """Whether ``open_or_prepare`` has something to start from: the source folder or a prepared copy."""
    copies = (expand(prepared_dir) / f"{name}_photos").glob(f"*/{_VERSION}/{_TABLE_FILE}")
    return bool(source and expand(source).exists()) or (any(copies) and not (source and name in _OWN))


def digest(parts: Sequence[Any]) -> str:
    """sha256 over the parts as hex: bytes as they are, files' bytes for paths, anything else by its repr."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, pathlib.Path):
            part = bytes.fromhex(sha256(part))
        encoded = part if isinstance(part, bytes) else repr(part).encode()
        total.update(len(encoded).to_bytes(8, "little") + encoded)
    return total.hexdigest()


def missing(paths: Sequence[pathlib.Path], source: pathlib.Path, what: str = "photos that the annotations name") -> str:
    """Tells which files are missing or empty, as the start of a message; "" if none is."""
    absent = [path for path in paths if not size(path)]
    if not absent:
        return ""
    first = ", ".join(str(path.relative_to(source))[:200] for path in absent[:3]) + (", .." * (len(absent) > 3))
    return f"{len(absent)} of the {len(paths)} {what} are missing or empty under {source}: {first}"


def size(path: pathlib.Path) -> int:
    """A file's size in bytes; 0 if it is missing."""
    return stamp(path)[0]


def stamp(path: pathlib.Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds, which tell a changed file; zeros if it is missing."""
    try:
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    except OSError:
        return 0, 0


def photos(copy: Copy) -> Callable[[int], np.ndarray]:
    """``i -> uint8 [H, W, 3]``: random access to the photos of a copy, whose files are opened when first needed."""
    opening = threading.Lock()

    @functools.cache
    def records(part: int) -> Sequence[dict[str, Any]]:
        return _open_records(_part_folder(copy.path, part))

    def load_image(i: int) -> np.ndarray:
        name = str(copy.names[i])
        part, place = copy.records[i].tolist()
        with _damaged(copy.path):
            with opening:  # two threads silencing TFDS at once would leave the program silent
                opened = records(part)
            record = opened[place]
            if record["filename"].decode() != name:
                raise ValueError(f"found {record['filename']!r} in the place of {name}")
        return decode_photo(record["image"], name)

    return load_image


def _part_folder(copy: pathlib.Path, part: int) -> pathlib.Path:
    return copy / f"part_{part:05}"


def _prepare(name: str, contents: Contents, copy: pathlib.Path) -> None:
    """Writes the missing parts, then the table, whose presence marks the copy as complete."""
    examples = contents.examples
    if not examples:
        raise InputError(f"the source of {name} names no photo at all")
    twice = [photo for photo, n in collections.Counter(example.name for example in examples).items() if n > 1]
    if twice:
        raise InputError(f"the source of {name} calls two photos {shown(twice[0])}: rename one, endings do not count")
    needed = sum(size(example.photo) for example in examples)
    copy.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(copy).free
    parts = [examples[i : i + _PART_SIZE] for i in range(0, len(examples), _PART_SIZE)]
    done = sum((_part_folder(copy, i) / _PART_FILE).is_file() for i in range(len(parts)))
    if done == 0 and free < needed:
        raise InputError(f"{copy} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB: set another folder")
    if done:
        print(f"continuing the prepared copy {copy} at part {done} of {len(parts)}", file=sys.stderr, flush=True)
    remaining = sum(len(part) for part in parts[done:])
    written = _write_parts(name, parts, copy)
    for _ in track(written, total=remaining, description=f"preparing {name}", unit="photos"):
        pass
    notes = [json.loads((_part_folder(copy, i) / _PART_FILE).read_text()) for i in range(len(parts))]
    places = {n: (i, place) for i, note in enumerate(notes) for place, n in enumerate(note["names"])}
    unreadable = {n: why for note in notes for n, why in note["unreadable"].items()}
    content = {n: sha for note in notes for n, sha in zip(note["names"], note["sha256"], strict=True)}
    ignored = _label_matrix([example.ignored for example in examples], contents.label_names)
    table = {
        "names": np.array([example.name for example in examples]),
        "label_names": np.array(contents.label_names),
        "labels": _label_matrix([example.labels for example in examples], contents.label_names),
        "ignored": ignored,
        "records": np.array([places[example.name] for example in examples]),
        "unreadable": np.array([unreadable.get(example.name, "") for example in examples]),
        "notes": np.array(contents.notes, dtype=str),
        # The same photos under new dates are the same to whatever was computed from them.
        "digest": np.array(digest([[content[example.name] for example in examples], ignored.tobytes()])),
    }
    with atomic(copy / _TABLE_FILE) as part, open(part, "wb") as file:  # given a path, np.savez would append .npz
        np.savez_compressed(file, **table)


def _write_parts(name: str, parts: Sequence[Sequence[Example]], copy: pathlib.Path) -> Iterator[Example]:
    """Yields every photo after checking it; writes a part after its last photo."""
    with ThreadPoolExecutor(_READERS) as readers:
        for i, part in enumerate(parts):
            if (_part_folder(copy, i) / _PART_FILE).is_file():
                continue
            unreadable = {}
            for example, why in zip(part, readers.map(_why_unreadable, part), strict=True):
                if why:
                    unreadable[example.name] = why
                if example is part[-1]:
                    _write_part(name, part, unreadable, _part_folder(copy, i))
                yield example


def _why_unreadable(example: Example) -> str:
    if why := why_unsupported(example.photo):
        return f"photo {example.name} {why}"
    try:
        decode_photo(example.photo, example.name)
        return ""
    except InputError as error:
        return str(error)


def _write_part(name: str, part: Sequence[Example], unreadable: dict[str, str], folder: pathlib.Path) -> None:
    """Writes to a scratch folder and moves the result into place: a part is whole or absent."""
    import tensorflow_datasets as tfds

    scratch = folder.parent / ".preparing"
    shutil.rmtree(scratch, ignore_errors=True)  # what an interrupted run left
    try:
        with _silent_tfds():
            config = tfds.core.BuilderConfig(name=folder.name)
            builder = _builder_class(f"{name}_photos")(examples=part, data_dir=scratch, config=config)
            builder.download_and_prepare(file_format="array_record")
        written = pathlib.Path(builder.data_dir)
        note = {"names": [], "sha256": [], "unreadable": unreadable}
        for record in _open_records(written):  # TFDS shuffles
            note["names"].append(record["filename"].decode())
            note["sha256"].append(hashlib.sha256(record["image"]).hexdigest())
        (written / _PART_FILE).write_text(json.dumps(note))
        shutil.rmtree(folder, ignore_errors=True)
        written.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _label_matrix(label_lists: Sequence[Sequence[str]], label_names: Sequence[str]) -> np.ndarray:
    column = {label: c for c, label in enumerate(label_names)}
    matrix = np.zeros((len(label_lists), len(column)), bool)  # [I, C]
    for i, labels in enumerate(label_lists):
        matrix[i, [column[label] for label in labels]] = True
    return matrix


@functools.cache
def _builder_class(builder_name: str) -> Any:
    """The TFDS builder; made on demand, as importing TFDS is slow."""
    import tensorflow_datasets as tfds

    class Photos(tfds.core.GeneratorBasedBuilder):
        """Photos as they are, under their names; the table beside them holds their labels."""

        name = builder_name
        VERSION = tfds.core.Version(_VERSION)

        def __init__(self, *, examples: Sequence[Example], **options: Any) -> None:
            self._examples = examples
            super().__init__(**options)

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "filename": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, description=self.__doc__, features=features)

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {_TFDS_SPLIT: self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
            for example in self._examples:
                yield example.name, {"image": str(example.photo), "filename": example.name}

    return Photos


@contextlib.contextmanager
def _silent_tfds() -> Iterator[None]:
    """Hides TFDS's progress bars, log lines and prints."""
    import tensorflow_datasets as tfds
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)


def _only_copy(name: str, source: pathlib.Path | None, root: pathlib.Path, layout: str) -> pathlib.Path:
    copies = sorted(table.parent for table in root.glob(f"*/{_VERSION}/{_TABLE_FILE}"))
    if len(copies) == 1:
        return copies[0]
    missing = f"source {source} does not exist" if source else "no source folder is given"
    if not copies:
        raise InputError(f"{missing}, and {root} holds no prepared copy of {name}. {layout}")
    listing = ", ".join(map(str, copies))
    raise InputError(f"{missing}, and there are several prepared copies: {listing}. Give the source, or keep one")


@contextlib.contextmanager
def _damaged(copy: pathlib.Path) -> Iterator[None]:
    """Reports any error: array_record, protobuf, zipfile, zlib and NumPy all raise their own for damaged files."""
    try:
        with reported(f"the prepared copy {copy} is damaged", "delete that folder, and it is prepared anew"):
            yield
    except InputError as error:
        raise DamagedCopy(str(error)) from error


def _read_table(copy: pathlib.Path) -> Copy:
    with _damaged(copy), open(copy / _TABLE_FILE, "rb") as file, np.load(file) as archive:
        table = Copy(**{field: archive[field] for field in Copy._fields if field != "path"}, path=copy)
        shape, kinds = (len(table.names), len(table.label_names)), [array.dtype.kind for array in table[:-1]]
        shapes = [(shape[0],), (shape[1],), shape, shape, (shape[0], 2), (shape[0],), (len(table.notes),), ()]
        if [array.shape for array in table[:-1]] != shapes or kinds != list("UUbbiUUU"):
            raise ValueError("its table does not fit together")
    return table._replace(digest=str(table.digest))


def _open_records(folder: pathlib.Path) -> Sequence[dict[str, Any]]:
    """The records of one part by place, photos still encoded."""
    import tensorflow_datasets as tfds

    with _silent_tfds():
        builder = tfds.builder_from_directory(folder)
        return builder.as_data_source(split=_TFDS_SPLIT, decoders={"image": tfds.decode.SkipDecoding()})
