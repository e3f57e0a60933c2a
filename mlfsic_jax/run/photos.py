"""A user's own photos: found in folders, read in batches."""

import glob
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

from mlfsic_jax.data.photo_files import is_photo, photos_below, why_unsupported
from mlfsic_jax.data.transforms import PhotoBatch, decode_photo, read_batch
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.parallel import prefetch_batches
from mlfsic_jax.system.untrusted import expand, reported

Result = TypeVar("Result")
_PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")


def is_many(photos: Any) -> bool:
    """Whether these are several photos, not a path, an image or an array [H, W, 3]."""
    if hasattr(photos, "ndim"):  # an array of NumPy, JAX or PyTorch, or a column of paths
        return photos.ndim > 3 or photos.ndim == 1
    return isinstance(photos, Iterable) and not isinstance(photos, (str, os.PathLike, Image.Image))


def map_photos(
    compute: Callable[[PhotoBatch], Result], photos: Iterable[Any], size: int, batch: int
) -> Iterator[Result]:
    """Yields ``compute`` of each ``batch`` of paths, images or arrays in order; several threads run it."""

    def read_and_compute(items):
        return compute(read_batch(lambda item: _pixels(*item, size), items, size, batch))

    return prefetch_batches(read_and_compute, enumerate(photos, 1), batch)


def _pixels(number: int, photo: Any, size: int) -> np.ndarray:
    """uint8 [H, W, 3] of a path, an image or an array, to be resized to ``size``."""
    if isinstance(photo, (str, os.PathLike)):
        if why := why_unsupported(photo):
            raise InputError(f"photo {photo} {why}")
        return decode_photo(photo, str(photo), size)
    name = f"number {number}"
    what = f"{photo.dtype} {list(photo.shape)}" if isinstance(photo, np.ndarray) else type(photo).__name__
    # An image that Pillow has not decoded yet fails as files do.
    with reported(f"photo {name} is {what}", "give a path, an image or an array uint8 [H, W, 3]"):
        image = ImageOps.exif_transpose(photo if isinstance(photo, Image.Image) else Image.fromarray(np.asarray(photo)))
        if image.mode not in (*_PNG_MODES, "F"):
            image = image.convert("RGB")
        with io.BytesIO() as file:  # transparency, 16 bits and the like are treated as in a file
            image.save(file, "png", compress_level=0)
            return decode_photo(file.getvalue(), name)


def find_photos(patterns: Sequence[str]) -> list[Path]:
    """The photos that ``--images`` names: folders with all photos in them, files, and patterns such as ``a/*.jpg``.

    Photos of a kind that cannot be read here are among them: reading them says the way out. ``InputError`` when one of
    the patterns is not there, or a folder holds no photo.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = expand(pattern)
        if path.is_dir():
            photos = photos_below(path)
        elif path.exists():
            photos = [path]
        else:
            files = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(p)]
            photos = [file for file in files if is_photo(file)] or files
        if not photos:
            why = "holds no photos" if path.is_dir() else "is no file, no folder and no pattern of files"
            raise InputError(f"--images={pattern} {why}")
        found |= dict.fromkeys(photos)
    return list(found)
