"""Pascal VOC 2007 and 2012 from the official VOCdevkit folder, through a TFDS builder of our own.

The photos are copied once, byte for byte, into array_record files under ``prepared_dir``, with a small table of names
and labels beside them. TFDS's own "voc" needs TensorFlow to prepare; this builder does not.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import pathlib
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlfsic_jax.data.dataset import SPLITS, ImageDataset
from mlfsic_jax.data.splits import check_policy, label_split, split_images
from mlfsic_jax.data.transforms import decode_photo
from mlfsic_jax.errors import InputError
from mlfsic_jax.progress import track

LABEL_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
DISPLAY_NAMES = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}
IMAGE_SETS = {"2007": ("train", "val", "test"), "2012": ("train", "val")}  # 2012's test annotations are not public

_BUILDER_NAME, _VERSION, _TFDS_SPLIT = "voc_photos", "1.0.0", "images"
_TABLE_FILE = "table.npz"
_LAYOUT = (
    "VOC comes from http://host.robots.ox.ac.uk/pascal/VOC/ and unpacks to VOCdevkit/VOC2007 and VOCdevkit/VOC2012, "
    "each with Annotations, ImageSets/Main and JPEGImages; give the VOCdevkit folder"
)


class _Source(NamedTuple):
    """What the VOCdevkit folder holds, images in the order of their names."""

    years: tuple[str, ...]
    names: tuple[str, ...]
    photos: tuple[pathlib.Path, ...]
    annotations: tuple[bytes, ...]
    digest: str


class _Table(NamedTuple):
    """What is known of a prepared copy without opening its photos, images in the order of their names."""

    names: np.ndarray  # str [I]
    labels: np.ndarray  # bool [I, 20]
    difficult_only: np.ndarray  # bool [I, 20]
    records: np.ndarray  # int64 [I], where the image lies in the array_record files
    digest: str


def load(
    *, source: str | os.PathLike[str] | None, prepared_dir: str | os.PathLike[str], policy: str = "leakfree"
) -> ImageDataset:
    """VOC's photos and labels; whatever years and image sets the source holds are joined.

    Args:
      source: the VOCdevkit folder. It is needed only to prepare a copy: if it is gone and ``prepared_dir`` holds
        exactly one prepared copy, that one is used.
      prepared_dir: where prepared copies are kept. A source whose image lists, annotations, photo names or photo sizes
        changed gets a new copy; an unchanged one is reused.
      policy: image policy, see ``splits.split_images``.

    Returns:
      The dataset; images are called ``"2007/000012"`` and ordered by name. A label is positive if the image has an
      object of it that is not marked difficult.

    Raises:
      InputError: the source is missing, incomplete or malformed, or the prepared copy is damaged.
    """
    check_policy(policy)
    if not prepared_dir:
        raise InputError("prepared_dir is empty: give a folder that can hold a copy of VOC's photos")
    prepared_root = pathlib.Path(prepared_dir).expanduser() / _BUILDER_NAME
    source_path = pathlib.Path(source).expanduser() if source else None
    notes = []
    if source_path is not None and source_path.exists():
        copy = _prepare(_scan(source_path), prepared_root)
    else:
        copy = _only_prepared_copy(source_path, prepared_root)
        notes.append(f"The source folder {source_path or '(none given)'} is absent: the prepared copy {copy} is used.")
        print(notes[-1], file=sys.stderr, flush=True)
    table = _read_table(copy)

    years = sorted({name.split("/")[0] for name in table.names.tolist()})
    affected = int(table.difficult_only.any(axis=1).sum())
    notes.insert(0, f"Pascal VOC {' and '.join(years)}, images chosen by the {policy!r} policy.")
    notes.append(
        f"Labels of difficult objects only: {int(table.difficult_only.sum())}, in {affected} images. "
        "They are not positive and play no part in the choice of images."
    )
    notes.append(f"Images without any positive label: {int((~table.labels.any(axis=1)).sum())}.")

    label_sets = label_split("voc")
    columns = {split: np.array([LABEL_NAMES.index(name) for name in label_sets[split]]) for split in SPLITS}
    return ImageDataset(
        name="voc",
        label_names=LABEL_NAMES,
        display_names=tuple(DISPLAY_NAMES.get(name, name) for name in LABEL_NAMES),
        image_names=tuple(table.names.tolist()),
        labels=table.labels,
        load_image=_Photos(copy, table.names, table.records),
        fingerprint=_digest([table.digest, LABEL_NAMES, table.names.tolist(), np.packbits(table.labels).tobytes()]),
        splits=split_images(table.labels, columns, policy, table.difficult_only),
        notes=tuple(notes),
    )


def is_available(source: str | os.PathLike[str] | None, prepared_dir: str | os.PathLike[str]) -> bool:
    """Whether ``load`` has something to start from: the source folder or a prepared copy."""
    if source and pathlib.Path(source).expanduser().exists():
        return True
    return any((pathlib.Path(prepared_dir).expanduser() / _BUILDER_NAME).glob(f"*/{_VERSION}/{_TABLE_FILE}"))


# --- the official folder


def _scan(source: pathlib.Path) -> _Source:
    """Lists the images of every year and set that is there; their photos must exist, their annotations are read."""
    years = tuple(year for year in IMAGE_SETS if (source / f"VOC{year}").is_dir())
    if not years:
        hint = ""
        if (source / "ImageSets").is_dir():
            hint = f" (it looks like one year's folder: give {source.parent})"
        elif (source / "VOCdevkit").is_dir():
            hint = f" (give {source / 'VOCdevkit'})"
        raise InputError(f"source {source} holds neither VOC2007 nor VOC2012{hint}. {_LAYOUT}")

    found: dict[str, tuple[pathlib.Path, pathlib.Path]] = {}
    for year in years:
        folder = source / f"VOC{year}"
        for stem in _listed_images(folder, IMAGE_SETS[year]):
            found[f"{year}/{stem}"] = (folder / "JPEGImages" / f"{stem}.jpg", folder / "Annotations" / f"{stem}.xml")
    names = tuple(sorted(found))
    photos = tuple(found[name][0] for name in names)
    annotation_paths = tuple(found[name][1] for name in names)
    sizes = _sizes("photos", photos, source)
    _sizes("annotations", annotation_paths, source)
    try:
        annotations = tuple(path.read_bytes() for path in annotation_paths)
    except OSError as error:
        raise InputError(f"annotation {error.filename} cannot be read: {error.strerror}") from error
    # A difficult flag flips without a change of size, so the annotations count by content, the photos by size.
    return _Source(years, names, photos, annotations, _digest([names, sizes, *annotations]))


def _listed_images(folder: pathlib.Path, image_sets: Sequence[str]) -> list[str]:
    lists = [path for name in image_sets if (path := folder / "ImageSets" / "Main" / f"{name}.txt").is_file()]
    if not lists:
        wanted = ", ".join(f"{name}.txt" for name in image_sets)
        raise InputError(
            f"{folder / 'ImageSets' / 'Main'} holds none of {wanted}: "
            f"unpack VOC again, or move {folder.name} away. {_LAYOUT}"
        )
    stems: list[str] = []
    for path in lists:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"image list {path} cannot be read ({error}): unpack it again") from error
        for number, line in enumerate(lines, 1):
            stem = line.strip()
            if stem and not re.fullmatch(r"\w+", stem, re.ASCII):
                raise InputError(f"{path}, line {number}: {stem[:40]!r} is not an image name; unpack the list again")
            if stem:
                stems.append(stem)
    if not stems:
        raise InputError(f"the image lists in {folder / 'ImageSets' / 'Main'} are empty: unpack them again")
    return stems


def _sizes(what: str, paths: Sequence[pathlib.Path], source: pathlib.Path) -> list[int]:
    """The sizes of files that all have to be there."""
    sizes, missing = [], []
    for path in paths:
        try:
            sizes.append(path.stat().st_size)
        except OSError:
            sizes.append(0)
        if sizes[-1] == 0:
            missing.append(str(path.relative_to(source)))
    if missing:
        first = ", ".join(missing[:3]) + (", .." if len(missing) > 3 else "")
        raise InputError(
            f"{len(missing)} of the {len(paths)} {what} listed in ImageSets/Main are missing or empty under {source}: "
            f"{first}. Finish the download, or take these images out of the lists"
        )
    return sizes


def _labels_of(annotation: bytes, name: str) -> tuple[list[str], list[str]]:
    """The labels with an object that is not difficult, and those with difficult objects only."""
    where = f"the annotation of {name}"
    try:
        text = annotation.decode("utf-8-sig")
        # An annotation needs no DOCTYPE; with one, a few bytes can expand to gigabytes of entities.
        if "<!DOCTYPE" in text:
            raise InputError(f"{where} has a DOCTYPE, which VOC's never have: replace it with the official file")
        root = ElementTree.fromstring(text)
    except (UnicodeDecodeError, ElementTree.ParseError) as error:
        raise InputError(f"{where} is not valid XML ({error}): replace it with the official file") from error
    easy, difficult = set(), set()
    for thing in root.findall("object"):
        label = (thing.findtext("name") or "").strip()
        flag = (thing.findtext("difficult") or "0").strip()
        if label not in LABEL_NAMES:
            raise InputError(f"{where} names an object {label!r}, which is none of VOC's 20 labels: correct the file")
        if flag not in ("0", "1"):
            raise InputError(f"{where}, object {label!r}: difficult is {flag!r}, expected 0 or 1")
        (difficult if flag == "1" else easy).add(label)
    return sorted(easy), sorted(difficult - easy)


def _digest(parts: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        encoded = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


# --- the prepared copy


def _prepare(source: _Source, prepared_root: pathlib.Path) -> pathlib.Path:
    """The folder of the source's prepared copy, which is made if it is not there."""
    config_name = f"{'_'.join(source.years)}-{source.digest[:12]}"
    copy = prepared_root / config_name / _VERSION
    if (copy / _TABLE_FILE).is_file():
        return copy
    examples = []
    for name, photo, annotation in track(
        zip(source.names, source.photos, source.annotations, strict=True),
        total=len(source.names),
        description="reading VOC's annotations",
        unit="files",
    ):
        easy, difficult_only = _labels_of(annotation, name)
        examples.append({"image": str(photo), "filename": name, "labels": easy, "difficult_only": difficult_only})
    try:
        prepared_root.mkdir(parents=True, exist_ok=True)
        with _lock(prepared_root):
            if not (copy / _TABLE_FILE).is_file():  # another process may have made it meanwhile
                _write_copy(examples, config_name, source.digest, prepared_root, copy)
    except OSError as error:
        raise InputError(f"VOC's prepared copy cannot be made under {prepared_root}: {error}") from error
    return copy


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
    """Lets one process at a time prepare; the lock goes with the process, however that ends."""
    import fcntl  # array_record has no Windows build, so neither has this module

    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares VOC in {folder}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_copy(
    examples: list[dict[str, Any]], config_name: str, digest: str, prepared_root: pathlib.Path, copy: pathlib.Path
) -> None:
    """Prepares in a scratch folder and moves the result into place at the end, so that a copy is whole or absent."""
    import tensorflow_datasets as tfds

    scratch = prepared_root / ".preparing"
    shutil.rmtree(scratch, ignore_errors=True)  # what an interrupted run left
    try:
        with _silent_tfds():
            builder = _builder_class()(
                examples=examples, data_dir=scratch, config=tfds.core.BuilderConfig(name=config_name)
            )
            builder.download_and_prepare(file_format="array_record")
        written = pathlib.Path(builder.data_dir)
        position = {record["filename"].decode(): i for i, record in enumerate(_open_records(written))}  # TFDS shuffles
        table = _Table(
            names=np.array([example["filename"] for example in examples]),
            labels=_label_matrix([example["labels"] for example in examples]),
            difficult_only=_label_matrix([example["difficult_only"] for example in examples]),
            records=np.array([position[example["filename"]] for example in examples]),
            digest=digest,
        )
        np.savez_compressed(written / _TABLE_FILE, **table._asdict())
        shutil.rmtree(copy, ignore_errors=True)
        copy.parent.mkdir(parents=True, exist_ok=True)
        written.rename(copy)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _label_matrix(label_lists: list[list[str]]) -> np.ndarray:
    return np.array([[label in labels for label in LABEL_NAMES] for labels in label_lists], bool)  # [I, 20]


