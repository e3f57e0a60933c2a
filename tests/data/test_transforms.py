"""Decoding of every kind of photo, and resizing, normalisation and augmentation against plain NumPy."""

import io
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlfsic_jax.data import transforms
from mlfsic_jax.system.errors import DamagedCopy, InputError


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(height=12, width=20):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 20, columns * 12, (rows + columns) * 8], axis=-1).astype(np.uint8)


# --- decoding


def test_rgb_bytes_and_path_give_the_pixels(tmp_path):
    photo = gradient()
    path = tmp_path / "photo.png"
    path.write_bytes(encode(Image.fromarray(photo), "PNG"))
    np.testing.assert_array_equal(transforms.decode_photo(path, "x"), photo)
    np.testing.assert_array_equal(transforms.decode_photo(path.read_bytes(), "x"), photo)
    assert transforms.decode_photo(str(path), "x").dtype == np.uint8


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda p: p),
        (2, lambda p: p[:, ::-1]),
        (3, lambda p: p[::-1, ::-1]),
        (4, lambda p: p[::-1]),
        (5, lambda p: p.transpose(1, 0, 2)),
        (6, lambda p: np.rot90(p, -1)),
        (7, lambda p: p[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda p: np.rot90(p)),
    ],
)
def test_exif_orientation_is_applied(orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(gradient()), "PNG", exif=exif)
    np.testing.assert_array_equal(transforms.decode_photo(data, "x"), upright(gradient()))


def test_a_damaged_exif_block_does_not_cost_the_photo():
    plain = encode(Image.fromarray(gradient()), "PNG")
    damaged = encode(Image.fromarray(gradient()), "PNG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x09\x01\x12")
    np.testing.assert_array_equal(transforms.decode_photo(damaged, "x"), transforms.decode_photo(plain, "x"))


def test_grey_palette_bilevel_and_cmyk_become_rgb():
    colours = Image.fromarray(gradient())
    grey = np.asarray(colours.convert("L"))
    np.testing.assert_array_equal(
        transforms.decode_photo(encode(Image.fromarray(grey), "PNG"), "x"), np.repeat(grey[..., None], 3, axis=-1)
    )
    palette = colours.quantize(8)
    np.testing.assert_array_equal(
        transforms.decode_photo(encode(palette, "PNG"), "x"),
        np.array(palette.getpalette()[:24], np.uint8).reshape(8, 3)[np.asarray(palette)],
    )
    bilevel = np.arange(24).reshape(4, 6) % 5 == 0
    np.testing.assert_array_equal(
        transforms.decode_photo(encode(Image.fromarray(bilevel), "PNG"), "x"), bilevel[..., None] * np.full(3, 255)
    )
    ink = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # full cyan takes away all red
    red, green, blue = transforms.decode_photo(encode(ink, "TIFF"), "x")[0, 0]
    assert (red, green, blue) == (0, 255, 255)


