"""The journal of a long prediction: what a killed run finds again, and what it does not take for its own."""

import os
import resource
import signal
import types
from pathlib import Path

import numpy as np
import pytest

from mlfsic_jax.backbones.clip_text import TextFiles
from mlfsic_jax.run import inputs, journal
from mlfsic_jax.system.errors import InputError

N_LABELS = 3
RECORD = 16 + 4 * N_LABELS + 4  # bytes: key, row, CRC-32


class Killed(BaseException):
    pass


@pytest.fixture
def photos(tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(8)]
    for path in paths:
        path.write_bytes(b"photo")
    return paths


def row(i):
    return np.float32([i, i / 3, -i])  # no two photos have the same


def keep(photos, made_from="a" * 64):
    return journal.keep(photos[0].with_name("out.csv"), made_from, photos, N_LABELS)


def interrupted(photos, numbers):
    """The file of a run that ended after these photos."""
    with pytest.raises(Killed), keep(photos) as kept:
        for i in numbers:
            kept.add(i, row(i))
        raise Killed
    return photos[0].with_name("out.csv.journal")


def assert_goes_on(photos, missing):
    """A further run lacks these photos, and ends with the rows of all, in order."""
    with keep(photos) as kept:
        assert kept.missing() == missing
        for i in missing:
            kept.add(i, row(i))
        found = list(kept.rows())
        assert kept.missing() == []
    assert [photo for photo, _ in found] == photos
    np.testing.assert_array_equal([values for _, values in found], [row(i) for i in range(len(photos))])
    assert not list(photos[0].parent.glob("out*"))


def test_a_run_goes_on_with_the_photos_that_are_missing(photos):
    interrupted(photos, [0, 1, 2])
    interrupted(photos, [5, 3])  # of which one that could not be read before stands later
    assert_goes_on(photos, [4, 6, 7])


def test_rows_reach_the_file_within_a_second_and_no_photo_costs_a_call_of_its_own(photos, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    file = photos[0].with_name("out.csv.journal")
    with keep(photos) as kept:
        sizes = []
        for i in range(8):
            kept.add(i, row(i))
            sizes.append(file.stat().st_size)
            now[0] += 0.4
    header = len("predictions of mlfsic_jax ") + 64 + 1
    assert sizes == [0, 0, 0, *[header + 4 * RECORD] * 3, *[header + 7 * RECORD] * 2]  # after 1.2 s, and after 2.4


def test_a_photo_that_has_changed_is_predicted_again(photos):
    interrupted(photos, range(8))
    photos[2].write_bytes(b"another photo")
    os.utime(photos[4], ns=(0, 1))
    photos[6].unlink()
    assert_goes_on(photos, [2, 4, 6])


def test_other_photos_in_another_order_find_their_rows(photos):
    interrupted(photos, [1, 5, 6])
    with keep(photos[::-2]) as kept:  # 7, 5, 3, 1
        assert kept.missing() == [0, 2]
        assert [(photo, values[0]) for photo, values in kept.rows()] == [(photos[5], 5), (photos[1], 1)]


@pytest.mark.parametrize(
    ("damage", "missing"),
    [
        (lambda content: content[:-1], [4, 5, 6, 7]),
        (lambda content: content[: -RECORD - 1], [3, 4, 5, 6, 7]),
        (lambda content: content + bytes(1000), [5, 6, 7]),  # as a disk leaves it that loses power
        (lambda content: content[:-RECORD] + bytes(RECORD), [4, 5, 6, 7]),
        (lambda content: content[: -2 * RECORD + 20] + b"\xff" + content[-2 * RECORD + 21 :], [3, 4, 5, 6, 7]),
        (lambda content: content[:40], list(range(8))),
        (lambda content: b"", list(range(8))),
    ],
    ids=["cut", "two cut", "zeros behind", "zeros", "flipped", "header cut", "empty"],
)
def test_what_is_cut_or_damaged_is_predicted_again(photos, damage, missing, capsys):
    file = interrupted(photos, range(5))
    file.write_bytes(damage(file.read_bytes()))
    interrupted(photos, [])
    assert_goes_on(photos, missing)
    assert capsys.readouterr().out == ""


def test_a_journal_of_other_settings_is_begun_anew(photos, capsys):
    interrupted(photos, range(5))
    with pytest.raises(Killed), keep(photos, "b" * 64) as kept:
        assert kept.missing() == list(range(8))
        kept.add(0, row(0))
        raise Killed
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("out.csv.journal is of another model, method, support or other labels: starting anew")
    with keep(photos, "b" * 64) as kept:
        assert kept.missing() == [1, 2, 3, 4, 5, 6, 7]


def test_a_file_of_another_kind_is_left_alone(photos):
    file = photos[0].with_name("out.csv.journal")
    file.write_text("a diary")
    with pytest.raises(InputError, match="out.csv.journal is no journal of predictions: move it away"), keep(photos):
        pass
    assert file.read_text() == "a diary"


def test_a_second_run_for_the_same_file_is_refused(photos):
    with keep(photos) as kept:
        kept.add(0, row(0))
        with pytest.raises(InputError, match="in use, another process predicts for the same --out"), keep(photos):
            pass
        assert [values[0] for _, values in kept.rows()] == [0]
    assert_goes_on(photos, list(range(8)))


def test_a_run_that_waited_for_the_lock_does_not_take_a_removed_file(photos, monkeypatch):
    import fcntl

    path, flock = photos[0].with_name("out.csv.journal"), fcntl.flock

    def removed_meanwhile(file, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()  # as the first run does between the second's opening and locking it
        path.touch()  # a third run's

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    interrupted(photos, [0])
    assert_goes_on(photos, [1, 2, 3, 4, 5, 6, 7])


def test_nothing_is_left_where_there_is_nothing_to_go_on_from(photos):
    assert not interrupted(photos, []).exists()


def test_a_full_disk_is_one_line_and_costs_no_row_that_was_written(photos):
    with pytest.raises(Killed), keep(photos) as kept:
        kept.add(0, row(0))
        kept.write()
        size = photos[0].with_name("out.csv.journal").stat().st_size
        raise Killed
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + RECORD + 10, limits[1]))  # room for one record, and a piece
    try:
        with pytest.raises(InputError, match="out.csv.journal cannot be written .*: make room"), keep(photos) as kept:
            for i in kept.missing():
                kept.add(i, row(i))
            kept.write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_goes_on(photos, [2, 3, 4, 5, 6, 7])


