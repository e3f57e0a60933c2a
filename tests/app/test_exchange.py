"""Exports as other programs and ``--support`` read them, and imports as people and annotation tools write them."""

import json
import unicodedata
from xml.etree import ElementTree

import numpy as np
import pytest

from mlfsic_jax.app import exchange
from mlfsic_jax.app.exchange import Marked
from mlfsic_jax.data import folder, tables
from mlfsic_jax.data.photo_files import Finder
from mlfsic_jax.system.errors import InputError

LABELS = ("cat", "dog", "sofa")
THRESHOLDS = {"cat": 0.5, "dog": 0.75, "sofa": 0.5}
PHOTOS = (
    Marked("a.jpg", (40, 30), ("cat",), ("dog",), {"sofa": 0.875}),
    Marked("deep/b.jpg", (30, 40), (), ("cat",), {"dog": 0.75, "sofa": 0.375}),
    Marked("c.jpg", (20, 20), (), (), {"cat": 0.625, "dog": 0.8125, "sofa": 0.125}),
    Marked("d.jpg", (10, 10), (), (), {}),  # not yet looked at by the model
    Marked("e.jpg", (10, 10), (), LABELS, {}),  # none of the labels, which somebody said
)
DECIDED = {"a.jpg": ["cat"], "e.jpg": []}
PROPOSED = {"a.jpg": ["cat", "sofa"], "deep/b.jpg": [], "c.jpg": ["cat", "dog"], "d.jpg": [], "e.jpg": []}
HOSTILE = (
    *("a|b", "salt, sea", "C#", "x;y", '["cat"]', "{a}", "'quoted'", '"', "0", "1", "nan", "=1+1", "海", "é", "$image"),
    *("file", "labels", "<b>&amp;", "../..", "a\\b", "true"),
)
NAMES = (
    "a,b.jpg",
    'a"b.jpg',
    "a|b.jpg",
    "deep/海 é.jpg",
    "e\u0301.jpg",
    "=1+1.jpg",
    "?d=x.jpg",
    "%2Fdata.jpg",
    "'.jpg",
)


def content(photos=PHOTOS, kind="csv", proposals=False, label_names=LABELS, **options):
    thresholds = THRESHOLDS if label_names == LABELS else dict.fromkeys(label_names, 0.5)
    file, media_type, pieces = exchange.export(photos, label_names, thresholds, kind, proposals, **options)
    return file, media_type, b"".join(pieces)


def as_read(root, file, text, photos):
    """What ``--support`` reads from a file beside the photos: name -> labels."""
    for photo in photos:
        (root / photo.name).parent.mkdir(parents=True, exist_ok=True)
        (root / photo.name).touch()
    (root / file).write_bytes(text)
    labels, _ = folder.read_csv(root / file, anywhere=True)
    return {photo.relative_to(root).as_posix(): names for photo, names in labels.items()}


def decided(photos, labels, label_names=LABELS):
    """A photo for each name, with the labels of each list as "yes", or all as "no"."""
    marks = ((tuple(yes), () if yes else label_names) for yes in labels)
    return [Marked(name, (1, 1), *each, {}) for name, each in zip(photos, marks, strict=True)]


def test_csv_has_a_line_for_each_photo():
    file, media_type, text = content()
    assert (file, media_type) == ("labels.csv", "text/csv; charset=utf-8")
    assert text == b"file,labels\r\na.jpg,cat\r\ne.jpg,\r\n"  # of deep/b.jpg two labels are open
    _, _, text = content(proposals=True)
    assert text == b"file,labels\r\na.jpg,cat|sofa\r\ndeep/b.jpg,\r\nc.jpg,cat|dog\r\nd.jpg,\r\ne.jpg,\r\n"


def test_only_csv_with_ambiguous_labels_has_lists():
    _, _, text = content(decided(["a.jpg"], [["salt, sea", "cat"]]), label_names=("cat", "salt, sea"))
    assert text == b'file,labels\r\na.jpg,"[""cat"", ""salt, sea""]"\r\n'


