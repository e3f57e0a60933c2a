import json
import os
import time

import numpy as np
import pytest

from mlfsic_jax.data import features as feature_cache
from mlfsic_jax.data.dataset import ImageDataset, Split
from mlfsic_jax.system.errors import InputError

N, SIZE = 70, 8
ALL = np.arange(N)


def photo(i):
    return np.full((SIZE, SIZE, 3), i, np.uint8)


def make_dataset(load_image=photo, fingerprint="one"):
    images = np.arange(N, dtype=np.int32)
    split = Split(np.zeros(1, np.int32), images)
    return ImageDataset(
        name="made_up",
        label_names=("a",),
        display_names=("a",),
        image_names=tuple(f"photo-{i:02}" for i in range(N)),
        labels=np.ones((N, 1), bool),
        load_image=load_image,
        fingerprint=fingerprint,
        splits={"train": split, "validation": split, "novel": split},
    )


def build(path, dataset=None, compute=None, batch=32, **made_from):
    calls = []

    def counted(photos):
        calls.append(len(photos))
        return (compute or (lambda x: x.reshape(len(x), -1)[:, :3].astype(np.float32) / 2))(photos)

    cache = feature_cache.open_or_build(
        dataset or make_dataset(),
        cache_dir=path,
        image_size=SIZE,
        row_shape=(3,),
        dtype="float16",
        made_from={"backbone": "half"} | made_from,
        compute=counted,
        batch=batch,
    )
    return cache, calls


def test_values_are_computed_once_and_then_read(tmp_path):
    cache, calls = build(tmp_path)
    # Halves of whole numbers below 70 are exact in half precision.
    np.testing.assert_array_equal(cache.read(ALL), np.arange(N)[:, None].repeat(3, 1) / 2)
    assert cache.read(ALL).dtype == np.float16
    np.testing.assert_array_equal(cache.read(np.array([[69, 3], [3, 0]]))[..., 1] * 2, [[69, 3], [3, 0]])
    assert calls == [32, 32, 32]  # always full batches: one compiled program
    again, calls = build(tmp_path)
    assert calls == [] and again.path == cache.path


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_batches_and_threads_do_not_change_the_cache(tmp_path, batch):
    def unevenly(photos):
        time.sleep(0.001 * (photos[0, 0, 0, 0] % 3))  # some are overtaken
        return photos.reshape(len(photos), -1)[:, :3] / 2

    def load_image(i):
        if i in (0, 41):
            raise InputError(f"photo-{i:02} is cut short")
        return photo(i)

    cache, calls = build(tmp_path, make_dataset(load_image), unevenly, batch)
    assert calls == [batch] * -(-N // batch)
    np.testing.assert_array_equal(cache.read(ALL)[:, 0] * 2, np.where(np.isin(ALL, (0, 41)), 0, ALL))
    assert list(cache.skipped) == ["photo-00", "photo-41"]
    files = [(cache.path / name).read_bytes() for name in ("values.npy", "manifest.json", "progress.json")]
    other, _ = build(tmp_path / "other", make_dataset(load_image), batch=32)
    assert files == [(other.path / name).read_bytes() for name in ("values.npy", "manifest.json", "progress.json")]


@pytest.mark.parametrize("change", ["weights", "fingerprint", "photos"])
def test_other_inputs_get_another_cache(tmp_path, change):
    first, _ = build(tmp_path, weights="x")
    if change == "weights":
        other, calls = build(tmp_path, weights="y")
    else:
        other, calls = build(tmp_path, make_dataset(fingerprint="two"), weights="x")
    assert calls and other.path != first.path


def test_an_interrupted_build_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "_COMMIT_EVERY", 32)

    def fails_late(photos):
        if photos[0, 0, 0, 0] >= 32:
            raise KeyboardInterrupt
        return photos.reshape(32, -1)[:, :3] / 2

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, compute=fails_late)
    cache, calls = build(tmp_path)
    assert len(calls) == 2  # the first batch is not computed again
    np.testing.assert_array_equal(cache.read(ALL), np.arange(N)[:, None].repeat(3, 1) / 2)


