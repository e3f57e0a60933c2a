"""A user's photos in the layouts that annotation tools write and people keep, each with the labels it has to give."""

import csv
import json
import os
import shutil
import types

import pytest

from mlfsic_jax import data
from mlfsic_jax.data import folder
from mlfsic_jax.system.errors import DamagedCopy, InputError
from tests.made_up import save_photo, write_instances

LABELS = ["cat", "dog", "boat"]


def save_photos(root, *names):
    for name in names:
        save_photo(root / name)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def read(root):
    """Photo -> its labels, and the notes."""
    contents = folder.scan(root).read()
    return {example.name: list(example.labels) for example in contents.examples}, "\n".join(contents.notes)


def refused(root, message):
    with pytest.raises(InputError, match=message) as caught:
        folder.scan(root)
    assert "\n" not in str(caught.value)


# --- splits


def test_image_folders_in_splits_have_the_labels_within(tmp_path):
    save_photos(tmp_path, "train/cat/1.png", "train/dog/2.png", "valid/dog/3.png", "test/cat/4.png", "test/5.png")
    shutil.copy(tmp_path / "train/cat/1.png", tmp_path / "valid/dog/1.png")
    labels, notes = read(tmp_path)
    assert labels == {
        "train/cat/1.png": ["cat", "dog"],  # a copy lies in valid/dog
        "train/dog/2.png": ["dog"],
        "valid/dog/3.png": ["dog"],
        "test/cat/4.png": ["cat"],
    }
    assert "Photos of test/, train/, valid/ are read together" in notes and "1 photos of test/ lie in no sub" in notes


def test_one_split_and_splits_within_a_folder_of_the_same_name(tmp_path):
    save_photos(tmp_path, "training_set/training_set/cats/1.png", "training_set/training_set/dogs/2.png")
    assert read(tmp_path)[0] == {
        "training_set/training_set/cats/1.png": ["cats"],
        "training_set/training_set/dogs/2.png": ["dogs"],
    }


@pytest.mark.parametrize(
    "split", ["train", "Valid", "val", "test", "train2017", "test_set", "validation", "val-images"]
)
def test_splits_beside_labels_are_refused(tmp_path, split):
    save_photos(tmp_path, f"{split}/1.png", "cat/2.png", "dog/3.png")
    refused(tmp_path, f"holds {split}/ which look like splits, beside 'cat': .*labels.csv")
    shutil.rmtree(tmp_path / split)
    (tmp_path / split).mkdir()  # without photos it is in nobody's way
    assert read(tmp_path)[0] == {"cat/2.png": ["cat"], "dog/3.png": ["dog"]}


@pytest.mark.parametrize("label", ["trainer", "valve", "testament", "evaluator", "train station", "developer"])
def test_labels_that_begin_like_splits_are_labels(tmp_path, label):
    save_photos(tmp_path, f"{label}/1.png", "cat/2.png")
    assert read(tmp_path)[0] == {f"{label}/1.png": [label], "cat/2.png": ["cat"]}


def test_unlabelled_splits_are_refused(tmp_path):
    save_photos(tmp_path, "train/1.png", "test/2.png")
    refused(tmp_path, "holds no labels.csv, no labels.json and no photos in sub-folders")


def test_folders_without_a_word_about_labels_are_refused(tmp_path):
    save_photos(tmp_path, "images/1.png", "masks/2.png")
    refused(tmp_path, "nothing tells the labels of the photos in 'images'")
    shutil.move(tmp_path / "images", tmp_path / "train" / "images")
    shutil.move(tmp_path / "masks", tmp_path / "train" / "masks")
    refused(tmp_path, "nothing tells the labels of the photos in 'images'")


# --- tools