@pytest.mark.parametrize("kind", ["csv", "coco", "label-studio"])
@pytest.mark.parametrize(("proposals", "expected"), [(False, DECIDED), (True, PROPOSED)])
def test_exports_are_read_as_they_were_meant(tmp_path, kind, proposals, expected):
    file, _, text = content(kind=kind, proposals=proposals, folder="holiday")
    if kind == "label-studio":
        expected = DECIDED  # what is only proposed is no label until somebody accepts it
    found = as_read(tmp_path, file, text, PHOTOS)
    assert found == expected
    labels, names, skipped = exchange.read(file, text, [photo.name for photo in PHOTOS], tmp_path)
    assert labels == {photo: tuple(names) for photo, names in expected.items()} and skipped == []
    assert sorted(names) == sorted({name for names in expected.values() for name in names})


@pytest.mark.parametrize("kind", ["csv", "coco", "label-studio"])
def test_names_of_any_characters_are_read_back(tmp_path, kind):
    rng = np.random.default_rng(0)
    for case in range(20):
        labels = tuple(rng.permutation(HOSTILE)[: rng.integers(1, 5)].tolist())
        yes = [[name for name in labels if rng.random() < 0.4] for _ in NAMES]
        yes[0] = yes[0] or [labels[0]]  # tables without any label are refused
        photos = decided(NAMES, yes, labels)
        file, _, text = content(photos, kind, label_names=labels, folder="holiday")
        found = as_read(tmp_path / str(case), file, text, photos)
        assert {photo: sorted(names) for photo, names in found.items()} == {
            name: sorted(names) for name, names in zip(NAMES, yes, strict=True)
        }


def test_coco_has_images_annotations_and_categories():
    file, media_type, text = content(kind="coco", proposals=True)
    assert (file, media_type) == ("coco.json", "application/json")
    assert json.loads(text) == {
        "images": [
            {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30},
            {"id": 2, "file_name": "deep/b.jpg", "width": 30, "height": 40},
            {"id": 3, "file_name": "c.jpg", "width": 20, "height": 20},
            {"id": 4, "file_name": "d.jpg", "width": 10, "height": 10},
            {"id": 5, "file_name": "e.jpg", "width": 10, "height": 10},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1},
            {"id": 2, "image_id": 1, "category_id": 3},
            {"id": 3, "image_id": 3, "category_id": 1},
            {"id": 4, "image_id": 3, "category_id": 2},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "sofa"}],
    }


def test_label_studio_has_annotations_for_decisions_and_predictions_for_proposals():
    def choices(*names):
        value = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": list(names)}}
        return [value] if names else []

    file, media_type, text = content(kind="label-studio", proposals=True, folder="my holiday")
    assert (file, media_type) == ("label-studio.json", "application/json")
    tasks = json.loads(text)
    names = ("a.jpg", "deep/b.jpg", "c.jpg", "d.jpg", "e.jpg")
    assert [task["data"]["image"] for task in tasks] == [f"/data/local-files/?d=my%20holiday/{n}" for n in names]
    assert [task.get("annotations") for task in tasks] == [
        [{"result": choices("cat")}],
        None,  # somebody said that it is no cat, and nothing of the others
        None,
        None,
        [{"result": []}],
    ]
    predictions = [task.get("predictions") for task in tasks]
    assert predictions[3:] == [None, None]
    assert [found["result"] for (found,) in predictions[:3]] == [choices("cat", "sofa"), [], choices("cat", "dog")]
    # Of the least certain: sofa 0.875; no dog at its threshold, 1 - 0.75; cat 0.625.
    assert [found["score"] for (found,) in predictions[:3]] == [0.875, 0.25, 0.625]
    _, _, text = content(kind="label-studio")
    assert ["predictions" in task for task in json.loads(text)] == [False, False]


def test_label_studio_has_its_labelling_configuration():
    file, _, text = content(kind="label-studio-config")
    choices = ElementTree.fromstring(text).findall("Choices/Choice")
    assert file == "label-studio.xml" and [choice.get("value") for choice in choices] == list(LABELS)


def test_large_exports_come_in_few_pieces():
    photos = decided([f"{i}.jpg" for i in range(5000)], [["cat"]] * 5000)
    _, _, pieces = exchange.export(iter(photos), LABELS, {}, "csv", False)
    pieces = list(pieces)
    assert len(pieces) == 6 and b"".join(pieces).count(b"\n") == 5001


