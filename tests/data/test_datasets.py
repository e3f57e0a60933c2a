"""COCO, NUS-WIDE, iMaterialist and a user's own folder, from tiny made-up copies in the official layouts."""

import json
import os
import shutil
import types

import numpy as np
import pytest
from PIL import Image

from mlfsic_jax import data
from mlfsic_jax.data import coco, data_card
from mlfsic_jax.data.dataset import SPLITS
from mlfsic_jax.data.splits import label_split
from mlfsic_jax.system.errors import InputError
from tests import made_up

POLICY = {"coco": "exclusive", "nus_wide": "leakfree", "imaterialist": "leakfree", "folder": "leakfree"}


@pytest.fixture
def load(tmp_path):
    def load(name, source, **changes):
        fields = {"prepared_dir": tmp_path / "prepared", "policy": POLICY[name], "split": "", "seed": 0}
        return data.load(types.SimpleNamespace(name=name, source=source, **(fields | changes)))

    return load


def labels_of(dataset):
    return {
        name: [dataset.label_names[c] for c in np.flatnonzero(row)]
        for name, row in zip(dataset.image_names, dataset.labels, strict=True)
    }


def test_coco(load, tmp_path):
    made_up.make_coco(tmp_path / "coco", per_label=3)
    dataset = load("coco", tmp_path / "coco")
    instances = json.loads((tmp_path / "coco/annotations/instances_val2014.json").read_text())
    names = {c["id"]: c["name"] for c in instances["categories"]}
    found = labels_of(dataset)
    for image in instances["images"]:
        wanted = {names[a["category_id"]] for a in instances["annotations"] if a["image_id"] == image["id"]}
        assert set(found["val2014/" + image["file_name"].removesuffix(".jpg")]) == wanted
    assert len(found) == 240 and dataset.label_names[0] == "person" and dataset.label_names[-1] == "toothbrush"
    assert [len(dataset.splits[split].labels) for split in SPLITS] == [52, 12, 16]
    assert [len(dataset.splits[split].images) for split in SPLITS] == [3 * 52, 3 * 12, 3 * 16]
    i = dataset.image_names.index("train2014/COCO_train2014_000000000002")
    with Image.open(tmp_path / "coco/train2014/COCO_train2014_000000000002.jpg") as photo:
        np.testing.assert_array_equal(dataset.load_image(i), np.asarray(photo))

    shutil.rmtree(tmp_path / "coco/train2014")
    (tmp_path / "coco/annotations/instances_train2014.json").unlink()
    assert len(load("coco", tmp_path / "coco").image_names) == 120  # one of the two sets is enough


def test_a_photo_of_coco_that_was_replaced_is_noticed(tmp_path):
    made_up.make_coco(tmp_path / "coco", per_label=1)
    before, photo = coco.scan(tmp_path / "coco").digest, tmp_path / "coco/train2014/COCO_train2014_000000000000.jpg"
    assert coco.scan(tmp_path / "coco").digest == before
    photo.write_bytes(photo.read_bytes()[:-2] + b"\0\0")  # the same size
    assert coco.scan(tmp_path / "coco").digest != before


def test_coco_under_lasos_protocol(load, tmp_path):
    made_up.make_coco(tmp_path / "coco", per_label=3)
    dataset = load("coco", tmp_path / "coco", policy="laso")
    names = {split: [dataset.label_names[c] for c in dataset.splits[split].labels] for split in SPLITS}
    published = label_split("coco")
    assert names["train"] == [*published["train"], *published["validation"]] and len(names["train"]) == 64
    assert names["validation"] == list(published["validation"]) and names["novel"] == list(published["novel"])
    found = labels_of(dataset)
    for split, image_set, novel in (("train", "train2014", False), ("validation", "val2014", False)):
        for i in dataset.splits[split].images:
            name = dataset.image_names[i]
            assert name.startswith(image_set) and bool(set(found[name]) & set(names["novel"])) == novel
    novel = dataset.splits["novel"]
    assert [dataset.image_names[i].startswith("train2014") for i in novel.images] == novel.support.tolist()
    assert len(novel.images) == 48 and all(
        set(found[dataset.image_names[i]]) & set(names["novel"]) for i in novel.images
    )