def test_roboflow_coco(tmp_path):
    for split, photos in (("train", [("1", ["cat", "dog"]), ("2", ["boat"])]), ("valid", [("3", ["dog"]), ("4", [])])):
        write_instances(tmp_path / split / "_annotations.coco.json", photos, ["animals", *LABELS], "p{}.png".format)
        save_photos(tmp_path / split, *(f"p{stem}.png" for stem, _ in photos))
    write(tmp_path / "README.roboflow.txt", "exported")
    labels, notes = read(tmp_path)
    assert labels == {
        "train/p1.png": ["cat", "dog"],
        "train/p2.png": ["boat"],
        "valid/p3.png": ["dog"],
        "valid/p4.png": [],
    }
    assert "train/_annotations.coco.json, valid/_annotations.coco.json" in notes and "read together" in notes
    dataset = folder.scan(tmp_path).read()
    assert list(dataset.label_names) == ["boat", "cat", "dog"]  # the group that no photo has is no label


def test_roboflow_multi_label_classification(tmp_path):
    write(tmp_path / "train/_classes.csv", "filename, cat, dog\n1.png, 1, 0\n2.png, 1, 1\n")
    write(tmp_path / "test/_classes.csv", "filename, cat, dog\n3.png, 0, 1\n")
    save_photos(tmp_path, "train/1.png", "train/2.png", "test/3.png")
    assert read(tmp_path)[0] == {"train/1.png": ["cat"], "train/2.png": ["cat", "dog"], "test/3.png": ["dog"]}


@pytest.mark.parametrize("place", ["images/default", "images", "default", "."])
def test_cvat_coco(tmp_path, place):
    photos = [("1", ["cat", "dog"]), ("2", ["boat"])]
    write_instances(tmp_path / "annotations/instances_default.json", photos, LABELS, "{}.png".format)
    save_photos(tmp_path / place, "1.png", "2.png")
    prefix = "" if place == "." else f"{place}/"
    assert read(tmp_path)[0] == {f"{prefix}1.png": ["cat", "dog"], f"{prefix}2.png": ["boat"]}


def test_cvat_coco_of_several_subsets(tmp_path):
    for subset, names in (("Train", ["cat"]), ("Test", ["dog"])):  # of two photos of one name
        write_instances(tmp_path / f"annotations/instances_{subset}.json", [("1", names)], LABELS, "{}.png".format)
        save_photo(tmp_path / "images" / subset / "1.png")
    assert read(tmp_path)[0] == {"images/Train/1.png": ["cat"], "images/Test/1.png": ["dog"]}


def test_orphans_of_coco_are_counted(tmp_path):
    write_instances(tmp_path / "labels.json", [("1", ["cat"]), ("2", ["dog"])], LABELS, "{}.png".format)
    save_photos(tmp_path, "1.png", "2.png")
    content = json.loads((tmp_path / "labels.json").read_text())
    content["annotations"] += [{"image_id": 99, "category_id": 1}, {"image_id": 1, "category_id": 98}]
    content["categories"].append({"id": 97})
    content["annotations"].append({"image_id": 2, "category_id": 97})
    write(tmp_path / "labels.json", json.dumps(content))
    labels, notes = read(tmp_path)
    assert labels == {"1.png": ["cat"], "2.png": ["dog"]}
    assert "3 annotations of labels.json name no image or category that it lists" in notes


def label_studio_tasks():
    def task(photo, *annotations):
        results = [
            {
                "was_cancelled": names is None,
                "result": [{"type": "choices", "from_name": "choice", "to_name": "image", "value": {"choices": names}}]
                * bool(names),
            }
            for names in annotations
        ]
        return {"id": 1, "data": {"image": photo}, "annotations": results, "predictions": []}

    return [
        task("/data/upload/3/0a1b2c3d-one.png", ["dog", "cat"]),
        task("/data/local-files/?d=pets/two%20three.png", ["salt, sea"]),
        task("s3://bucket/pets/4.png", None, ["dog"], ["dog"]),  # one person skipped it, two agree
        task("https://example.org/pets/5.png?size=large", []),  # none of the labels
        task("6.png", None),  # skipped
        task("7.png"),  # not yet labelled
    ]


