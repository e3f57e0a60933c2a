"""LaSO's published supports, as tiny pickles in the authors' layout on a made-up COCO."""

import dataclasses
import json
import pickle
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest

from configs import coco as coco_config
from mlfsic_jax import data
from mlfsic_jax.data import coco
from mlfsic_jax.data.features import View
from mlfsic_jax.data.laso_episodes import RUNS, SHOTS, with_published_supports
from mlfsic_jax.data.splits import label_split
from mlfsic_jax.run import evaluate, inputs
from mlfsic_jax.system.errors import InputError
from tests import made_up

NOVEL = label_split("coco")["novel"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Seven photos of each novel label in train2014, whose instances file has them in a random order."""
    root, rng = tmp_path_factory.mktemp("laso") / "coco", np.random.default_rng(0)
    seen = [label for split in ("train", "validation") for label in label_split("coco")[split]]
    photos = made_up.photos_of(NOVEL, 7) + [("", [label]) for label in seen]
    photos = [(f"{i:012}", labels) for i, (_, labels) in enumerate(photos)]
    others = [(f"{900 + i:012}", labels) for i, (_, labels) in enumerate(photos[::6])]
    for name, these in (("train2014", photos), ("val2014", others)):

        def file_name(stem, name=name):
            return f"COCO_{name}_{stem}.jpg"

        shuffled = [these[i] for i in rng.permutation(len(these))]
        made_up.write_instances(root / "annotations" / f"instances_{name}.json", shuffled, coco.LABEL_NAMES, file_name)
        for stem, _ in these:
            made_up.save_photo(root / name / file_name(stem))
    return root


@pytest.fixture(scope="module")
def dataset(source):
    fields = {"prepared_dir": source.parent / "prepared", "policy": "laso", "split": "", "seed": 0}
    return data.load(types.SimpleNamespace(name="coco", source=source, **fields))


@pytest.fixture(scope="module")
def published(source):
    """(The files of every run, by name, as Python objects; names of the images of every support)."""
    content = json.loads((source / "annotations/instances_train2014.json").read_text())
    categories = sorted(category["id"] for category in content["categories"])
    name_of = {category["id"]: category["name"] for category in content["categories"]}
    labels = {image["id"]: set() for image in content["images"]}
    for annotation in content["annotations"]:
        labels[annotation["image_id"]].add(annotation["category_id"])
    files, supports, rng = {}, {}, np.random.default_rng(1)
    for n_shot in SHOTS:
        for run in range(RUNS):
            by_label = {}
            for place, category in enumerate(categories):
                if name_of[category] in NOVEL:
                    having = [i for i, image in enumerate(content["images"]) if category in labels[image["id"]]]
                    by_label[place] = rng.choice(having, n_shot, replace=False).tolist()
            used = list(dict.fromkeys(i for images in by_label.values() for i in images))
            start = f"{n_shot}shotRun{run + 1}"
            files |= {f"{start}ClassIdxDict.pkl": by_label, f"{start}UsedIndices.pkl": used}
            supports[n_shot, run] = {content["images"][i]["file_name"].removesuffix(".jpg") for i in used}
    return files, supports


def write(folder, files, protocol=3):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol))
    return folder


def numpy_integers(content):
    if isinstance(content, dict):
        return {np.int64(key): numpy_integers(value) for key, value in content.items()}
    return [np.dtype(kind).type(i) for i, kind in zip(content, ["<i8", ">i4", "u2"] * 99, strict=False)]


@pytest.mark.parametrize("protocol, numbers", [(3, lambda x: x), (2, numpy_integers), (4, numpy_integers)])
def test_the_supports_are_those_of_the_files_in_their_order(source, dataset, published, tmp_path, protocol, numbers):
    files, supports = published
    folder = write(tmp_path / "laso", {name: numbers(content) for name, content in files.items()}, protocol)
    found = with_published_supports(dataset, folder, source).only_used()
    novel = found.splits["novel"]
    assert dataset.splits["novel"].support.dtype == bool and str(folder) in data.data_card(found).replace("\n  ", "")
    view = View(None, found.split_labels("novel"), None, NOVEL, support=novel.support)
    names = [found.image_names[i].split("/") for i in novel.images]
    for n_shot in SHOTS:
        drawn, queries = evaluate.draw(None, view, RUNS, n_shot, 1)
        for run in range(RUNS):
            assert {names[i][1] for i in drawn[run]} == supports[n_shot, run]
            assert {names[i][0] for i in drawn[run]} == {"train2014"}
        expected = [i for i, (image_set, _) in enumerate(names) if image_set == "val2014"]
        assert queries.tolist() == [expected] * RUNS


def test_a_run_takes_them_from_its_config(source, published, tmp_path):
    config = coco_config.get_config("laso").unlock()
    config.data.source, config.data.episodes = str(source), str(write(tmp_path / "laso", published[0]))
    config.cache_dir, config.labels.embedding = str(source.parent / "cache"), "dataset"
    config.train_backbone, config.backbone_weights = True, ""
    support = inputs.load_dataset(config).splits["novel"].support
    assert support.dtype.names == ("pool", "1", "5") and support["1"].sum() == sum(
        len(published[1][1, run]) for run in range(RUNS)
    )


BOAT, VASE, PERSON = (coco.LABEL_NAMES.index(label) for label in ("boat", "vase", "person"))
DICT, USED = "5shotRun7ClassIdxDict.pkl", "5shotRun7UsedIndices.pkl"


def changed(change):
    """Both files of a run after a change of its images by label, so that they agree."""

    def change_files(files):
        by_label = change(files[DICT])
        return {DICT: by_label, USED: [i for images in by_label.values() for i in images]}

    return change_files


WRONG = {
    "one image": (
        changed(lambda by_label: by_label | {BOAT: [by_label[VASE][0], *by_label[BOAT][1:]]}),
        DICT + " lists train2014/COCO_train2014_[0-9]+ for 'boat', a label that it does not have: is this file",
    ),
    "another order of images": (
        changed(lambda by_label: {label: [i ^ 1 for i in images] for label, images in by_label.items()}),
        DICT + " lists train2014/COCO_train2014_[0-9]+ for '.+', a label that it does not have: is this file",
    ),
    "a seen label": (
        changed(lambda by_label: {PERSON if label == BOAT else label: i for label, i in by_label.items()}),
        DICT + " is of the labels .+, not of LaSO's 16 novel ones, .1, 8, 11, 14, 24, .+: give the folder",
    ),
    "a label less": (
        changed(lambda by_label: {label: images for label, images in by_label.items() if label != BOAT}),
        DICT + " is of the labels .+, not of LaSO's 16 novel ones",
    ),
    "labels by name": (
        lambda files: {DICT: {coco.LABEL_NAMES[label]: images for label, images in files[DICT].items()}},
        DICT + " is of the labels .+, not of LaSO's 16 novel ones",
    ),
    "no dict": (lambda files: {DICT: files[USED]}, DICT + " is of the labels .+, not of LaSO's 16 novel ones"),
    "an image too high": (
        changed(lambda by_label: by_label | {BOAT: [*by_label[BOAT], 176]}),
        "5shotRun7.+.pkl lists 176, none of the 176 training images: give the folder",
    ),
    "an image below zero": (
        changed(lambda by_label: by_label | {BOAT: [*by_label[BOAT], -1]}),
        "5shotRun7.+.pkl lists -1, none of the 176 training images",
    ),
    "names of images": (
        lambda files: {USED: [str(i) for i in files[USED]]},
        USED + " lists '[0-9]+', none of the 176 training images",
    ),
    "one image, not a list": (
        lambda files: {DICT: files[DICT] | {BOAT: files[DICT][BOAT][0]}},
        DICT + " lists [0-9]+, none of the 176 training images",
    ),
    "files that disagree": (
        lambda files: {USED: files["5shotRun8UsedIndices.pkl"]},
        USED + " lists other images than 5shotRun7ClassIdxDict.pkl: give the folder",
    ),
    "too few images": (
        changed(lambda by_label: by_label | {BOAT: by_label[BOAT][:1]}),
        DICT + " lists [0-9]+ images, with [1-4] of the rarest label, which is no support of 5 for each label",
    ),
    "a run of 5 as one of 1": (
        lambda files: {DICT.replace("5", "1"): files[DICT], USED.replace("5", "1"): files[USED]},
        "1shotRun7ClassIdxDict.pkl lists [0-9]+ images, with 5 of the rarest label, which is no support of 1 for each",
    ),
    "another object": (lambda files: {USED: set(files[USED])}, USED + " lists .+, none of the 176 training images"),
    "other numbers": (
        lambda files: {USED: [np.float64(i) for i in files[USED]]},
        USED + " cannot be read .it has numbers of the type 'f8'.: give the folder",
    ),
    "an array": (
        lambda files: {USED: np.array(files[USED])},
        USED + " cannot be read .it names numpy._?core.multiarray._reconstruct.: give the folder",
    ),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_in_one_line(source, dataset, published, tmp_path, change, message):
    folder = write(tmp_path / "laso", published[0] | change(published[0]), protocol=4)
    with pytest.raises(InputError, match=message) as caught:
        with_published_supports(dataset, folder, source)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_an_unreadable_photo_are_named(source, dataset, published, tmp_path):
    folder = write(tmp_path / "laso", published[0])
    name = min(f"train2014/{name}" for name in published[1][5, 6])
    damaged = dataclasses.replace(dataset, unreadable={name: "it is cut short"})
    with pytest.raises(InputError, match=f"pkl lists {name}, which cannot be read: get that photo again"):
        with_published_supports(damaged, folder, source)
    (folder / USED).unlink()
    with pytest.raises(InputError, match=f"{USED} cannot be read .* give the folder data_for_augmentation/"):
        with_published_supports(dataset, folder, source)
    with pytest.raises(InputError, match="nowhere/annotations/instances_train2014.json cannot be read"):
        with_published_supports(dataset, folder, tmp_path / "nowhere")


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


HOSTILE = {
    "code": pickle.dumps([Hostile()]),
    "code in a dtype": pickle.dumps(np.int64(3), 3).replace(b"numpy\ndtype", b"posix\nsystem"),
    "a place far away": b"\x80\x03]r\xff\xff\xff\x7f.",
    "an array of bytes": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
    "a long number": b"\x80\x03\x8b" + (20_000).to_bytes(4, "little") + b"\x01" * 20_000 + b".",
    "depth": b"\x80\x03})" + b"\x85" * 32_000 + b"K\x01s.",
    "length": pickle.dumps(list(range(20_000))),
    "nothing": b"",
    "a part": pickle.dumps(list(range(300)))[:-9],
    "text": b"version https://git-lfs.github.com/spec/v1\n",
    "attributes of what is called": b"\x80\x03cnumpy\ndtype\n}X\x08\x00\x00\x00__call__K\x01sb.",
}


@pytest.mark.parametrize("pickled", HOSTILE.values(), ids=HOSTILE)
def test_a_pickle_runs_no_code_and_takes_no_memory(source, dataset, published, tmp_path, pickled):
    folder = write(tmp_path / "laso", published[0])
    (folder / DICT).write_bytes(pickled)
    tracemalloc.start()
    with pytest.raises(InputError, match=DICT) as caught:
        with_published_supports(dataset, folder, source)
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()
    assert "\n" not in str(caught.value) and not Path("touched").exists()