@pytest.mark.parametrize(
    ("kind", "photo", "label", "message"),
    [
        ("pdf", "a.jpg", "cat", "the format 'pdf' must be one of csv, coco, label-studio"),
        ("csv", " a.jpg", "cat", "photo ' a.jpg': CSV files are read without the spaces .* rename the photo"),
        ("csv", "a\n.jpg", "cat", r"'a\\n.jpg' contains a character that cannot be printed: rename the photo"),
        ("coco", "caf\udce9.jpg", "cat", r"'caf\\udce9.jpg' contains a character that cannot be printed"),
        ("coco", "c:/a.jpg", "cat", "'c:/a.jpg': it would be read as a path on a Windows machine: rename"),
        ("label-studio", "a\\b.jpg", "cat", "the backslash would be read as a folder: rename the photo"),
        ("csv", "a.jpg", "cat ", "the label 'cat ' has spaces around it"),
        ("csv", "a.jpg", "e\u0301", "accents in pieces or invisible characters: rename it"),
        ("coco", "a.jpg", "c\nat", "contains a line break or control character: remove it"),
        ("label-studio", "a.jpg", "c\uffffat", "contains a character that XML lacks: remove it"),
    ],
)
def test_what_would_not_be_read_back_is_refused(kind, photo, label, message):
    with pytest.raises(InputError, match=message) as caught:
        content(decided([photo], [[label]]), kind, label_names=(label,))
    assert "\n" not in str(caught.value)


def test_an_export_without_decisions_is_refused():
    with pytest.raises(InputError, match="no photo has a label yet, or none of all: decide on one, or export the prop"):
        content(PHOTOS[1:4])


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("csv", ("a\nb.jpg", "\udcff.jpg", " a.jpg", "c:/a.jpg")),
        ("coco", ("a\tb.jpg", "\u2028.jpg")),
        ("label-studio", ("a\\b.jpg", "\udcff.jpg")),
    ],
)
def test_photos_that_would_not_be_read_back_are_left_out_and_named(kind, names):
    photos = decided((*names, "good.jpg"), [["cat"]] * (len(names) + 1))
    skipped = []
    _, _, text = content(photos, kind, skipped=skipped)
    assert b"good.jpg" in text and len(skipped) == len(names) and all("rename the photo" in line for line in skipped)
    with pytest.raises(InputError, match="rename the photo"):
        content(photos[:-1], kind)


# --- imports

KNOWN = ("a.jpg", "deep/b.jpg", "deep/c d.jpg", "\u00e9.jpg")


@pytest.fixture
def read(tmp_path):
    root = tmp_path / "holiday"
    for photo in (*KNOWN, "film.mp4"):
        (root / photo).parent.mkdir(parents=True, exist_ok=True)
        (root / photo).touch()
    return lambda name, text: exchange.read(name, text.encode() if isinstance(text, str) else text, KNOWN, root)


def test_an_import_finds_its_photos_however_their_names_are_written(read):
    decomposed = unicodedata.normalize("NFD", KNOWN[3])
    lines = ["Filename;Tags", "A.JPG;cat#dog", "deep\\b.jpg;cat", f"{decomposed};"]
    text = "\r\n".join([*lines, "gone.jpg;dog", "x/a.jpg;dog", "film.mp4;cat"])
    labels, names, skipped = read("x.CSV", text)
    assert labels == {"a.jpg": ("cat", "dog"), "deep/b.jpg": ("cat",), "\u00e9.jpg": ()}
    assert names == ["cat", "dog"]
    assert skipped == [f"'{photo}' is not among the photos" for photo in ("film.mp4", "gone.jpg", "x/a.jpg")]


def test_an_import_of_label_studio_finds_uploads_and_served_photos(read):
    def task(address, *names):
        result = {"type": "choices", "from_name": "c", "to_name": "i", "value": {"choices": list(names)}}
        return {"data": {"image": address}, "annotations": [{"result": [result]}]}

    tasks = [
        task("/data/upload/3/0a1b2c3d-a.jpg", "cat"),
        task("/data/local-files/?d=holiday/deep/c%20d.jpg", "dog", "a|b"),
        {"data": {"image": "/data/local-files/?d=deep/b.jpg"}, "predictions": []},  # nobody looked at it
        task("https://example.org/z.jpg", "dog"),
    ]
    labels, names, skipped = read("project-1.json", json.dumps(tasks))
    assert labels == {"a.jpg": ("cat",), "deep/c d.jpg": ("dog", "a|b")} and names == ["cat", "dog", "a|b"]
    assert skipped == ["'z.jpg' is not among the photos"]