STUDIO = {"one.png": ["cat", "dog"], "pets/two three.png": ["salt, sea"], "pets/4.png": ["dog"], "pets/5.png": []}


def test_label_studio_json(tmp_path):
    save_photos(tmp_path, *STUDIO, "6.png", "7.png")
    write(tmp_path / "project-1-at-2024-05-01.json", json.dumps(label_studio_tasks()))
    labels, notes = read(tmp_path)
    assert labels == STUDIO
    assert "2 entries of project-1-at-2024-05-01.json have no annotation and are left out." in notes
    assert "2 photos of" in notes and "not named there" in notes and "not read" not in notes


def test_label_studio_json_min_and_csv(tmp_path):
    save_photos(tmp_path, "1.png", "2.png", "3.png")
    records = [
        {"image": "/data/upload/1/00000001-1.png", "id": 1, "choice": {"choices": ["dog", "cat"]}, "annotation_id": 7},
        {"image": "/data/upload/1/00000002-2.png", "id": 2, "choice": "salt, sea", "annotation_id": 8},
        {"image": "/data/upload/1/00000003-3.png", "id": 3, "choice": "dog", "annotation_id": 9, "lead_time": 1.5},
    ]
    expected = {"1.png": ["cat", "dog"], "2.png": ["salt, sea"], "3.png": ["dog"]}
    write(tmp_path / "export.json", json.dumps(records))
    assert read(tmp_path)[0] == expected
    (tmp_path / "export.json").unlink()
    with open(tmp_path / "export.csv", "w", newline="") as file:
        rows = csv.DictWriter(file, ["annotation_id", "annotator", "choice", "id", "image", "lead_time"])
        rows.writeheader()
        for record in records:
            choice = record["choice"]
            text = json.dumps(choice) if isinstance(choice, dict) else choice
            rows.writerow(record | {"annotator": 1, "choice": text})
    labels, notes = read(tmp_path)
    assert labels == expected and "not read: ['annotator', 'id', 'lead_time']" in notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tasks: tasks[0]["annotations"].append(tasks[2]["annotations"][1]), "two annotations that differ"),
        (
            lambda tasks: tasks[0]["annotations"][0]["result"][0].update(from_name="sky"),
            r"\['choice', 'sky'\]: .*alone",
        ),
        (lambda tasks: [task.update(annotations=[]) for task in tasks], "no task has an annotation yet: submit some"),
        (lambda tasks: tasks[0].update(data={"text": "a"}), "task 1: one of .* must name the photo"),
        (lambda tasks: tasks[0]["annotations"][0].pop("result"), "task 1 is none of Label Studio's .'result'"),
        (
            lambda tasks: tasks[0]["annotations"][0]["result"][0]["value"].update(choices="dog"),
            "'dog' is no list of la",
        ),
        (lambda tasks: tasks[0]["data"].update(image="/data/local-files/?d=../../etc/a.png"), "must be the path of a"),
    ],
)
def test_label_studio_tasks_that_leave_a_doubt(tmp_path, change, message):
    save_photos(tmp_path, *STUDIO, "6.png", "7.png")
    tasks = label_studio_tasks()
    change(tasks)
    write(tmp_path / "export.json", json.dumps(tasks))
    refused(tmp_path, message)


YOLO_BOX = "0.5 0.5 0.1 0.1"


