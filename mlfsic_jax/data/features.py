"""On-disk cache of what is computed once per photo: local feature maps, or resized photos.

A cache is a folder with ``values.npy`` (one row per image), ``progress.json`` (rows done and their checksums, photos
skipped) and ``manifest.json`` (what the values were made from). A hash of the manifest in the folder's name keeps
values of other data, weights or transforms apart; damaged rows are made again.
"""

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from mlfsic_jax.data.dataset import ImageDataset, Split
from mlfsic_jax.data.transforms import read_batch
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import lock, write_json
from mlfsic_jax.system.parallel import prefetch_batches
from mlfsic_jax.system.progress import track
from mlfsic_jax.system.untrusted import read_json

_VALUES = "values.npy"
_COMMIT_EVERY = 256  # images between two notes of progress


class View(NamedTuple):
    """One split as training and evaluation see it."""

    inputs: Callable[[np.ndarray], np.ndarray]  # rows int [B] -> [B, ...]: local features or photos of these images
    labels: np.ndarray  # bool [I, C]
    word_vectors: np.ndarray  # float32 [C, d_w]
    label_names: tuple[str, ...]  # C names, for messages
    support: np.ndarray | None = None  # [I] or None, as in ``data.Split``
    # the backbone's own classifier: () -> float32 [K, n] and [K]; of CLIP its pooling: () -> arrays by name
    head: Callable[[], tuple[np.ndarray, np.ndarray] | dict[str, np.ndarray]] | None = None
    # vectors of the labels from elsewhere, by name: "classes" -> float32 [C, d], see ``run.inputs.class_mixtures``
    named_vectors: Callable[[str], np.ndarray] | None = None

    def words(self, source: str) -> np.ndarray:
        """Vectors of the labels for ``Method.words_from``: float32 [C, d]."""
        return self.named_vectors(source) if source else self.word_vectors


class Cache(NamedTuple):
    """Precomputed model inputs of a dataset."""

    shape: tuple[int, ...]  # (I, ...) of all rows
    dtype: np.dtype  # of a row: float16 local features [h, w, n], or uint8 photos [S, S, 3]
    skipped: dict[str, str]  # photo name -> why it could not be read; their rows are zero and no split may use them
    path: Path

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Rows int [...] -> array [..., *one row]; InputError when the file has gone or is cut short."""
        # Not through a memory map, whose reader is killed (SIGBUS) where a disk has gone.
        values = np.empty((rows.size, *self.shape[1:]), self.dtype)
        try:
            with open(self.path / _VALUES, "rb", buffering=0) as file:
                first = os.path.getsize(file.fileno()) - math.prod(self.shape) * self.dtype.itemsize
                for value, row in zip(values, rows.ravel().tolist(), strict=True):
                    file.seek(first + row * value.nbytes)
                    if file.readinto(value.data.cast("B")) != value.nbytes:
                        raise OSError(errno.EIO, "it is cut short")
        except OSError as error:
            cannot = f"the cache {self.path} cannot be read any more ({error.strerror})"
            raise InputError(f"{cannot}: is its disk still there? The same command goes on") from error
        return values.reshape(*rows.shape, *self.shape[1:])


def open_or_build(
    dataset: ImageDataset,
    *,
    cache_dir: str | Path,
    image_size: int,
    row_shape: tuple[int, ...],
    dtype: str,
    made_from: dict,
    compute: Callable[[np.ndarray], np.ndarray | jax.Array] | None = None,
    batch: int = 32,
) -> Cache:
    """Opens the cache that belongs to these data and settings, building or finishing it first where needed.

    Photos are resized to squares; a row has shape ``row_shape`` and dtype "float16" or "uint8". ``made_from`` is what
    else the values depend on (backbone, weights hash). ``compute`` turns uint8 photos [batch, image_size, image_size,
    3] into rows [batch, *row_shape], and is called by several threads; without it photos are kept.

    Raises:
      InputError: the folder cannot be written, or values leave the range of ``dtype``.
    """
    made_from = {"version": 2, "dataset": dataset.name, "fingerprint": dataset.fingerprint, **made_from}
    transform = f"direct resize to {image_size}, bilinear"
    manifest = {**made_from, "transform": transform, "shape": [len(dataset.labels), *row_shape], "dtype": dtype}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(cache_dir) / f"{dataset.name}-{made_from['backbone']}-{image_size}-{digest}"
    try:
        with lock(path.with_suffix(".lock"), f"another process that fills the cache {path}"):
            progress = _open(path, manifest)
            if progress["done"] < len(dataset.labels):
                _build(path, dataset, image_size, manifest, progress, compute, batch)
    except OSError as error:
        cannot = f"cannot write the cache {path} ({error.strerror})"
        raise InputError(f"{cannot}: free space there, or set config.cache_dir") from error
    for name, why in progress["skipped"].items():
        print(f"skipped photo {name}: {why}")
    if progress["skipped"]:
        print(f"{len(progress['skipped'])} of {len(dataset.labels)} photos could not be read and are left out")
    return Cache(tuple(manifest["shape"]), np.dtype(dtype), progress["skipped"], path)


def usable_splits(dataset: ImageDataset, cache: Cache) -> dict[str, Split]:
    """The dataset's splits without the photos that could not be read."""
    readable = np.array([name not in cache.skipped for name in dataset.image_names])
    splits = {}
    for name, split in dataset.splits.items():
        keep = readable[split.images]
        support = None if split.support is None else split.support[keep]
        splits[name] = split._replace(images=split.images[keep], support=support)
    return splits


