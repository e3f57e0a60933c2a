"""Pascal VOC from a small made-up VOCdevkit folder, and from the real one where it is at hand."""

import concurrent.futures
import io
import os
import pathlib
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from mlfsic_jax import data
from mlfsic_jax.data import data_card, prepared
from mlfsic_jax.data.dataset import SPLITS
from mlfsic_jax.system.errors import InputError

# year, image set, image, objects as (label, difficult)
IMAGES = [
    ("2007", "train", "000012", [("car", 0), ("car", 1)]),
    ("2007", "train", "000017", [("person", 0), ("horse", 0), ("cat", 1)]),
    ("2007", "val", "000005", [("aeroplane", 0), ("person", 0)]),
    ("2007", "test", "000001", [("dog", 0), ("person", 0), ("bus", 0)]),
    ("2007", "test", "000003", [("sheep", 1)]),
    ("2012", "train", "2008_000008", [("tvmonitor", 0)]),
    ("2012", "val", "2008_000002", [("bottle", 0), ("boat", 1)]),
]
NAMES = [
    "2007/000001",
    "2007/000003",
    "2007/000005",
    "2007/000012",
    "2007/000017",
    "2012/2008_000002",
    "2012/2008_000008",
]
CORRUPT = "2012/2008_000008"


def jpeg(seed):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def annotation(year, name, objects):
    things = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult><part><name>head</name></part></object>"
        for label, difficult in objects
    )
    return f"<annotation><folder>VOC{year}</folder><filename>{name}.jpg</filename>{things}</annotation>"


@pytest.fixture
def devkit(tmp_path):
    root = tmp_path / "VOCdevkit"
    for number, (year, image_set, name, objects) in enumerate(IMAGES):
        folder = root / f"VOC{year}"
        for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        with open(folder / "ImageSets" / "Main" / f"{image_set}.txt", "a") as file:
            file.write(f"{name}\n")
        (folder / "Annotations" / f"{name}.xml").write_text(annotation(year, name, objects))
        photo = jpeg(number)
        (folder / "JPEGImages" / f"{name}.jpg").write_bytes(photo[:400] if f"{year}/{name}" == CORRUPT else photo)
    (root / "VOC2012" / "ImageSets" / "Main" / "test.txt").write_text("2008_999999\n")  # has no public annotations
    return root


@pytest.fixture
def load(devkit, tmp_path):
    def load(**changes):
        fields = {"source": devkit, "prepared_dir": tmp_path / "prepared", "policy": "leakfree", "split": "", "seed": 0}
        return data.load(types.SimpleNamespace(name="voc", **(fields | changes)))

    return load


def test_labels_names_and_splits(load, capsys):
    dataset = load()
    assert list(dataset.image_names) == NAMES
    positive = {
        name: {dataset.label_names[c] for c in np.flatnonzero(row)}
        for name, row in zip(dataset.image_names, dataset.labels, strict=True)
    }
    assert positive == {
        "2007/000001": {"dog", "person", "bus"},
        "2007/000003": set(),
        "2007/000005": {"aeroplane", "person"},
        "2007/000012": {"car"},
        "2007/000017": {"person", "horse"},
        "2012/2008_000002": {"bottle"},
        "2012/2008_000008": {"tvmonitor"},
    }
    members = {split: [NAMES[i] for i in dataset.splits[split].images] for split in SPLITS}
    assert members == {
        "train": ["2007/000012", "2007/000017", "2012/2008_000002"],
        "validation": ["2007/000005"],
        "novel": ["2007/000001", "2012/2008_000008"],
    }
    assert dataset.labels.dtype == bool and dataset.labels.shape == (7, 20)
    assert [dataset.label_names[c] for c in dataset.splits["novel"].labels][-1] == "tvmonitor"
    assert {"dining table", "potted plant", "tv monitor", "aeroplane"} <= set(dataset.display_names)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "preparing voc: 7/7 photos" in captured.err and "tfds" not in captured.err.lower()
    card = data_card(dataset)
    assert "2007 and 2012" in card and "difficult objects only: 3, in 3 images" in card
    assert "Images without any positive label: 1." in card


def test_exclusive_policy(load):
    splits = load(policy="exclusive").splits
    assert [[NAMES[i] for i in splits[split].images] for split in SPLITS] == [
        ["2007/000012", "2007/000017", "2012/2008_000002"],
        [],
        ["2012/2008_000008"],
    ]


def test_photos_come_back_as_they_are_in_any_order_from_many_threads(load, devkit):
    dataset = load()
    readable = [i for i, name in enumerate(NAMES) if name != CORRUPT]
    expected = {}
    for i in readable:
        year, stem = NAMES[i].split("/")
        with Image.open(devkit / f"VOC{year}" / "JPEGImages" / f"{stem}.jpg") as image:
            expected[i] = np.asarray(image)
    order = np.random.default_rng(0).permutation(readable * 20)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for i, photo in zip(order, pool.map(dataset.load_image, order), strict=True):
            np.testing.assert_array_equal(photo, expected[i])