@pytest.mark.parametrize(
    ("photo", "text"),
    [
        ("images/{}.png", "labels/{}.txt"),
        ("images/train/{}.png", "labels/train/{}.txt"),  # Ultralytics
        ("Images/{}.png", "Labels/{}.txt"),
        ("train/images/{}.png", "train/labels/{}.txt"),  # Roboflow
        ("obj_train_data/{}.png", "obj_train_data/{}.txt"),  # CVAT, labelImg
    ],
)
@pytest.mark.parametrize(
    ("names_file", "names"),
    [
        ("data.yaml", "train: ../train/images\nnc: 3\nnames: ['cat', 'dog', 'no']\n"),
        ("data.yaml", "path: /somewhere\nnames:\n  0: cat\n  1: dog\n  2: no\n"),
        ("classes.txt", "\ufeffcat\r\ndog\r\nno\r\n"),
    ],
)
def test_yolo(tmp_path, photo, text, names_file, names):
    write(tmp_path / names_file, names)
    for stem, lines in (
        ("1", f"1 {YOLO_BOX}\n0 {YOLO_BOX}\n1 {YOLO_BOX}\n"),
        ("2", f"2 {YOLO_BOX} 0.7 0.8\n"),
        ("3", ""),
    ):
        save_photo(tmp_path / photo.format(stem))
        write(tmp_path / text.format(stem), lines)
    save_photo(tmp_path / photo.format("4"))
    labels, notes = read(tmp_path)
    assert labels == {
        photo.format(stem): names for stem, names in (("1", ["cat", "dog"]), ("2", ["no"]), ("3", []), ("4", []))
    }
    assert "1 photos have no text file" in notes and names_file in notes


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("labels/1.txt", f"3 {YOLO_BOX}\n", "1.txt, line 1: class 3 has no name"),
        ("labels/1.txt", f"0 {YOLO_BOX}\ncat 1 1 1 1\n", "1.txt, line 2: 'cat 1 1 1 1' is no box"),
        ("labels/1.txt", "0\n", "1.txt, line 1: '0' is no box"),
        ("data.yaml", "names: [", "data.yaml is not valid YAML"),
        ("data.yaml", "nc: 3\n", "data.yaml has no names of classes: add a line"),
        ("data.yaml", "names: {a: cat}\n", "the names of the classes are not numbered"),
        ("data.yaml", "names: [[cat]]\n", r"\['cat'\] is not a label name"),
        ("data.yaml", "x" * 300_000, "data.yaml has more than 262,144 bytes"),
        ("classes.txt", "dog\ncat\n", "data.yaml and classes.txt name the classes differently: keep the one"),
        ("classes.txt", "# mine\ncat\n", "classes.txt, line 1: '# mine': write the names of the classes alone"),
        ("classes.txt", "0 cat\n1 dog\n", "classes.txt, line 1: '0 cat': write the names of the classes alone"),
        ("classes.txt", "cent\n1 euro\n", "data.yaml and classes.txt name the classes differently"),
    ],
)
def test_malformed_yolo(tmp_path, path, text, message):
    write(tmp_path / "data.yaml", "names: [cat, dog]\n")
    write(tmp_path / "labels/1.txt", f"0 {YOLO_BOX}\n")
    save_photo(tmp_path / "images/1.png")
    write(tmp_path / path, text)
    refused(tmp_path, message)


def test_text_files_of_yolo_that_are_spelled_otherwise_or_belong_to_no_photo(tmp_path):
    write(tmp_path / "data.yaml", "names: [cat, dog]\n")
    save_photos(tmp_path, "images/cafe\u0301.png", "images/A.png", "images/b.png", "images/B.png")
    for name in ("caf\u00e9.txt", "a.TXT", "b.txt", "none.txt", "classes.txt"):
        write(tmp_path / "labels" / name, f"1 {YOLO_BOX}\n")
    write(tmp_path / "dataset.yaml", "path: .\ntrain: images\n")  # names no classes
    labels, notes = read(tmp_path)
    dogs = {"images/cafe\u0301.png", "images/A.png", "images/b.png"}  # B has no file: b's is its own
    assert labels == {name: ["dog"] * (name in dogs) for name in (*dogs, "images/B.png")}
    assert "1 photos have no text file" in notes and "1 text files, such as none.txt, belong to no photo" in notes
    write(tmp_path / "labels/A.tXt", "")
    refused(tmp_path, "may belong to .*A.png: keep one of them")