def test_predictions_are_found_by_their_paths(read, tmp_path):
    for start in ("holiday/", "./holiday/", "../x/holiday/", f"{tmp_path}/holiday/", "x\\holiday\\"):
        labels, _, skipped = read("predictions.csv", f"file,labels\n{start}a.jpg,cat\n{start}deep/b.jpg,\n")
        assert labels == {"a.jpg": ("cat",), "deep/b.jpg": ()} and skipped == []


@pytest.mark.parametrize("kind", ["csv", "coco", "label-studio"])
def test_a_sub_folder_may_be_called_like_the_folder(tmp_path, kind):
    names = ("x.jpg", "nest/x.jpg", "2020/nest/x.jpg")
    photos = decided(names, [["cat"], ["dog"], ["cat", "dog"]], ("cat", "dog"))
    for chosen in (photos, photos[:1], photos[1:2], photos[2:]):
        file, _, text = content(chosen, kind, label_names=("cat", "dog"), folder="nest")
        root = tmp_path / "nest"
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        found, _, skipped = exchange.read(file, text, names, root)
        assert found == {photo.name: photo.yes for photo in chosen} and skipped == []
    # Predictions have the folder's own name before all of these; one line alone can be read in two ways.
    lines = "file,labels\nnest/x.jpg,cat\nnest/nest/x.jpg,dog\n"
    assert exchange.read("p.csv", lines.encode(), names, root)[0] == {"x.jpg": ("cat",), "nest/x.jpg": ("dog",)}
    with pytest.raises(InputError, match="write paths as seen from the folder of photos, beginning with ./"):
        exchange.read("p.csv", b"file,labels\nnest/x.jpg,cat\n", names, root)
    assert exchange.read("p.csv", b"file,labels\n./nest/x.jpg,cat\n", names, root)[0] == {"nest/x.jpg": ("cat",)}


def test_the_name_of_an_import_is_no_path(read):
    assert read("../../x.csv", "file,labels\na.jpg,cat\nA.jpg,dog\n") == ({"a.jpg": ("cat", "dog")}, ["cat", "dog"], [])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("labels.pdf", "", r"'labels.pdf' must end in one of .csv, .tsv, .json, .jsonl"),
        ("../../labels\n", "", r"'../../labels\\n' must end in one of"),
        ("x.csv", "name,labels\na.jpg,cat\n", "'x.csv', line 1: the columns must be file,labels"),
        ("x.csv", b"file,labels\na.jpg,caf\xe9\n", "'x.csv' cannot be read .* save it as CSV in UTF-8"),
        ("x.csv", "file,labels\na.jpg,c\x01t\n", r"'x.csv', line 2: the label 'c\\x01t' contains a line break"),
        ("x.csv", "file,labels\n/etc/a.jpg,cat\n", "line 2: '/etc/a.jpg' must be the path of a photo inside .*holiday"),
        ("x.csv", "file,labels\nb/z.jpg,cat\n", "no photo of it is in the folder, such as 'b/z.jpg': write paths"),
        ("x.csv", "file,labels\n../a.jpg,cat\n", "'../a.jpg' must be the path of a photo inside .*holiday"),
        ("x.csv", "file,labels\na.jpg,caf\ufffd\n", "'x.csv' is not UTF-8 text: save it in UTF-8"),
        ("x.json", "{", "'x.json' is not valid JSON"),
        ("x.json", "{}", "'x.json' is not a COCO instances file"),
        ("x.json", "[" * 100_000, "'x.json' is not valid JSON"),
        ("x.jsonl", "1\n", "'x.jsonl', entry 1: 1 is no object"),
    ],
)
def test_what_is_no_table_of_labels_is_refused_in_one_line(read, name, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read(name, text)
    assert "\n" not in str(caught.value) and "labels.csv" not in str(caught.value)


def test_coco_is_what_the_dataset_readers_take(tmp_path):
    file, _, text = content(kind="coco")
    (tmp_path / file).write_bytes(text)
    table = tables.read_table(tmp_path / file, Finder(tmp_path))
    assert table.labels == {tmp_path / photo: names for photo, names in DECIDED.items()} and table.notes == []
