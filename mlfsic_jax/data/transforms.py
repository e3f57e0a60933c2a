"""Photos to arrays: decoding, resizing, normalisation, and the augmentation of training images."""

import io
import os
import pathlib
import stat
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mlfsic_jax.system.errors import DamagedCopy, InputError
from mlfsic_jax.system.untrusted import reason

MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB of RGB
MAX_BYTES = 10**9  # of the file: more than MAX_PIXELS take uncompressed, with 16 bits of four colours
CONTRAST_RANGE = (0.75, 1.25)
TRANSLATION_PERCENT = 3

_FLIPS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_TRANSPOSE_FOR_ORIENTATION = {number: Image.Transpose[name] for number, name in enumerate(_FLIPS, 2)}  # EXIF's numbers
_SIDEWAYS = [_TRANSPOSE_FOR_ORIENTATION[number] for number in range(5, 9)]


def decode_photo(bytes_or_path: bytes | str | os.PathLike[str], name: str, size: int | None = None) -> np.ndarray:
    """Decodes any photo that Pillow reads, as a viewer shows it: uint8 [H, W, 3], RGB.

    Applies the EXIF orientation, puts transparent pixels on white, keeps the upper 8 bits of 16-bit grey, and takes the
    first frame of an animation. ``InputError``, with the photo's name, when it is missing, corrupt, truncated, of an
    unknown kind, or has more than 89 million pixels.

    Give ``size`` where ``resize`` to that follows: a JPEG of at least four times that is then decoded at a half, a
    quarter or an eighth of its sides, never below twice ``size``. The pixels of photographs change by about half a
    level of 255, and by 10 at most; 12 million take 28 ms instead of 190.
    """
    if not isinstance(bytes_or_path, bytes):
        bytes_or_path = _bytes_of(bytes_or_path, name)
    try:
        with Image.open(io.BytesIO(bytes_or_path)) as image:
            if image.format == "EPS":
                raise ValueError("it is a PostScript program, which would have to be run")
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if size is not None:
                image.draft(None, (2 * size, 2 * size))
            image.load()
            rgb, orientation = _to_rgb(image), _orientation(image)
            return np.asarray(rgb if orientation is None else rgb.transpose(orientation))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"photo {name} has more than {MAX_PIXELS:,} pixels: shrink it or leave it out") from error
    except UnidentifiedImageError as error:
        raise InputError(f"photo {name} is not a photo of any known kind: replace the file or leave it out") from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise InputError(f"photo {name} is damaged ({reason(error)}): replace the file or leave it out") from error


def upright_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height of a photo as ``decode_photo`` gives it, from its header; (0, 0) where that cannot be read."""
    try:
        with Image.open(path) as image:
            return image.size[::-1] if _orientation(image) in _SIDEWAYS else image.size
    except Exception:  # a damaged file makes Pillow raise nearly anything
        return 0, 0


def _bytes_of(path: str | os.PathLike[str], name: str) -> bytes:
    where = os.fspath(path)
    try:
        status = os.stat(path)
        regular = stat.S_ISREG(status.st_mode)  # a pipe or a device may never end
        if regular and status.st_size <= MAX_BYTES:
            return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"photo {name} cannot be read from {where}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"photo {name!r} cannot be read: {reason(error)}") from error
    if regular:
        raise InputError(f"photo {name} has more than {MAX_BYTES:,} bytes: shrink it or leave it out")
    raise InputError(f"photo {name} cannot be read from {where}: it is no file")


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TRANSPOSE_FOR_ORIENTATION.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # a photo with a damaged EXIF block is still a photo
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):  # Pillow would clip 16-bit grey to 255 instead of scaling it
        grey = np.clip(np.asarray(image), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        photo = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo).convert("RGB")
    return image.convert("RGB")


def resize(photo: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size, size, 3], bilinear with antialiasing; no crop, which could lose an object."""
    if photo.shape[:2] == (size, size):
        return photo
    return np.asarray(Image.fromarray(photo).resize((size, size), Image.Resampling.BILINEAR))


class PhotoBatch(NamedTuple):
    """Photos of one size."""

    pixels: np.ndarray  # uint8 [B, S, S, 3], filled up with black
    errors: list[InputError | None]  # of each photo, at most B, why it cannot be read


def read_batch(read: Callable[[Any], np.ndarray], items: Sequence[Any], size: int, batch: int) -> PhotoBatch:
    """Reads at most ``batch`` photos. ``read`` turns an item into uint8 [H, W, 3], or raises ``InputError``.

    ``DamagedCopy`` is passed on: that the photo cannot be read is then not the photo's fault.
    """
    pixels, errors = np.zeros((batch, size, size, 3), np.uint8), []
    for i, item in enumerate(items):
        try:
            pixels[i] = resize(read(item), size)
            errors.append(None)
        except DamagedCopy:
            raise
        except InputError as error:
            errors.append(error)
    return PhotoBatch(pixels, errors)


def normalise(images: Any, mean: Any, std: Any) -> jax.Array:
    """Subtracts the mean f32 [3] and divides by the standard deviation f32 [3] of each colour: f32 [B, H, W, 3].

    ``images`` are uint8 [B, H, W, 3] or f32 in 0..1, as from ``augment``.
    """
    images = jnp.asarray(images)
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255.0
    return (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Random translation, contrast and horizontal flip, drawn per image: f32 [B, H, W, 3] in 0..1 -> the same.

    The translation is a whole number of pixels, up to 3 % of the side each way, and repeats the edge. The contrast
    factor about each colour's mean is uniform in 0.75..1.25; the result is clipped to 0..1.
    """
    return jax.vmap(_transform)(images, *_draw(key, *images.shape[:3]))


def _draw(key: jax.Array, n_images: int, height: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Draws (pixels down, pixels right, contrast factor, flip or not), each [n_images]."""
    # One call draws all random numbers: each call is a long program to compile.
    down, right, contrast, flip = jax.random.uniform(key, (4, n_images))
    most_down, most_right = height * TRANSLATION_PERCENT // 100, width * TRANSLATION_PERCENT // 100
    down = jnp.floor(down * (2 * most_down + 1)).astype(jnp.int32) - most_down
    right = jnp.floor(right * (2 * most_right + 1)).astype(jnp.int32) - most_right
    low, high = CONTRAST_RANGE
    return down, right, low + (high - low) * contrast, flip < 0.5


def _transform(image: jax.Array, down: jax.Array, right: jax.Array, contrast: jax.Array, flip: jax.Array) -> jax.Array:
    height, width, _ = image.shape
    rows = jnp.clip(jnp.arange(height) - down, 0, height - 1)
    columns = jnp.clip(jnp.arange(width) - right, 0, width - 1)
    columns = jnp.where(flip, columns[::-1], columns)
    image = image[rows][:, columns]  # [H, W, 3]
    mean = image.mean(axis=(0, 1))  # [3]
    return jnp.clip((image - mean) * contrast + mean, 0.0, 1.0)