def test_doccano_and_hugging_face(tmp_path):
    save_photos(tmp_path, "1.png", "2.png", "3.png")
    lines = [{"id": 1, "filename": "1.png", "label": ["dog", "cat"]}, {"id": 2, "filename": "2.png", "label": ["dog"]}]
    write(tmp_path / "all.jsonl", "\n".join(map(json.dumps, lines)))
    assert read(tmp_path)[0] == {"1.png": ["cat", "dog"], "2.png": ["dog"]}
    (tmp_path / "all.jsonl").unlink()
    write(tmp_path / "train/metadata.csv", "file_name,label\n4.png,cat\n5.png,dog\n")
    save_photos(tmp_path, "train/4.png", "train/5.png")
    assert read(tmp_path)[0] == {"train/4.png": ["cat"], "train/5.png": ["dog"]}


# --- which file counts


def test_two_ways_to_read_a_folder_are_refused(tmp_path):
    save_photos(tmp_path, "cat/1.png", "dog/2.png")
    write(tmp_path / "predictions.csv", "file,labels\ncat/1.png,dog\ndog/2.png,cat\n")
    refused(tmp_path, "both predictions.csv and sub-folders such as 'cat' may say the labels. Call the file labels.csv")
    write(tmp_path / "more.json", json.dumps(label_studio_tasks()))
    refused(tmp_path, "holds several files that may say the labels: more.json, predictions.csv. Keep one, or call it")
    (tmp_path / "predictions.csv").rename(tmp_path / "labels.csv")
    assert read(tmp_path)[0] == {"cat/1.png": ["dog"], "dog/2.png": ["cat"]}


def test_files_that_are_no_tables_of_labels_are_in_nobodys_way(tmp_path):
    save_photos(tmp_path, "cat/1.png", "dog/2.png")
    write(tmp_path / "class_indices.json", '{"cat": 0, "dog": 1}')
    write(tmp_path / "sizes.csv", "id,width\n1,40\n")
    write(tmp_path / "classes.txt", "cat\ndog\n")
    write(tmp_path / "._labels.csv", "\x00\x05\x16")
    assert read(tmp_path)[0] == {"cat/1.png": ["cat"], "dog/2.png": ["dog"]}


def test_what_is_not_read_beside_folders_of_labels_is_told(tmp_path):
    save_photos(tmp_path, "cat/1.png", "dog/2.png")
    write(tmp_path / "labels.xlsx", "PK")
    write(tmp_path / "xml/1.xml", "<annotation/>")
    write(tmp_path / "~$labels.csv", "\x00\xff")  # what Excel puts beside a file that is open
    (tmp_path / "sofa").mkdir()
    labels, notes = read(tmp_path)
    assert labels == {"cat/1.png": ["cat"], "dog/2.png": ["dog"]}
    assert "Sub-folders without photos are left out: ['sofa', 'xml']." in notes
    assert "labels.xlsx was not read: if it says the labels, save it as labels.csv." in notes


def test_a_table_may_have_absolute_paths_into_its_folder(tmp_path):
    save_photos(tmp_path, "photos/1.png")
    write(tmp_path / "labels.csv", f"file,labels\n{tmp_path.resolve()}/photos/1.png,cat\n")
    assert read(tmp_path)[0] == {"photos/1.png": ["cat"]}


def test_photos_beside_the_labelled_ones_are_counted(tmp_path):
    save_photos(tmp_path, "cat/1.png", "dog/2.png", "dog/puppy/3.png", "4.png")
    labels, notes = read(tmp_path)
    assert labels == {"cat/1.png": ["cat"], "dog/2.png": ["dog"], "dog/puppy/3.png": ["dog"]}
    assert (
        "1 photos of" in notes and "lie in no sub-folder" in notes and "such as 'puppy', were taken for part" in notes
    )