def test_a_corrupt_photo_is_named_when_it_is_read(load):
    dataset = load()
    with pytest.raises(InputError, match=f"photo {CORRUPT} is damaged"):
        dataset.load_image(NAMES.index(CORRUPT))


def test_an_unchanged_source_is_reused_and_a_changed_one_prepared_anew(load, devkit, tmp_path, monkeypatch):
    first = load()
    copies = tmp_path / "prepared" / "voc_photos"
    assert len(list(copies.glob("*/*/table.npz"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_prepare", None)
        again = load()
    assert again.fingerprint == first.fingerprint

    path = devkit / "VOC2007" / "Annotations" / "000012.xml"
    path.write_text(path.read_text().replace("<difficult>0<", "<difficult>1<"))  # the same size
    changed = load()
    assert changed.fingerprint != first.fingerprint
    assert not changed.labels[NAMES.index("2007/000012")].any()
    (devkit / "VOC2007" / "JPEGImages" / "000012.jpg").write_bytes(jpeg(50))
    repainted = load()
    assert repainted.fingerprint != changed.fingerprint
    assert repainted.load_image(NAMES.index("2007/000012")).shape == (70, 30, 3)
    photo = devkit / "VOC2007" / "JPEGImages" / "000017.jpg"
    photo.write_bytes(photo.read_bytes()[:-2] + b"\0\0")  # the same size
    assert load().fingerprint != repainted.fingerprint
    shutil.rmtree(devkit / "VOC2012")
    assert load().image_names == tuple(NAMES[:5])
    assert len(list(copies.glob("*/*/table.npz"))) == 5


def test_without_its_source_a_single_prepared_copy_is_used(load, devkit, tmp_path, capsys):
    with pytest.raises(InputError, match="does not exist, and .* no prepared copy.*host.robots.ox.ac.uk"):
        load(source=tmp_path / "nowhere")
    first = load()
    capsys.readouterr()
    moved = load(source=tmp_path / "nowhere")
    assert "nowhere is absent: using the prepared copy" in capsys.readouterr().err
    assert "nowhere is absent" in data_card(moved).replace("\n  ", " ")
    assert moved.fingerprint == first.fingerprint and moved.image_names == first.image_names
    np.testing.assert_array_equal(moved.load_image(0), first.load_image(0))
    assert load(source=None).fingerprint == first.fingerprint
    shutil.rmtree(devkit / "VOC2012")
    load()
    with pytest.raises(InputError, match="several prepared copies: .*2007-.*2007_2012-"):
        load(source=tmp_path / "nowhere")


def test_an_interrupted_preparation_goes_on(load, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "_PART_SIZE", 2)
    root = tmp_path / "prepared" / "voc_photos"
    looked_at = []
    why_unreadable = prepared._why_unreadable

    def stops_in_the_third_part(example):
        looked_at.append(example.name)
        if example.name == NAMES[4]:
            raise KeyboardInterrupt
        return why_unreadable(example)

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_why_unreadable", stops_in_the_third_part)
        with pytest.raises(KeyboardInterrupt):
            load()
    (copy,) = root.glob("2007_2012-*/*")
    assert sorted(path.name for path in copy.iterdir()) == ["part_00000", "part_00001"]
    with pytest.raises(InputError, match="no prepared copy"):  # half a copy is none
        load(source=None)

    # What a killed process would leave: half a scratch folder.
    (copy / ".preparing" / "voc_photos").mkdir(parents=True)
    (copy / ".preparing" / "voc_photos" / "junk").write_text("half")
    looked_at.clear()
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_why_unreadable", lambda e: looked_at.append(e.name) or why_unreadable(e))
        dataset = load()
    assert sorted(looked_at) == NAMES[4:]  # the first two parts were kept
    sizes = [dataset.load_image(i).shape[0] for i, name in enumerate(NAMES) if name != CORRUPT]
    assert sizes == [23, 24, 22, 20, 21, 26]
    assert list(dataset.unreadable) == [CORRUPT]


@pytest.mark.parametrize("keep", [0, 1000])
def test_a_damaged_copy_is_named(load, tmp_path, keep):
    load()
    (records,) = tmp_path.glob("prepared/voc_photos/*/*/part_00000/*.array_record*")
    records.write_bytes(records.read_bytes()[:keep])
    with pytest.raises(InputError, match="the prepared copy .* is damaged .*: delete that folder"):
        load().load_image(0)
    (table,) = tmp_path.glob("prepared/voc_photos/*/*/table.npz")
    table.write_bytes(table.read_bytes()[:keep])
    with pytest.raises(InputError, match="the prepared copy .* is damaged .*: delete that folder"):
        load()


def test_a_prepared_dir_that_cannot_be_written_is_named(load, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the prepared copy of voc cannot be made under .*file"):
        load(prepared_dir=tmp_path / "file")
    with pytest.raises(InputError, match="prepared_dir is empty"):
        load(prepared_dir="")


def break_photo(root):
    (root / "VOC2007" / "JPEGImages" / "000012.jpg").unlink()
    (root / "VOC2012" / "JPEGImages" / "2008_000002.jpg").write_bytes(b"")


def break_photo_folder(root):
    shutil.rmtree(root / "VOC2007" / "JPEGImages")


def break_annotation(root):
    (root / "VOC2007" / "Annotations" / "000012.xml").unlink()


def break_lists(root):
    shutil.rmtree(root / "VOC2012" / "ImageSets")


def empty_lists(root):
    for path in (root / "VOC2012" / "ImageSets" / "Main").iterdir():
        path.write_text("\n")


def break_list_line(root):
    (root / "VOC2007" / "ImageSets" / "Main" / "val.txt").write_text("000005\n../../etc/passwd\n")


def rewrite(text):
    return lambda root: (root / "VOC2007" / "Annotations" / "000012.xml").write_text(text)


BOMB = '<!DOCTYPE a [<!ENTITY b "car">]><annotation><object><name>&b;</name></object></annotation>'


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            break_photo,
            r"2 of the 7 photos .*: VOC2007/JPEGImages/000012.jpg, VOC2012/JPEGImages/2008_000002.jpg. Finish",
        ),
        (break_photo_folder, r"5 of the 7 photos .*000005.jpg, \.\.\. Finish the download"),
        (break_annotation, r"1 of the 7 annotations .*: VOC2007/Annotations/000012.xml. Finish"),
        (break_lists, r"VOC2012/ImageSets/Main holds none of train.txt, val.txt: unpack VOC again"),
        (empty_lists, r"the image lists in .*VOC2012/ImageSets/Main are empty"),
        (break_list_line, r"val.txt, line 2: '../../etc/passwd' is not an image name"),
        (rewrite(annotation("2007", "000012", [("wagon", 0)])), r"annotation of 2007/000012 names an object 'wagon'"),
        (rewrite(annotation("2007", "000012", [("car", 7)])), r"2007/000012, object 'car': difficult is '7'"),
        (rewrite("<annotation>"), r"annotation of 2007/000012 is not valid XML"),
        (rewrite(BOMB), r"annotation of 2007/000012 has a DOCTYPE"),
        (rewrite("<html><body>404</body></html>"), r"2007/000012 is a 'html', not an <annotation>"),
        (rewrite("<a>" * 200_000), r"annotation of 2007/000012 is not valid XML"),
        (rewrite(annotation("2007", "000012", [("x" * 10**6, 0)])), r"names an object 'xxx.*xxx', which is none"),
        (
            lambda root: shutil.rmtree(root / "VOC2007") or shutil.rmtree(root / "VOC2012"),
            "neither.*host.robots.ox.ac.uk",
        ),
    ],
)
def test_an_incomplete_or_malformed_source_is_one_clear_line(load, devkit, damage, message):
    damage(devkit)
    with pytest.raises(InputError, match=message) as caught:
        load()
    assert "\n" not in str(caught.value)


def test_folders_one_level_off_are_recognised(load, devkit):
    with pytest.raises(InputError, match=f"one year's folder: give {devkit}"):
        load(source=devkit / "VOC2007")
    with pytest.raises(InputError, match=f"give {devkit}"):
        load(source=devkit.parent)


def test_an_unknown_policy_is_refused_before_anything_is_prepared(load, tmp_path):
    with pytest.raises(InputError, match="'strict'"):
        load(policy="strict")
    assert not (tmp_path / "prepared").exists()


def test_importing_the_data_package_imports_neither_tfds_nor_tensorflow():
    code = "import sys, mlfsic_jax.data.voc; print({'tensorflow', 'tensorflow_datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_real_voc_2007(tmp_path):
    source = pathlib.Path(os.environ.get("MLFSIC_SHARED", "../shared")) / "data" / "VOCdevkit"
    if not (source / "VOC2007").is_dir():
        pytest.skip(f"no VOCdevkit at {source}; set MLFSIC_SHARED to the folder that holds data/")
    fields = {"source": source, "prepared_dir": tmp_path, "policy": "leakfree", "split": "", "seed": 0}
    dataset = data.load(types.SimpleNamespace(name="voc", **fields))
    main = source / "VOC2007" / "ImageSets" / "Main"
    for column, label in enumerate(dataset.label_names):
        truth = dict(line.split() for line in (main / f"{label}_trainval.txt").read_text().splitlines())
        positive = {f"2007/{name}" for name, flag in truth.items() if flag == "1"}
        assert {dataset.image_names[i] for i in np.flatnonzero(dataset.labels[:, column])} == positive
    for i in (0, 1234, len(dataset.image_names) - 1):
        with Image.open(source / "VOC2007" / "JPEGImages" / f"{dataset.image_names[i][5:]}.jpg") as image:
            np.testing.assert_array_equal(dataset.load_image(i), np.asarray(image))