def test_the_label_matrix_of_the_real_coco(shared):
    """The counts that Yan et al.'s rule gives; they also stand in the authors' baseline."""
    with np.load(shared / "data" / "coco2014_labels80.npz") as archive:
        labels, names, image_set = archive["labels"].astype(bool), archive["names"].tolist(), archive["split"]
    columns = {split: np.array([names.index(n) for n in label_split("coco")[split]]) for split in SPLITS}
    splits = data.splits.split_images(labels, columns, "exclusive")
    assert [len(splits[split].images) for split in SPLITS] == [26_690, 8_306, 3_934]
    novel = labels[np.ix_(splits["novel"].images, splits["novel"].labels)].sum(axis=0)
    assert novel.min() == 14 and label_split("coco")["novel"][novel.argmin()] == "backpack"
    laso = data.splits.laso_split(labels, columns, image_set == "train")
    # Counted with plain loops over the rows: images of train2014 without, and of either set with, a novel label.
    novel_columns = set(columns["novel"].tolist())
    rows = [set(np.flatnonzero(row).tolist()) for row in labels]
    with_novel = [bool(row & novel_columns) for row in rows]
    assert len(laso["train"].images) == sum(
        s == "train" and not n and bool(row) for s, n, row in zip(image_set, with_novel, rows, strict=True)
    )
    assert len(laso["novel"].images) == sum(with_novel)


def test_nus_wide(load, tmp_path):
    made_up.make_nus_wide(tmp_path / "nus", per_label=3)
    dataset = load("nus_wide", tmp_path / "nus")
    found = labels_of(dataset)
    assert len(found) == 3 * 81 and found["place/0000_0"] == ["airport"]
    assert found["place/0002_2"] == ["airport", "animal"]  # the neighbour in the split
    assert [len(dataset.splits[split].labels) for split in SPLITS] == [52, 12, 17]
    assert "1 of the 244 photos listed are not in images/" in data_card(dataset)
    assert dataset.load_image(0).shape == dataset.load_image(1).shape == (40, 44, 3)


def test_imaterialist(load, tmp_path):
    made_up.make_imaterialist(tmp_path / "fashion", per_label=2)
    dataset = load("imaterialist", tmp_path / "fashion")
    found = labels_of(dataset)
    assert len(found) == 92 and found[f"{0:032x}"] == ["top, t-shirt, sweatshirt"]
    assert found[f"{1:032x}"] == ["top, t-shirt, sweatshirt", "pants"]
    assert [len(dataset.splits[split].labels) for split in SPLITS] == [18, 12, 16]


@pytest.mark.parametrize("kind", ["labels", "columns", "instances", "folders"])
def test_a_users_folder(load, tmp_path, kind):
    made_up.make_folder(tmp_path / "mine", kind, per_label=4)
    dataset = load("folder", tmp_path / "mine", split="auto")
    assert dataset.label_names == made_up.FOLDER_LABELS and len(dataset.image_names) == 32
    expected = sorted(names for _, names in made_up.photos_of(made_up.FOLDER_LABELS, 4))
    assert sorted(labels_of(dataset).values()) == expected  # in sub-folders, copies of a photo are one image
    columns = [c for split in SPLITS for c in dataset.splits[split].labels]
    assert sorted(columns) == list(range(8)) and [len(dataset.splits[s].labels) for s in SPLITS] == [4, 2, 2]
    assert load("folder", tmp_path / "mine", split="auto").fingerprint == dataset.fingerprint
    other = [load("folder", tmp_path / "mine", split="auto", seed=s).splits["novel"].labels.tolist() for s in range(5)]
    assert len({tuple(labels) for labels in other}) > 1

    (tmp_path / "split.json").write_text(
        json.dumps({"train": ["beach", "dune"], "validation": ["rock", "tide"], "novel": ["pine tree", "sea"]})
    )
    dataset = load("folder", tmp_path / "mine", split=str(tmp_path / "split.json"))
    assert [dataset.label_names[c] for c in dataset.splits["novel"].labels] == ["pine tree", "sea"]
    with pytest.raises(InputError, match="no label split is known for 'folder'"):
        load("folder", tmp_path / "mine")