def test_a_table_without_rows_is_told(tmp_path):
    write(tmp_path / "labels.csv", "file,labels\n,\n")
    refused(tmp_path, "labels.csv names no photo: add rows such as")


def test_odd_labels_are_told(tmp_path, capsys):
    save_photos(tmp_path, "1.png", "2.png", "3.png", "4.png", "5.png")
    write(tmp_path / "labels.csv", "file,labels\n1.png,Cat\n2.png,cat\n3.png,nan\n4.png,dog/cat\n5.png,dog\n")
    notes = read(tmp_path)[1]
    told = capsys.readouterr().err
    for line in (
        "The labels 'Cat', 'cat' are several: write them alike if they are one.",
        "'nan' was taken for a label: leave the cell empty where a photo has none.",
        "'dog/cat' was taken for one label, but its parts look like labels: separate labels by |",
    ):
        assert line in notes and line in told
    assert folder.scan(tmp_path).read().label_names == ["Cat", "cat", "dog", "dog/cat", "nan"]


# --- photos


def test_names_are_found_however_they_are_written(tmp_path):
    save_photos(tmp_path, "Summer/CAF\u00c9.png", "b.PNG", "deep/er/c.png")
    rows = ["summer\\cafe\u0301.png,cat", "B.png,dog", "c.png,boat"]
    write(tmp_path / "labels.csv", "\n".join(["file,labels", *rows]))
    assert read(tmp_path)[0] == {"Summer/CAF\u00c9.png": ["cat"], "b.PNG": ["dog"], "deep/er/c.png": ["boat"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("..\\b.png,cat", "line 2: '../b.png' must be the path of a photo inside"),
        ("x/../../b.png,cat", "must be the path of a photo inside"),
        ("C:\\photos\\none.png,cat", "1 of the 1 photos .*: photos/none.png"),
        ("C.PNG,cat", "1 of the 1 photos .*: C.PNG"),  # c.png and C.png are there, deeper
        ("c:\\mine\\B.png,cat\nd:\\yours\\b.png,dog", "line 3: 'yours/b.png' and 'mine/B.png' would both be the photo"),
    ],
)
def test_names_that_lead_nowhere_or_to_several_photos(tmp_path, row, message):
    save_photos(tmp_path, "mine/b.png", "mine/x/c.png", "mine/y/C.png")
    save_photo(tmp_path / "b.png")
    write(tmp_path / "mine/labels.csv", f"file,labels\n{row}\n")
    refused(tmp_path / "mine", message)


def test_photos_that_cannot_be_read_are_counted_and_named(tmp_path, capsys):
    save_photos(tmp_path, "mine/cat/1.png", "mine/dog/2.png")
    for name in ("cat/3.DNG", "dog/3.DNG", "dog/4.cr2"):
        (tmp_path / "mine" / name).write_bytes(b"II*\0")
    for name in ("cat/5.pdf", "cat/6.mpg", "dog/7.h5", "dog/8.svg", "dog/9.eps", "dog/Thumbs.db", "dog/notes.txt"):
        (tmp_path / "mine" / name).write_bytes(b"no photo")
    for name in ("__MACOSX/cat/._1.png", "dog/._2.png", ".trash/1.png", "dog/@eaDir/2.png/thumb.png", "@eaDir/x.png"):
        save_photo(tmp_path / "mine" / name)
    labels, notes = read(tmp_path / "mine")
    assert labels == {name: [name[:3]] for name in ("cat/1.png", "cat/3.DNG", "dog/2.png", "dog/3.DNG", "dog/4.cr2")}
    told = capsys.readouterr().err
    for line in (
        "2 photos (cat/3.DNG, dog/3.DNG) cannot be read here (DNG): convert to JPEG.",
        "1 photos (dog/4.cr2) cannot be read here (CR2): convert to JPEG.",
    ):
        assert line in notes and line in told
    write(tmp_path / "split.json", json.dumps({"train": ["a"], "validation": ["b", "c"], "novel": ["cat", "dog"]}))
    save_photos(tmp_path / "mine", *(f"{label}/{label}.png" for label in "abc"))
    config = {"source": tmp_path / "mine", "prepared_dir": tmp_path / "prepared", "policy": "", "seed": 0}
    dataset = data.load(types.SimpleNamespace(name="folder", split=str(tmp_path / "split.json"), **config))
    assert dataset.unreadable == {
        "cat/3.DNG": "photo cat/3.DNG cannot be read here (DNG): convert to JPEG",
        "dog/3.DNG": "photo dog/3.DNG cannot be read here (DNG): convert to JPEG",
        "dog/4.cr2": "photo dog/4.cr2 cannot be read here (CR2): convert to JPEG",
    }
    for path in (tmp_path / "mine").glob("*/*.png"):
        if path.is_file():
            path.unlink()
    refused(tmp_path / "mine", "there is no photo that can be read: 2 photos .cat/3.DNG, dog/3.DNG")