def test_the_fingerprint_is_of_all_that_predictions_come_from(tmp_path):
    def made_from(**changes):
        given = {"method": "ridge", "n_shot": 1, "labels": ("a", "b"), "weight": 1.0, "manifest": {"quality": "high"}}
        given |= {"support": {tmp_path / "1.jpg": ["a"]}, "wordings": {}, "vectors": None} | changes
        stores = {"episodes": np.float32([given["weight"]])}
        trained = types.SimpleNamespace(n_shot=given["n_shot"], stores=stores)
        fields = {"manifest": given["manifest"], "backbone_variables": None, "encoder": tmp_path / "encoder"}
        predictor = types.SimpleNamespace(word_files=(tmp_path / "words.txt",), **fields)
        chosen = {"method": given["method"], "label_names": given["labels"]}
        few = types.SimpleNamespace(predictor=predictor, trained=trained, **chosen)
        return journal.fingerprint(few, given["support"], given["wordings"], given["vectors"])

    (tmp_path / "encoder").mkdir()
    for name in ("1.jpg", "2.jpg", "words.txt", "vectors.txt", "encoder/model.safetensors"):
        (tmp_path / name).write_text(name)
    first, found = made_from(), set()
    for changes in (
        *({"method": "lcm"}, {"n_shot": 5}, {"labels": ("b", "a")}, {"weight": 2.0}, {"manifest": {"quality": "low"}}),
        *({"support": {}}, {"support": {tmp_path / "1.jpg": ["b"]}}, {"support": {tmp_path / "2.jpg": ["a"]}}),
        *({"wordings": {"a": ["an a"]}}, {"vectors": str(tmp_path / "vectors.txt")}),
    ):
        found.add(made_from(**changes))
    for name in ("1.jpg", "words.txt", "encoder/model.safetensors"):
        Path(tmp_path / name).write_text("others")
        found.add(made_from())
    assert len(found) == 13 and first not in found
    os.utime(tmp_path / "1.jpg", ns=(0, 1))  # of the support the contents count
    assert made_from() in found


@pytest.mark.parametrize("kind", ["folder", "word vectors", "CLIP"])
def test_the_files_of_every_text_encoder_count(tmp_path, kind):
    files = [tmp_path / name for name in ("model", "tokenizer")]
    for file in files:
        file.write_text("a")
    encoder = {"folder": tmp_path, "word vectors": files[0], "CLIP": TextFiles(*files)}[kind]
    expected = files[:1] if kind == "word vectors" else files
    assert inputs.encoder_files(encoder) == expected