@pytest.mark.parametrize("file", ["values.npy", "progress.json", "manifest.json"])
def test_a_damaged_cache_is_built_again(tmp_path, capsys, file):
    path = build(tmp_path)[0].path
    (path / file).write_bytes((path / file).read_bytes()[:20])
    cache, calls = build(tmp_path)
    assert len(calls) == 3 and "damaged" in capsys.readouterr().out
    np.testing.assert_array_equal(cache.read(ALL)[:, 0], np.arange(N) / 2)


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{}", "[" * 100_000, '{"done": 70, "skipped": {}}', '{"checksums": [[70, 1]], "skipped": [1]}'),
        *('{"checksums": [[70]], "skipped": {}}', '{"checksums": [["x", 1]], "skipped": {}}'),
    ],
    ids=range(7),
)
def test_odd_notes_of_progress_are_not_trusted(tmp_path, capsys, content):
    path = build(tmp_path)[0].path
    (path / "progress.json").write_text(content)
    cache, calls = build(tmp_path)
    assert len(calls) == 3 and "damaged" in capsys.readouterr().out
    np.testing.assert_array_equal(cache.read(ALL), np.arange(N)[:, None].repeat(3, 1) / 2)


def test_rows_that_rotted_are_computed_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(feature_cache, "_COMMIT_EVERY", 32)
    path = build(tmp_path)[0].path / "values.npy"
    content = bytearray(path.read_bytes())
    content[-(N - 40) * 3 * 2] ^= 1  # one bit of image 40, in the second of three batches
    path.write_bytes(content)
    cache, calls = build(tmp_path)
    assert len(calls) == 2 and "is damaged from image 32 on" in capsys.readouterr().out
    np.testing.assert_array_equal(cache.read(ALL), np.arange(N)[:, None].repeat(3, 1) / 2)
    assert build(tmp_path)[1] == [] and capsys.readouterr().out == ""


@pytest.mark.parametrize("disaster", [lambda path: path.unlink(), lambda path: os.truncate(path, 200)])
def test_a_disk_that_goes_during_a_run_is_told_in_one_line(tmp_path, disaster):
    cache, _ = build(tmp_path)
    disaster(cache.path / "values.npy")
    with pytest.raises(InputError, match=r"the cache .* cannot be read any more \(.*\): is its disk still there"):
        cache.read(ALL)


def test_a_manifest_that_was_changed_by_hand_is_not_trusted(tmp_path):
    path = build(tmp_path)[0].path
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "two"}))
    assert len(build(tmp_path)[1]) == 3


def test_unreadable_photos_are_named_and_left_out(tmp_path, capsys):
    def load_image(i):
        if i in (3, 69):
            raise InputError(f"photo-{i:02} is cut short")
        return photo(i)

    dataset = make_dataset(load_image)
    for _ in range(2):  # when it is built, and when it is read
        cache, _ = build(tmp_path, dataset)
        out = capsys.readouterr().out
        assert "photo-03 is cut short" in out and "2 of 70 photos" in out
    assert set(cache.skipped) == {"photo-03", "photo-69"} and not cache.read(np.array([3])).any()
    split = feature_cache.usable_splits(dataset, cache)["train"]
    assert set(range(N)) - set(split.images.tolist()) == {3, 69}


def test_photos_are_kept_as_they_are_without_a_backbone(tmp_path):
    cache = feature_cache.open_or_build(
        make_dataset(),
        cache_dir=tmp_path,
        image_size=SIZE,
        row_shape=(SIZE, SIZE, 3),
        dtype="uint8",
        made_from={"backbone": "photos"},
    )
    np.testing.assert_array_equal(cache.read(np.array([5]))[0], photo(5))


def test_features_beyond_half_precision_are_refused(tmp_path):
    with pytest.warns(RuntimeWarning, match="overflow"), pytest.raises(InputError, match="range of float16"):
        build(tmp_path, compute=lambda photos: np.full((32, 3), 1e6, np.float32))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file.*cache_dir"):
        build(tmp_path / "file")