def test_links_to_folders_are_followed_once_within_a_label(tmp_path):
    save_photos(tmp_path, "photos/cat/1.png", "mine/dog/2.png", "mine/dog/more/3.png")
    (tmp_path / "mine/cat").symlink_to(tmp_path / "photos/cat")
    (tmp_path / "mine/dog/again").symlink_to(tmp_path / "mine/dog/more")
    (tmp_path / "mine/dog/loop").symlink_to(tmp_path / "mine")
    labels, _ = read(tmp_path / "mine")
    # The loop leads from dog/ to the photos of cat/, whose only image is therefore both.
    assert labels == {"cat/1.png": ["cat", "dog"], "dog/2.png": ["dog"], "dog/more/3.png": ["dog"]}


def test_a_photo_that_was_replaced_by_one_of_the_same_size_is_another(tmp_path):
    for label in "abcde":
        (tmp_path / "mine" / label).mkdir(parents=True)
        save_photo(tmp_path / "mine" / label / f"{label}.bmp")
    config = {"source": tmp_path / "mine", "prepared_dir": tmp_path / "prepared", "policy": "", "split": "auto"}

    def load():
        return data.load(types.SimpleNamespace(name="folder", seed=0, **config))

    before, photo = load(), tmp_path / "mine/a/a.bmp"
    size = photo.stat().st_size
    later = photo.stat().st_mtime_ns + 1_000_000_000
    os.utime(photo, ns=(later, later))
    assert load().fingerprint == before.fingerprint  # the same photo under another date
    photo.write_bytes(photo.read_bytes()[:-3] + b"abc")
    assert photo.stat().st_size == size
    after = load()
    assert after.fingerprint != before.fingerprint
    assert (after.load_image(0) != before.load_image(0)).any()


def test_a_copy_of_another_folder_does_not_stand_in_for_one_that_is_not_there(tmp_path):
    save_photos(tmp_path / "mine", *(f"{label}/{i}.png" for label in ("a", "b", "c", "d", "e", "f") for i in range(12)))
    fields = {"name": "folder", "split": "auto", "seed": 0, "policy": "", "prepared_dir": str(tmp_path / "prepared")}

    def load(source):
        config = types.SimpleNamespace(source=source and str(source), image_size=32, **fields)
        return data.is_available(config), data.load(config)

    _, first = load(tmp_path / "mine")
    with pytest.raises(InputError, match="typo: no such folder"):
        load(tmp_path / "typo")
    assert not data.is_available(types.SimpleNamespace(source=str(tmp_path / "typo"), **fields))
    assert load(None)[1].fingerprint == first.fingerprint
    (records,) = tmp_path.glob("prepared/folder_photos/*/*/part_00000/*.array_record*")
    records.write_bytes(b"")
    with pytest.raises(DamagedCopy, match="delete that folder"):
        load(None)[1].load_image(0)
