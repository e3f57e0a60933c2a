"""What is computed once per photo and read ever after: local feature maps, or resized photos, memory-mapped on disk.

A cache is a folder with ``values.npy`` (one row per image), ``progress.json`` (rows done, photos skipped) and
``manifest.json`` (what the values were made from). The folder's name holds a hash of the manifest, so values made from
other data, weights or transforms are never picked up.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from mlfsic_jax.data.dataset import ImageDataset, Split
from mlfsic_jax.data.transforms import resize
from mlfsic_jax.errors import InputError
from mlfsic_jax.files import lock, write_json
from mlfsic_jax.parallel import read_ahead
from mlfsic_jax.progress import track

_BATCH = 32  # on each device of this process
_READERS = 4
_COMMIT_EVERY = 8  # batches between two notes of progress


class Cache(NamedTuple):
    """Precomputed model inputs of a dataset.

    Attributes:
      values: [I, ...], a read-only memory map: float16 local features [h, w, n], or uint8 photos [S, S, 3].
      skipped: photo name -> why it could not be read; their rows are zero and no split may use them.
      path: the cache's folder.
    """

    values: np.ndarray
    skipped: dict[str, str]
    path: Path

    def read(self, rows: np.ndarray) -> np.ndarray:
        """``values[rows]``, int [B] -> [B, ...], in memory; of the file nothing stays mapped into it."""
        return np.load(self.path / "values.npy", mmap_mode="r")[rows]


def open_or_build(
    dataset: ImageDataset,
    *,
    cache_dir: str | Path,
    image_size: int,
    row_shape: tuple[int, ...],
    dtype: str,
    made_from: dict,
    compute: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Cache:
    """Opens the cache that belongs to these data and settings, building or finishing it first where needed.

    Args:
      dataset: the photos.
      cache_dir: where caches live.
      image_size: photos are resized to this square.
      row_shape: shape of one row.
      dtype: "float16" or "uint8".
      made_from: what else the values depend on (backbone, weights hash); goes into the manifest.
      compute: uint8 photos [B, image_size, image_size, 3] -> rows [B, *row_shape], B always the same multiple of the
        number of this process's devices; None keeps the photos.

    Raises:
      InputError: the folder cannot be written, or values leave the range of ``dtype``.
    """
    manifest = {
        "version": 1,
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "transform": f"direct resize to {image_size}, bilinear",
        "shape": [len(dataset.labels), *row_shape],
        "dtype": dtype,
        **made_from,
    }
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(cache_dir) / f"{dataset.name}-{made_from['backbone']}-{image_size}-{digest}"
    try:
        with lock(path.with_suffix(".lock"), f"another process that fills the cache {path}"):
            progress = _open(path, manifest)
            if progress["done"] < len(dataset.labels):
                _build(path, dataset, image_size, manifest, progress, compute)
    except OSError as error:
        message = f"cannot write the cache {path} ({error.strerror}): free space there, or set config.cache_dir"
        raise InputError(message) from error
    if progress["skipped"]:
        for name, why in progress["skipped"].items():
            print(f"skipped photo {name}: {why}")
        print(f"{len(progress['skipped'])} of {len(dataset.labels)} photos could not be read and are left out")
    return Cache(np.load(path / "values.npy", mmap_mode="r"), progress["skipped"], path)


def usable_splits(dataset: ImageDataset, cache: Cache) -> dict[str, Split]:
    """The dataset's splits without the photos that could not be read."""
    readable = np.array([name not in cache.skipped for name in dataset.image_names])

    def usable(split: Split) -> Split:
        keep = readable[split.images]
        support = None if split.support is None else split.support[keep]
        return split._replace(images=split.images[keep], support=support)

    return {name: usable(split) for name, split in dataset.splits.items()}


def _open(path: Path, manifest: dict) -> dict:
    """The progress of the cache at ``path``, which is started anew unless its files fit the manifest."""
    try:
        progress = json.loads((path / "progress.json").read_text())
        values = np.load(path / "values.npy", mmap_mode="r")
        fits = json.loads((path / "manifest.json").read_text()) == manifest
        if fits and list(values.shape) == manifest["shape"] and values.dtype == manifest["dtype"]:
            return progress
    except (OSError, ValueError, EOFError):  # missing, cut short or garbled: build it again
        pass
    if path.exists():
        print(f"the cache {path} is damaged: building it again")
        shutil.rmtree(path)
    path.mkdir(parents=True)
    shape = tuple(manifest["shape"])
    size = int(np.prod(shape)) * np.dtype(manifest["dtype"]).itemsize
    free = shutil.disk_usage(path).free
    if free < size:
        raise InputError(f"{path} needs {size / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB: set config.cache_dir")
    np.lib.format.open_memmap(path / "values.npy", mode="w+", dtype=manifest["dtype"], shape=shape).flush()
    write_json(path / "manifest.json", manifest)
    progress = {"done": 0, "skipped": {}}
    write_json(path / "progress.json", progress)
    return progress


def _build(path, dataset, image_size, manifest, progress, compute):
    n_images = len(dataset.labels)
    if progress["done"]:
        print(f"continuing the cache at image {progress['done']} of {n_images}")
    values = np.load(path / "values.npy", mmap_mode="r+")

    def read(i):
        try:
            return resize(dataset.load_image(i), image_size), None
        except InputError as error:
            return np.zeros((image_size, image_size, 3), np.uint8), str(error)

    what = "resizing photos" if compute is None else f"local features, {manifest['backbone']}"
    start = progress["done"]
    batch = _BATCH * jax.local_device_count()
    photos = np.zeros((batch, image_size, image_size, 3), np.uint8)  # always full: compiled once
    decoded = read_ahead(read, range(start, n_images), readers=_READERS, ahead=2 * batch)
    tracked = track(decoded, total=n_images - start, description=what, unit="images")
    for i, (photo, why) in enumerate(tracked, start):
        photos[i - start] = photo
        if why is not None:
            progress["skipped"][dataset.image_names[i]] = why
        end = i + 1
        if end - start < batch and end < n_images:
            continue
        rows = (photos if compute is None else np.asarray(compute(photos)))[: end - start].astype(manifest["dtype"])
        if not np.isfinite(rows).all():
            raise InputError(f"local features leave the range of {manifest['dtype']}: are the weights right?")
        for j in range(start, end):
            if dataset.image_names[j] in progress["skipped"]:
                rows[j - start] = 0
        values[start:end] = rows
        start = end
        if end == n_images or (end // batch) % _COMMIT_EVERY == 0:
            values.flush()
            progress["done"] = end
            write_json(path / "progress.json", progress)