@functools.cache
def _builder_class() -> Any:
    """The TFDS builder; made on demand because importing TFDS is slow and not everybody uses VOC."""
    import tensorflow_datasets as tfds

    class VocPhotos(tfds.core.GeneratorBasedBuilder):
        """Photos of Pascal VOC as they are, with the labels of their objects."""

        VERSION = tfds.core.Version(_VERSION)

        def __init__(self, *, examples: list[dict[str, Any]], **options: Any) -> None:
            self._examples = examples
            super().__init__(**options)

        def _info(self) -> Any:
            label = tfds.features.ClassLabel(names=LABEL_NAMES)
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "filename": tfds.features.Text(),
                "labels": tfds.features.Sequence(label),
                "difficult_only": tfds.features.Sequence(label),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=self.__doc__,
                features=tfds.features.FeaturesDict(features),
                homepage="http://host.robots.ox.ac.uk/pascal/VOC/",
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {_TFDS_SPLIT: self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
            for example in track(self._examples, total=len(self._examples), description="preparing VOC", unit="photos"):
                yield example["filename"], example

    return VocPhotos


@contextlib.contextmanager
def _silent_tfds() -> Iterator[None]:
    """Keeps TFDS's bars, log lines and prints from the screen; ours go to standard error."""
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


def _only_prepared_copy(source: pathlib.Path | None, prepared_root: pathlib.Path) -> pathlib.Path:
    copies = sorted(table.parent for table in prepared_root.glob(f"*/{_VERSION}/{_TABLE_FILE}"))
    missing = f"source {source} does not exist" if source else "no source folder is given"
    if not copies:
        raise InputError(f"{missing}, and {prepared_root} holds no prepared copy of VOC. {_LAYOUT}")
    if len(copies) > 1:
        listing = ", ".join(str(copy) for copy in copies)
        raise InputError(f"{missing}, and there are several prepared copies: {listing}. Give the source, or keep one")
    return copies[0]


def _damaged(copy: pathlib.Path, reason: object) -> InputError:
    return InputError(f"the prepared copy {copy} is damaged ({reason}): delete that folder, and it is prepared anew")


def _read_table(copy: pathlib.Path) -> _Table:
    try:
        with open(copy / _TABLE_FILE, "rb") as file, np.load(file) as archive:
            table = _Table(**{field: archive[field] for field in _Table._fields})
    except Exception as error:  # a damaged archive raises zipfile's, zlib's and NumPy's errors
        raise _damaged(copy, error) from error
    return table._replace(digest=str(table.digest))


def _open_records(copy: pathlib.Path) -> Sequence[dict[str, Any]]:
    """The records of a prepared copy by position, photos still encoded."""
    import tensorflow_datasets as tfds

    with _silent_tfds():
        builder = tfds.builder_from_directory(copy)
        return builder.as_data_source(split=_TFDS_SPLIT, decoders={"image": tfds.decode.SkipDecoding()})


class _Photos:
    """``i -> uint8 [H, W, 3]``: random access to the photos of a prepared copy, which is opened at the first call."""

    def __init__(self, copy: pathlib.Path, names: np.ndarray, records: np.ndarray) -> None:
        self._copy, self._names, self._records = copy, names, records

    @functools.cached_property
    def _data_source(self) -> Sequence[dict[str, Any]]:
        return _open_records(self._copy)

    def __call__(self, i: int) -> np.ndarray:
        name = str(self._names[i])
        try:
            record = self._data_source[int(self._records[i])]
            if record["filename"].decode() != name:
                raise ValueError(f"found {record['filename']!r} in the place of {name}")
        except Exception as error:  # array_record and protobuf raise their own errors for damaged files
            raise _damaged(self._copy, error) from error
        return decode_photo(record["image"], name)
