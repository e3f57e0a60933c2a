"""Photos to arrays: decoding, resizing, normalisation, and the augmentation of training images."""

from __future__ import annotations

import io
import os
import pathlib
import stat
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import reason

MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB of RGB
MAX_BYTES = 10**9  # of the file: more than MAX_PIXELS take uncompressed, with 16 bits of four colours
CONTRAST_RANGE = (0.75, 1.25)
TRANSLATION_PERCENT = 3

_EXIF_ORIENTATION_TAG = 0x0112
_TRANSPOSE_FOR_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_photo(bytes_or_path: bytes | str | os.PathLike[str], name: str) -> np.ndarray:
    """Decodes any photo that Pillow reads, as a viewer shows it: uint8 [H, W, 3], RGB.

    Applies the EXIF orientation, puts transparent pixels on white, keeps the upper 8 bits of 16-bit grey, and takes the
    first frame of an animation. ``name`` is the photo's name in error messages.

    Raises:
      InputError: the photo is missing, corrupt, truncated, of an unknown kind, or has more than 89 million pixels.
    """
    if not isinstance(bytes_or_path, bytes):
        bytes_or_path = _bytes_of(bytes_or_path, name)
    try:
        with Image.open(io.BytesIO(bytes_or_path)) as image:
            if image.format == "EPS":
                raise ValueError("it is a PostScript program, which would have to be run")
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            transpose = _TRANSPOSE_FOR_ORIENTATION.get(_orientation(image))
            rgb = _to_rgb(image)
            return np.asarray(rgb if transpose is None else rgb.transpose(transpose))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"photo {name} has more than {MAX_PIXELS:,} pixels: shrink it or leave it out") from error
    except UnidentifiedImageError as error:
        raise InputError(f"photo {name} is not a photo of any known kind: replace the file or leave it out") from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise InputError(f"photo {name} is damaged ({reason(error)}): replace the file or leave it out") from error


def _bytes_of(path: str | os.PathLike[str], name: str) -> bytes:
    where = os.fspath(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
            raise InputError(f"photo {name} cannot be read from {where}: it is no file")
        if status.st_size > MAX_BYTES:
            raise InputError(f"photo {name} has more than {MAX_BYTES:,} bytes: shrink it or leave it out")
        return pathlib.Path(path).read_bytes()
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"photo {name} cannot be read from {where}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"photo {name!r} cannot be read: {reason(error)}") from error


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION_TAG, 1)
    except Exception:  # a photo with a damaged EXIF block is still a photo
        return 1


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