def test_transparent_pixels_are_shown_on_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (0, 0, 0, 128)
    shown = transforms.decode_photo(encode(Image.fromarray(rgba), "PNG"), "x")
    np.testing.assert_array_equal(shown[0, 0], (10, 20, 30))
    np.testing.assert_array_equal(shown[0, 1], (127, 127, 127))
    np.testing.assert_array_equal(shown[1], 255)
    keyed = encode(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    np.testing.assert_array_equal(transforms.decode_photo(keyed, "x"), 255)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([9, 9, 9, 7, 7, 7])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = transforms.decode_photo(encode(palette, "PNG", transparency=b"\x00\xff"), "x")
    np.testing.assert_array_equal(shown, 7)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    shown = transforms.decode_photo(encode(Image.fromarray(grey), "PNG"), "x")
    np.testing.assert_array_equal(shown[..., 0], [[0, 0, 1], [128, 255, 255]])


JPEG = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>404</html>",
        JPEG[:600],
        JPEG[: len(JPEG) // 2],
        encode(Image.fromarray(gradient()), "PNG")[:-30],
        encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
    ],
)
def test_damaged_photos_are_named(data):
    with pytest.raises(InputError, match=r"photo 2007/000012 is (damaged|not a photo of any known kind)"):
        transforms.decode_photo(data, "2007/000012")


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, len(JPEG) - 1), noise=st.binary(min_size=1, max_size=40))
def test_random_damage_gives_pixels_or_an_input_error(start, noise):
    data = JPEG[:start] + noise + JPEG[start + len(noise) :]
    try:
        photo = transforms.decode_photo(data, "x")
    except InputError:
        return
    assert photo.dtype == np.uint8 and photo.ndim == 3 and photo.shape[-1] == 3


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 14_000])  # Pillow only warns about the first, and refuses the second
def test_decompression_bombs_are_refused(side):
    bomb = encode(Image.new("1", (side, side)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(InputError, match="photo x has more than 89,478,485 pixels"):
        transforms.decode_photo(bomb, "x")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    first, second = Image.new("RGB", (6, 4), (250, 0, 0)), Image.new("RGB", (6, 4), (0, 0, 250))
    options = {"lossless": True} if kind == "WEBP" else {}
    animation = encode(first, kind, save_all=True, append_images=[second], **options)
    with Image.open(io.BytesIO(animation)) as image:
        assert image.n_frames == 2
    np.testing.assert_array_equal(transforms.decode_photo(animation, "x"), np.asarray(first))


def test_the_content_counts_not_the_ending(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(JPEG)
    np.testing.assert_array_equal(transforms.decode_photo(path, "x"), transforms.decode_photo(JPEG, "x"))


def test_a_postscript_program_is_not_run(monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(InputError, match=r"photo x is damaged \(it is a PostScript program"):
        transforms.decode_photo(program, "x")


def test_what_is_no_file_or_too_large_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    for path in (tmp_path / "pipe.jpg", "/dev/zero", tmp_path):
        with pytest.raises(InputError, match=f"photo x cannot be read from {path}: it is no file"):
            transforms.decode_photo(path, "x")
    with open(tmp_path / "large.jpg", "wb") as file:
        file.write(JPEG)
        file.truncate(transforms.MAX_BYTES + 1)  # sparse
    with pytest.raises(InputError, match="photo x has more than 1,000,000,000 bytes"):
        transforms.decode_photo(tmp_path / "large.jpg", "x")
    with pytest.raises(InputError, match="photo 'a.x00b.jpg' cannot be read: embedded null byte"):
        transforms.decode_photo("a\x00b.jpg", "a\x00b.jpg")


def test_a_missing_photo_is_named(tmp_path):
    with pytest.raises(InputError, match=r"photo x cannot be read from .*absent\.jpg: No such file"):
        transforms.decode_photo(tmp_path / "absent.jpg", "x")


# --- resizing


def resize_axis(values, size):
    """Triangle filter over the first axis, widened by the scale when shrinking."""
    length = values.shape[0]
    scale = length / size
    radius = max(scale, 1.0)
    out = np.zeros((size, *values.shape[1:]))
    for i in range(size):
        centre = (i + 0.5) * scale
        weights = np.maximum(0.0, 1.0 - np.abs(np.arange(length) + 0.5 - centre) / radius)
        out[i] = np.tensordot(weights / weights.sum(), values, axes=1)
    return out


@pytest.mark.parametrize(("height", "width", "size"), [(48, 31, 16), (9, 17, 24), (16, 40, 16)])
def test_resize_is_antialiased_bilinear(height, width, size):
    photo = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    expected = resize_axis(resize_axis(photo.astype(float), size).transpose(1, 0, 2), size).transpose(1, 0, 2)
    resized = transforms.resize(photo, size)
    assert resized.shape == (size, size, 3) and resized.dtype == np.uint8
    assert np.abs(resized - expected).max() <= 1.01  # Pillow rounds to 8 bits after each axis


def test_resize_to_its_own_size_changes_nothing():
    photo = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    np.testing.assert_array_equal(transforms.resize(photo, 8), photo)


def landscape(height, width):
    """Hills, edges and grain."""
    rng = np.random.default_rng(3)
    hills = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((width, height))
    edges = rng.integers(-30, 30, (12, 16, 1)).repeat(height // 12, axis=0).repeat(width // 16, axis=1)
    return np.clip(np.asarray(hills) + edges + rng.normal(0, 4, (height, width, 1)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("height", "decoded"), [(240, 240), (480, 240), (960, 240), (1920, 240), (3840, 480)])
def test_large_jpegs_are_decoded_small_and_resized_to_the_same(height, decoded):
    photo = encode(Image.fromarray(landscape(height, height * 4 // 3)), "JPEG", quality=90)
    small = transforms.decode_photo(photo, "x", 112)
    assert small.shape == (decoded, decoded * 4 // 3, 3)
    whole = transforms.resize(transforms.decode_photo(photo, "x"), 112)
    difference = np.abs(transforms.resize(small, 112).astype(int) - whole)
    assert difference.mean() < 0.6 and difference.max() <= 10
    assert (difference.max() == 0) == (decoded == height)


def test_a_batch_is_filled_up_and_errors_stay_in_their_places():
    def read(i):
        if i == 1:
            raise InputError("photo 1 is damaged")
        return np.full((6, 9, 3), 10 * i, np.uint8)

    pixels, errors = transforms.read_batch(read, [0, 1, 2], size=4, batch=5)
    np.testing.assert_array_equal(pixels[:, 0, 0, 0], [0, 0, 20, 0, 0])
    assert pixels.shape == (5, 4, 4, 3) and [str(error) for error in errors] == ["None", "photo 1 is damaged", "None"]


def test_what_is_no_photos_fault_stops_a_batch():
    def read(_):
        raise DamagedCopy("the prepared copy is damaged")

    with pytest.raises(DamagedCopy):
        transforms.read_batch(read, [0], size=4, batch=1)


# --- normalisation and augmentation


def test_normalise_matches_numpy_for_bytes_and_floats():
    images = np.random.default_rng(2).integers(0, 256, (2, 4, 5, 3), np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (images / 255 - np.array(mean)) / np.array(std)
    normalised = transforms.normalise(images, mean, std)
    assert normalised.dtype == jnp.float32
    np.testing.assert_allclose(normalised, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(
        transforms.normalise((images / 255).astype(np.float32), mean, std), expected, rtol=2e-5, atol=1e-6
    )


augment = jax.jit(transforms.augment)
draw = jax.jit(transforms._draw, static_argnums=(1, 2, 3))


def transform_by_loop(image, down, right, contrast, flip):
    height, width, _ = image.shape
    moved = np.empty_like(image)
    for y in range(height):
        for x in range(width):
            moved[y, x] = image[min(max(y - down, 0), height - 1), min(max(x - right, 0), width - 1)]
    if flip:
        moved = moved[:, ::-1]
    mean = np.array([moved[..., c].sum() / (height * width) for c in range(3)])
    return np.minimum(np.maximum((moved - mean) * contrast + mean, 0), 1)


def test_augment_matches_a_numpy_loop_with_the_same_draws():
    images = np.random.default_rng(3).uniform(size=(6, 40, 70, 3)).astype(np.float32)
    key = jax.random.key(0)
    augmented = augment(key, images)
    assert augmented.shape == images.shape and augmented.dtype == jnp.float32
    draws = [values.tolist() for values in draw(key, len(images), 40, 70)]
    for i, (down, right, contrast, flip) in enumerate(zip(*draws, strict=True)):
        np.testing.assert_allclose(augmented[i], transform_by_loop(images[i], down, right, contrast, flip), atol=1e-5)


def test_draws_cover_their_ranges_and_nothing_more():
    down, right, contrast, flip = map(np.asarray, draw(jax.random.key(1), 4000, 70, 100))
    assert sorted(set(down.tolist())) == [-2, -1, 0, 1, 2]
    assert sorted(set(right.tolist())) == [-3, -2, -1, 0, 1, 2, 3]
    assert 0.75 <= contrast.min() < 0.76 and 1.24 < contrast.max() <= 1.25
    np.testing.assert_allclose(contrast.mean(), 1.0, atol=0.01)
    np.testing.assert_allclose(flip.mean(), 0.5, atol=0.03)


def test_a_positive_draw_moves_down_and_right():
    image, expected = np.zeros((5, 5, 3), np.float32), np.zeros((5, 5, 3), np.float32)
    image[1, 1] = expected[2, 3] = 1.0
    moved = jax.jit(transforms._transform)(image, 1, 2, 1.0, False)
    np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_augment_gives_the_same_images_for_the_same_key_and_others_for_another():
    images = np.random.default_rng(4).uniform(size=(6, 40, 70, 3)).astype(np.float32)
    first = augment(jax.random.key(0), images)
    np.testing.assert_array_equal(first, augment(jax.random.key(0), images))
    assert not np.allclose(first, augment(jax.random.key(1), images))
    assert first.min() >= 0.0 and first.max() <= 1.0