def test_links_to_a_photo_are_one_image_and_namesakes_are_two(load, tmp_path):
    root = tmp_path / "mine"
    for label in "abcde":
        made_up.save_photo(root / label / "0001.png", size=(40 + ord(label), 40))
    os.link(root / "a" / "0001.png", root / "b" / "0002.png")
    (root / "c" / "0003.png").symlink_to(root / "a" / "0001.png")
    found = labels_of(load("folder", root, split="auto"))
    one_each = {f"{label}/0001.png": [label] for label in "bcde"}
    assert found == {"a/0001.png": ["a", "b", "c"], **one_each}


def test_labels_in_any_script_and_accents_however_they_are_written(load, tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"  # the same word, as Windows and as macOS write it
    labels = [
        composed,
        "\u6d77",
        "\u0634\u0627\u0637\u0626",
        "\U0001f3d6\ufe0f sand",
        "\u0437\u0438\u043c\u0430",
        decomposed,
    ]
    for i in range(len(labels) * 4):
        made_up.save_photo(tmp_path / "mine" / f"{i}.png")
    rows = [f"{i}.png,{label}" for i, label in enumerate(labels * 4)]
    (tmp_path / "mine/labels.csv").write_text("\n".join(["file,labels", *rows]), encoding="utf-8")
    (tmp_path / "split.json").write_text(
        json.dumps({"train": [decomposed], "validation": labels[1:3], "novel": labels[3:5]})
    )
    dataset = load("folder", tmp_path / "mine", split=str(tmp_path / "split.json"))
    assert dataset.label_names == tuple(sorted(labels[:5]))
    assert dataset.labels[:, dataset.label_names.index(composed)].sum() == 8
    assert composed in data_card(dataset) and labels[3] in data_card(dataset)
    shutil.rmtree(tmp_path / "mine")
    for i, label in enumerate(labels[:5]):
        made_up.save_photo(tmp_path / "mine" / label / f"{i}.png")
        made_up.save_photo(tmp_path / "mine" / (decomposed if label == composed else label) / f"{i}b.png")
    assert load("folder", tmp_path / "mine", split="auto").label_names == dataset.label_names


def test_odd_photos_of_a_folder_are_what_a_viewer_shows(load, tmp_path):
    photos = {
        name: Image.new("RGB", (48, 40), colour)
        for name, colour in zip("abcde", ("red", "blue", "green", "grey", "white"), strict=True)
    }
    (tmp_path / "mine/a").mkdir(parents=True)
    photos["a"].save(tmp_path / "mine/a/really_a_jpeg.png", "JPEG", quality=100)
    photos["a"].convert("CMYK").save(tmp_path / "mine/a/cmyk.jpg", quality=100)
    for name in "bcde":
        (tmp_path / "mine" / name).mkdir()
        photos[name].save(tmp_path / f"mine/{name}/animated.gif", save_all=True, append_images=[photos["a"]])
    (tmp_path / "mine/b/text.jpg").write_text("<html>")
    dataset = load("folder", tmp_path / "mine", split="auto")
    assert list(dataset.unreadable) == ["b/text.jpg"]
    for i, name in enumerate(dataset.image_names):
        if name not in dataset.unreadable:
            expected = np.asarray(photos[name[0]]).astype(int)
            assert np.abs(dataset.load_image(i) - expected).max() <= 3, name  # JPEG's colours


def test_a_large_field_in_one_dataset_allows_none_in_another(load, tmp_path):
    made_up.make_imaterialist(tmp_path / "fashion", per_label=2)  # one of its fields has 200,000 characters
    load("imaterialist", tmp_path / "fashion")
    made_up.make_folder(tmp_path / "mine", "labels", per_label=2)
    (tmp_path / "mine/labels.csv").write_text("file,labels\nphotos/0001.png," + "a|" * 100_000)
    with pytest.raises(InputError, match=r"labels.csv cannot be read \(field larger than field limit"):
        load("folder", tmp_path / "mine", split="auto")
    load("imaterialist", tmp_path / "fashion")


def test_unreadable_photos_are_listed(load, tmp_path):
    made_up.make_folder(tmp_path / "mine", "labels", per_label=4)
    cut = tmp_path / "mine/photos/0003.png"
    cut.write_bytes(cut.read_bytes()[:100])
    dataset = load("folder", tmp_path / "mine", split="auto")
    assert list(dataset.unreadable) == ["photos/0003.png"] and "damaged" in dataset.unreadable["photos/0003.png"]
    assert "Photos that cannot be read: 1." in data_card(dataset)


def test_only_used_images_are_kept(load, tmp_path):
    made_up.make_coco(tmp_path / "coco", per_label=3)
    whole = load("coco", tmp_path / "coco", policy="laso")
    used = whole.only_used()
    assert len(used.labels) < len(whole.labels) and used.fingerprint != whole.fingerprint
    for split in SPLITS:
        assert [used.image_names[i] for i in used.splits[split].images] == [
            whole.image_names[i] for i in whole.splits[split].images
        ]
        np.testing.assert_array_equal(used.split_labels(split), whole.split_labels(split))
    i = used.splits["novel"].images[-1]
    np.testing.assert_array_equal(used.load_image(i), whole.load_image(whole.image_names.index(used.image_names[i])))
    assert used.only_used() is used


def remove(path):
    return lambda root: shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()


def write(path, text):
    return lambda root: (root / path).write_text(text)


def edit(path, change):
    def do(root):
        content = json.loads((root / path).read_text())
        change(content)
        (root / path).write_text(json.dumps(content))

    return do


VAL = "annotations/instances_val2014.json"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "coco",
            lambda root: [remove(x)(root) for x in ("annotations", "train2014", "val2014")],
            "neither train2014 nor",
        ),
        ("coco", remove(VAL), "instances_val2014.json is missing: unpack annotations_trainval2014.zip"),
        ("coco", remove("val2014"), "photo folder .*val2014 is missing: unpack val2014.zip"),
        ("coco", remove("val2014/COCO_val2014_000000000001.jpg"), "1 of the 160 photos .*val2014_000000000001.jpg"),
        ("coco", write(VAL, '{"images": ['), "instances_val2014.json is not valid JSON"),
        ("coco", write(VAL, "[]"), "is not a COCO instances file"),
        ("coco", write(VAL, "[" * 200_000), "not valid JSON .it is nested too deeply"),
        ("coco", write(VAL, '{"images": [], "images": []}'), "it repeats the key 'images' in one object"),
        ("coco", edit(VAL, lambda c: c["images"].append(c["images"][0])), "gives two of its images the same id"),
        (
            "coco",
            edit(VAL, lambda c: c["categories"].append({"id": 1, "name": "x"})),
            "gives two of its categories the same id",
        ),
        (
            "coco",
            edit(VAL, lambda c: c["images"].append(c["images"][0] | {"id": 7777})),
            "names the photo 'COCO_val2014_000000000001.jpg' twice",
        ),
        (
            "coco",
            lambda root: [
                shutil.copy(
                    root / "val2014/COCO_val2014_000000000001.jpg", root / "val2014/COCO_val2014_000000000001.png"
                ),
                edit(VAL, lambda c: c["images"].append({"id": 7777, "file_name": "COCO_val2014_000000000001.png"}))(
                    root
                ),
            ],
            "calls two photos 'val2014/COCO_val2014_000000000001': rename one",
        ),
        (
            "coco",
            edit(VAL, lambda c: c["images"][0].update(file_name="x" * 5000)),
            "a photo's path of 5000 characters, 'x",
        ),
        ("coco", edit(VAL, lambda c: c["images"][0].update(file_name="")), "'' must be the path of a photo"),
        ("coco", edit(VAL, lambda c: c["images"][0].update(file_name=[[]])), "must be the path of a photo"),
        (
            "coco",
            edit(VAL, lambda c: c["images"][0].update(file_name="a\x00.jpg")),
            r"'a.x00.jpg' contains a character that",
        ),
        (
            "coco",
            edit(VAL, lambda c: c["categories"][0].update(name="\ud800")),
            r"the label '.ud800' contains a line break or",
        ),
        ("coco", edit(VAL, lambda c: c["categories"][0].update(name=None)), "None is not a label name"),
        ("coco", edit(VAL, lambda c: c["annotations"].append({"image_id": 7777, "category_id": 1})), "7777"),
        (
            "coco",
            edit(VAL, lambda c: c["categories"][0].update(name="unicorn")),
            "'unicorn', which is none of COCO's 80",
        ),
        (
            "coco",
            edit(VAL, lambda c: c["images"][0].update(file_name="../x.jpg")),
            "'../x.jpg' must be the path of a photo inside",
        ),
        ("nus_wide", remove("ImageList"), "Imagelist.txt missing. NUS-WIDE"),
        ("nus_wide", remove("Groundtruth"), "Labels_airport.txt and 80 more files missing"),
        ("nus_wide", remove("images"), "no photo folder: expected one of Flickr, images"),
        ("nus_wide", write("Groundtruth/AllLabels/Labels_sun.txt", "1\n0\n"), "Labels_sun.txt has 2 lines, but .* 163"),
        (
            "nus_wide",
            write("Groundtruth/AllLabels/Labels_sun.txt", "2\n" * 163),
            "Labels_sun.txt, line 1: '2', expected 0",
        ),
        (
            "nus_wide",
            write("ImageList/Imagelist.txt", "..\\evil.jpg\n" * 163),
            "line 1: '../evil.jpg' must be the path of a photo inside",
        ),
        ("nus_wide", lambda root: [p.unlink() for p in (root / "images").rglob("*.jpg")], "none of the 163 photos"),
        ("imaterialist", remove("train.csv"), "train.csv is missing. Get iMaterialist"),
        ("imaterialist", remove("train"), "train is missing. Get iMaterialist"),
        ("imaterialist", write("train.csv", "a,b\n1,2\n"), "needs the columns ImageId and ClassId"),
        ("imaterialist", write("train.csv", "ImageId,ClassId\nx.jpg,77_1\n"), "line 2: ClassId '77_1' is no category"),
        (
            "imaterialist",
            write("train.csv", "ImageId,ClassId\n../x.jpg,7\n"),
            "'../x.jpg' must be the path of a photo inside",
        ),
        (
            "imaterialist",
            write("train.csv", "ImageId,ClassId\nx.jpg,7\n"),
            "1 of the 1 photos .* missing or empty under .*: train/x",
        ),
        ("imaterialist", write("label_descriptions.json", "{}"), "no readable list of categories"),
        (
            "imaterialist",
            write("label_descriptions.json", '{"categories": [{"id": 1e999, "name": "x"}]}'),
            "no readable list of categories .cannot convert float infinity",
        ),
        (
            "imaterialist",
            write("train.csv", "ClassId,ImageId\n7\n"),
            "line 2: expected 2 fields, as the first line has",
        ),
        ("imaterialist", write("train.csv", "ImageId,ClassId\nx.jpg,7,8\n"), "line 2: expected 2 fields"),
        (
            "imaterialist",
            write("train.csv", 'ImageId,ClassId\n"x.jpg,7\ny.jpg,7\n'),
            "train.csv cannot be read .unexpected",
        ),
        (
            "imaterialist",
            write("train.csv", "ImageId,ClassId\na\x00.jpg,7\n"),
            "contains a character that cannot be printed",
        ),
        (
            "imaterialist",
            edit("label_descriptions.json", lambda c: c["categories"][0].update(name="toga")),
            "46 categories, see 'shirt, blouse'|'toga'",
        ),
        (
            "folder",
            lambda root: [remove(x)(root) for x in ("labels.csv", "photos")],
            "no labels.csv, no labels.json and no",
        ),
        ("folder", write("labels.csv", ""), "line 1: the columns must be file,labels or"),
        ("folder", write("labels.csv", "name,labels\nx,y\n"), "line 1: the columns must be file,labels or"),
        ("folder", write("labels.csv", "file,labels\nphotos/0001.png\n"), "line 2: expected 2 fields"),
        ("folder", write("labels.csv", "file,labels\nphotos/0001.png,a,b\n"), "line 2: expected 2 fields"),
        (
            "folder",
            write("labels.csv", "file,labels\n/etc/passwd,a\n"),
            "line 2: '/etc/passwd' must be the path of a photo",
        ),
        ("folder", write("labels.csv", "file,labels\nphotos/0001.png,a|a\n"), "line 2: a label occurs twice"),
        ("folder", write("labels.csv", "file,labels\nphotos/9.png,a\n"), "1 of the 1 photos .*: photos/9.png"),
        ("folder", write("labels.csv", "file,labels\nphotos/0001.png,\n"), "no photo of .* has a label"),
        (
            "folder",
            write("labels.csv", "file,a,b\nphotos/0001.png,1,yes\n"),
            "line 2, column 'b': 'yes', expected 0 or 1",
        ),
        ("folder", write("labels.csv", "file,labels\nphotos/0001.png,a\n"), "at least 5 labels, .*; found 'a'"),
        (
            "folder",
            write("labels.csv", "file,a,b\nphotos/0001.png,1,1\nphotos/0001.png,0,1\n"),
            "line 3: 'photos/0001.png' occurs twice",
        ),
        ("folder", write("labels.csv", "file,a,b,a\nphotos/0001.png,1,0,1\n"), "line 1: a column occurs twice in"),
        (
            "folder",
            write("labels.csv", "file,labels\na\x00.png,a\n"),
            r"line 2: 'a.x00.png' contains a character that cannot",
        ),
        (
            "folder",
            write("labels.csv", 'file,labels\nphotos/0001.png,"a\nb"\n'),
            r"line 3: the label 'a.nb' contains a line br",
        ),
        (
            "folder",
            write("labels.csv", "file,labels\nphotos/0001.png," + "a" * 300),
            "line 2: a label of 300 characters",
        ),
        (
            "folder",
            write("labels.csv", "file,labels\nphotos/0001.png," + "a" * 10**6),
            "cannot be read .field larger than",
        ),
        ("folder", write("labels.csv", 'file,labels\n"photos/0001.png,a\n'), "cannot be read .unexpected end of data"),
        (
            "folder",
            lambda root: [remove("labels.csv")(root), made_up.save_photo(root / "a\nb" / "1.png")],
            r"a sub-folder of .*: the label 'a.nb' contains a line break",
        ),
        (
            "folder",
            lambda root: [
                remove("labels.csv")(root),
                made_up.save_photo(root / "a/1.png"),
                (root / "a/1.png").rename(root / "a/caf\udce9.png"),  # Latin-1, as in old archives
            ],
            r"'caf.udce9.png' contains a character that cannot be printed: rename the photo",
        ),
        (
            "folder",
            lambda root: (root / "labels.csv").write_bytes(b"file,labels\n\xff\xfe,a\n"),
            "cannot be read .*UTF-8",
        ),
    ],
)
def test_a_wrong_layout_is_one_clear_line(load, tmp_path, name, damage, message):
    root = tmp_path / "source"
    if name == "folder":
        made_up.make_folder(root, "labels", per_label=2)
    else:
        getattr(made_up, f"make_{name}")(root, per_label=2)
    damage(root)
    with pytest.raises(InputError, match=message) as caught:
        load(name, root, split="auto" if name == "folder" else "")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON with the lists"),
        ('{"train": ["a"]}', "must be JSON with the lists"),
        (
            '{"train": "sea", "validation": "rock", "novel": "dune"}',
            "must be JSON with the lists .*one of them is no list",
        ),
        ("[" * 200_000, "must be JSON with the lists .*nested too deeply"),
        ('{"train": ["sea"], "train": ["rock"]}', "must be JSON with the lists .*repeats the key 'train'"),
        ('{"train": [["sea"]], "validation": ["rock"], "novel": ["dune"]}', r"\['sea'\] is not a label name"),
        ('{"train": ["sea"], "validation": [], "novel": ["rock"]}', "has no validation label"),
        ('{"train": ["sea"], "validation": ["sae"], "novel": ["rock"]}', "'sae', which the dataset does not have"),
        ('{"train": ["sea"], "validation": ["rock"], "novel": ["sea"]}', "'sea' twice"),
        ('{"train": ["sea"], "validation": ["rock", "tide"], "novel": ["dune"]}', "has one novel label, .* is 100 %"),
        ('{"train": ["sea"], "validation": ["rock"], "novel": ["dune", "tide"]}', "has one validation label"),
    ],
)
def test_a_wrong_label_split_is_one_clear_line(tmp_path, content, message):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(InputError, match=message):
        data.splits.read_label_split(tmp_path / "split.json", made_up.FOLDER_LABELS)
    with pytest.raises(InputError, match="cannot be read .*No such file"):
        data.splits.read_label_split(tmp_path / "none.json", made_up.FOLDER_LABELS)


def test_lasos_protocol_is_cocos_only(load, tmp_path):
    made_up.make_folder(tmp_path / "mine", "labels", per_label=2)
    with pytest.raises(InputError, match="a protocol for COCO, not for folder"):
        load("folder", tmp_path / "mine", policy="laso", split="auto")
