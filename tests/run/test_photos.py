"""Photos as a user has them: paths, images, arrays, and what is none."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mlfsic_jax.run.classifier import fit, predict_each
from mlfsic_jax.run.photos import find_photos, map_photos
from mlfsic_jax.system.errors import InputError
from tests.made_up import save_photo


def test_paths_images_and_arrays_are_the_same(model, support, tmp_path):
    few = fit(model, *support, method="ridge")
    pixels = np.asarray(Image.open(support[0][0]))
    kinds = [support[0][0], str(support[0][0]), Image.open(support[0][0]), pixels, jnp.asarray(pixels)]
    rows = [few.predict(kind).probabilities for kind in kinds]
    rows += [few.predict(kinds).probabilities[3:4], few.predict(jnp.stack([pixels] * 2)).probabilities[1:]]
    assert all(np.allclose(row, rows[0], atol=1e-6) for row in rows)

    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.dstack([pixels, pixels[..., :1]])).save(tmp_path / "clear.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    for path in sorted(tmp_path.iterdir()):
        by_path, by_image = (few.predict(photo).probabilities for photo in (path, Image.open(path)))
        np.testing.assert_allclose(by_path, by_image, atol=1e-6, err_msg=path.name)
        assert np.abs(by_path - rows[0]).max() > 1e-6


@pytest.mark.parametrize(
    ("photo", "complaint"),
    [
        ("none.png", "photo none.png cannot be read from none.png: No such file"),
        (np.zeros((4, 4, 3), np.float32), r"photo number 2 is float32 \[4, 4, 3\] \(.*\): give a path"),
        (b"bytes", r"photo number 2 is bytes \(.*\): give a path"),
        (Image.fromarray(np.zeros((4, 4), np.float32)), r"photo number 2 is Image \(.*\): give a path"),
    ],
)
def test_what_is_no_photo(model, support, photo, complaint):
    few = fit(model, *support, method="ridge")
    with pytest.raises(InputError, match=complaint):
        few.predict([support[0][0], photo])
    rows = list(predict_each(few, [support[0][0], photo, support[0][1]]))
    assert [isinstance(row, InputError) for row in rows] == [False, True, False]
    with pytest.raises(InputError, match=complaint):
        fit(model, [support[0][0], photo], ["sea", "kelp"], method="ridge")


def test_photos_are_found_by_folders_files_and_patterns(tmp_path):
    for name in ("in/a.png", "in/deep/b.JPG", "in/.hidden/c.png", "in/__MACOSX/._a.png", "in/@eaDir/a.png", "d.png"):
        save_photo(tmp_path / name)
    for name in ("in/e.HEIC", "in/f.dng", "in/g.pdf", "in/h.mpg", "in/notes.txt", "odd.dat"):
        (tmp_path / name).write_bytes(b"no photo")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")

    def found(*patterns):
        return [path.relative_to(tmp_path).as_posix() for path in find_photos([str(tmp_path / p) for p in patterns])]

    assert found("in") == ["in/a.png", "in/deep/b.JPG", "in/e.HEIC", "in/f.dng"]
    assert found("in/*") == ["in/a.png", "in/e.HEIC", "in/f.dng"]
    assert found("d.png", "in", "in/a.png") == ["d.png", "in/a.png", "in/deep/b.JPG", "in/e.HEIC", "in/f.dng"]
    assert found("odd.dat") == found("*.dat") == ["odd.dat"]  # what is asked for is tried
    for pattern, why in (("in/deep/*.gif", "is no file, no folder and no pattern"), ("in/.x", "is no file")):
        with pytest.raises(InputError, match=f"--images=.*{why}"):
            found(pattern)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="--images=.*empty holds no photos"):
        found("empty")


def test_a_photo_of_a_kind_that_cannot_be_read_says_the_way_out(tmp_path):
    save_photo(tmp_path / "a.png")
    Image.open(tmp_path / "a.png").save(tmp_path / "b.dng", "TIFF")  # whose thumbnail Pillow would take for the photo
    (errors,) = map_photos(lambda batch: batch.errors, [tmp_path / "a.png", str(tmp_path / "b.dng")], 8, 2)
    assert errors[0] is None and str(errors[1]) == f"photo {tmp_path}/b.dng cannot be read here (DNG): convert to JPEG"