def _open(path: Path, manifest: dict) -> dict:
    """The progress of the cache at ``path``, which is started anew unless its files fit the manifest."""
    try:
        progress = read_json(path / "progress.json")
        values = np.load(path / _VALUES, mmap_mode="r")
        fits = read_json(path / "manifest.json") == manifest
        if fits and list(values.shape) == manifest["shape"] and values.dtype == manifest["dtype"]:
            return _without_damage(path, values, progress)
    except (OSError, ValueError, EOFError, KeyError, TypeError):  # missing, cut short or garbled: build it again
        pass
    if path.exists():
        print(f"the cache {path} is damaged: building it again")
        shutil.rmtree(path)
    path.mkdir(parents=True)
    shape = tuple(manifest["shape"])
    size = math.prod(shape) * np.dtype(manifest["dtype"]).itemsize
    free = shutil.disk_usage(path).free
    if free < size:
        raise InputError(f"{path} needs {size / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB: set config.cache_dir")
    np.lib.format.open_memmap(path / _VALUES, mode="w+", dtype=manifest["dtype"], shape=shape).flush()
    write_json(path / "manifest.json", manifest)
    progress = {"done": 0, "checksums": [], "skipped": {}}
    write_json(path / "progress.json", progress)
    return progress


def _without_damage(path: Path, values: np.ndarray, progress: dict) -> dict:
    """The progress up to the first rows that are not what was written, if there are any."""
    good = {"done": 0, "checksums": [], "skipped": dict(progress["skipped"])}
    for end, checksum in progress["checksums"]:
        if _checksum(values[good["done"] : end]) != checksum:
            print(f"the cache {path} is damaged from image {good['done']} on: these are computed again")
            break
        good["checksums"].append([end, checksum])
        good["done"] = end
    return good


def _checksum(rows: np.ndarray) -> int:
    return zlib.crc32(rows.data.cast("B"))


def _build(path, dataset, image_size, manifest, progress, compute, batch) -> None:
    """Computes the missing rows, noting progress every few of them."""
    n_images = len(dataset.labels)
    values = np.load(path / _VALUES, mmap_mode="r+")
    if progress["done"]:
        print(f"continuing the cache at image {progress['done']} of {n_images}")

    def computed(images):
        pixels, errors = read_batch(dataset.load_image, images, image_size, batch)
        rows = pixels if compute is None else np.asarray(compute(pixels)).astype(manifest["dtype"], copy=False)
        if not np.isfinite(rows).all():
            raise InputError(f"local features leave the range of {manifest['dtype']}: are the weights right?")
        return zip(rows, errors, strict=False)

    what = "resizing photos" if compute is None else f"local features, {manifest['backbone']}"
    start = progress["done"]
    rows = itertools.chain.from_iterable(prefetch_batches(computed, range(start, n_images), batch))
    tracked = track(rows, total=n_images - start, description=what, unit="images")
    for end, (row, error) in enumerate(tracked, start + 1):
        name = dataset.image_names[end - 1]
        if error is not None:
            progress["skipped"][name] = str(error)
        values[end - 1] = 0 if name in progress["skipped"] else row
        if end == n_images or end % _COMMIT_EVERY == 0:
            values.flush()
            progress["checksums"].append([end, _checksum(values[progress["done"] : end])])
            progress["done"] = end
            write_json(path / "progress.json", progress)
