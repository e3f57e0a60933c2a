"""Whatever bytes a file holds, its parser gives a valid result, or one clear ``InputError`` that names the file.

MLFSIC_FUZZ=N tries N damaged files of each kind, at random; without it there are a few, always the same.
"""

import codecs
import gzip
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import time
import unicodedata
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features
from safetensors.numpy import save

from mlfsic_jax.backbones import Conv4
from mlfsic_jax.backbones.weights import load_weights, read_state_dict
from mlfsic_jax.data import coco, download, folder, imaterialist, nus_wide, prepared, splits, transforms, voc
from mlfsic_jax.data import encoders as text_encoders
from mlfsic_jax.data import words as label_embeddings
from mlfsic_jax.label_embeddings import read_labels
from mlfsic_jax.report import page as report
from mlfsic_jax.run import saved
from mlfsic_jax.run.workdir import MetricsLog
from mlfsic_jax.system import files
from mlfsic_jax.system.errors import InputError

MOST = int(os.environ.get("MLFSIC_FUZZ", "0"))
SECONDS = 10  # of processor time for a file of a few kilobytes; most take milliseconds
EXAMPLES = settings(
    max_examples=MOST or 40,
    derandomize=not MOST,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)


class Parser(NamedTuple):
    """A parser of outside input.

    Attributes:
      name: of the test case.
      filename: the file that is damaged, below a fresh folder.
      valid: what it holds when it is whole.
      parse: takes the folder.
      check: what every result has to fulfil.
      named: what an error message may name instead of the folder.
      others: further files that it needs, name -> content.
    """

    name: str
    filename: str
    valid: bytes
    parse: Callable[[Any], Any]
    check: Callable[[Any], None]
    named: str = "missing or empty"
    others: dict[str, bytes] = {}  # noqa: RUF012


# --- damage

TOKENS = [
    *(
        b"\x00",
        b"\xff",
        b"\n",
        b"\r\n",
        b'"',
        b"'",
        b",",
        b"|",
        b"..",
        b"/",
        b"\\",
        b"\t",
        b" ",
        b"=",
        b"|x|",
        b"<",
        b">",
    ),
    *(
        b"NaN",
        b"1e999",
        b"-1",
        b"9" * 40,
        b"null",
        b"[]",
        b"{}",
        b"[" * 3000,
        b"true",
        b'"\\ud800"',
        b'"\\u0000"',
        b":",
    ),
    *(
        b"<!DOCTYPE a>",
        b"<a>" * 300,
        b"&lt;",
        b"&#0;",
        "é".encode(),
        "e\u0301".encode(),
        "\u2028".encode(),
        b"\xef\xbb\xbf",
    ),
    *(
        b"\xff\xff\xff\x7f",
        b"\x00\x00\x00\x00",
        b"\xff\xff\xff\xff",
        b"PK\x03\x04",
        b"\x80\x04",
        b"x" * 5000,
        b"../../x",
    ),
]


@st.composite
def damaged(draw, valid):
    """A valid file after a few cuts, flips, insertions, repetitions and swaps of bytes, lines or fields."""
    content = bytes(valid)
    for _ in range(draw(st.integers(1, 4))):
        size = len(content)
        place = st.integers(0, size)
        match draw(st.sampled_from(["cut", "delete", "flip", "set", "insert", "token", "repeat", "line", "field"])):
            case "cut":
                content = content[: draw(place)]
            case "delete":
                start = draw(place)
                content = content[:start] + content[start + draw(st.integers(1, 1 + size // 4)) :]
            case "flip" if size:
                i = draw(st.integers(0, size - 1))
                content = content[:i] + bytes([content[i] ^ 1 << draw(st.integers(0, 7))]) + content[i + 1 :]
            case "set":
                i, new = draw(place), draw(st.binary(min_size=1, max_size=8))
                content = content[:i] + new + content[i + len(new) :]
            case "insert":
                i = draw(place)
                content = content[:i] + draw(st.binary(min_size=1, max_size=20)) + content[i:]
            case "token":
                i = draw(place)
                content = content[:i] + draw(st.sampled_from(TOKENS)) + content[i + draw(st.integers(0, 4)) :]
            case "repeat":
                start, to = draw(place), draw(place)
                content = content[:to] + content[start : start + draw(st.integers(1, 200))] + content[to:]
            case "line" | "field" as what:
                separator = b"\n" if what == "line" else draw(st.sampled_from([b",", b" ", b'"', b">", b"\t"]))
                parts = content.split(separator)
                i, j = (draw(st.integers(0, len(parts) - 1)) for _ in range(2))
                match draw(st.sampled_from(["delete", "swap", "repeat"])):
                    case "delete":
                        del parts[i]
                    case "swap":
                        parts[i], parts[j] = parts[j], parts[i]
                    case "repeat":
                        parts.insert(j, parts[i])
                content = separator.join(parts)
    return content


def contents(valid):
    return (
        damaged(valid)
        | damaged(valid)
        | damaged(valid)
        | st.binary(max_size=200)
        | st.text(max_size=100).map(str.encode)
    )


# --- what a result has to fulfil


def check_photo(photo):
    assert photo.dtype == np.uint8 and photo.ndim == 3 and photo.shape[-1] == 3 and photo.size > 0


def check_name(name):
    assert isinstance(name, str) and name == name.strip() != "" and len(name) <= 200
    assert not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name)
    assert unicodedata.is_normalized("NFC", name)


def check_table(result):
    labels, names = result
    for photo, of_photo in labels.items():
        assert photo.name and "\x00" not in str(photo)
        assert set(of_photo) <= set(names) and len(set(of_photo)) == len(of_photo)
    for name in names:
        check_name(name)


def check_contents(contents):
    for name in contents.label_names:
        check_name(name)
    assert all(example.photo.stat().st_size for example in contents.examples)
    for example in contents.examples:
        assert set(example.labels) | set(example.ignored) <= set(contents.label_names)


def check_instances(found):
    for stem, photo, names in found:
        assert stem and ".." not in photo.parts
        for name in names:
            check_name(name)


def check_split(split):
    names = [name for part in split.values() for name in part]
    assert set(names) <= set(LABELS) and len(set(names)) == len(names) and all(split.values())


def check_table_file(copy):
    assert copy.labels.dtype == copy.ignored.dtype == bool
    assert copy.labels.shape == copy.ignored.shape == (len(copy.names), len(copy.label_names))
    assert copy.records.shape == (len(copy.names), 2) and len(copy.unreadable) == len(copy.names)


def check_state(state):
    for key, array in state.items():
        assert isinstance(key, str) and isinstance(array, np.ndarray)


def check_variables(variables):
    assert variables["params"]["encoder_0_0"]["kernel"].shape == (3, 3, 3, 2)
    for tree in variables.values():
        for layer in tree.values():
            assert all(np.isfinite(array).all() for array in layer.values())


def check_vectors(vectors):
    assert vectors.dtype == np.float32 and vectors.shape[0] == 2 and vectors.ndim == 2 and np.isfinite(vectors).all()


def check_labels(result):
    names, displays = result
    assert names and len(names) == len(displays) == len(set(names))
    for name in names:
        check_name(name)


def check_mentions(groups):
    assert len(groups) == 2
    for group, label in zip(groups, ["dog", "hot dog"], strict=True):
        assert group
        for text, start, end in group:
            assert text[start:end].lower().split(" ")[-1].endswith("dog"), label


def check_unpacked(root):
    """Nothing is outside of the folder."""
    assert {path.name for path in root.iterdir()} <= {"archive.zip", "archive.tar", "out"}
    assert all(not path.is_symlink() for path in (root / "out").rglob("*"))


def check_results(results):
    assert [entry["n_shot"] for entry in results] == results[0]["config"]["shots"]


def check_metrics(lines):
    assert all("n_shot" in line for line in lines)


def check_log(path):
    """Only whole lines are left, and none of this run's that will come again."""
    for line in map(json.loads, path.read_text().splitlines()):
        assert isinstance(line["step"], int) and (line.get("n_shot") != 1 or line["step"] <= 2)


def no_result(result):
    raise AssertionError("a folder without a model gave one")


# --- valid files

LABELS = ("sea", "sand", "rock", "dune", "tide")
PIXELS = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)


def photo_bytes(kind, image=None, **options):
    file = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(file, kind, **options)
    return file.getvalue()


def animation():
    frames = [Image.fromarray(np.roll(PIXELS, i, axis=0)) for i in range(3)]
    return photo_bytes("GIF", frames[0], save_all=True, append_images=frames[1:])


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return photo_bytes("JPEG", exif=exif)


def palette():
    return photo_bytes("PNG", Image.fromarray(PIXELS).quantize(8), transparency=bytes(range(8)))


def zipped(members, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def npz(arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def state():
    rng = np.random.default_rng(0)
    state = {}
    for block in range(4):
        state[f"encoder.{block}.0.weight"] = rng.random((2, 3 if block == 0 else 2, 3, 3), np.float32)
        for name in ("0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
            state[f"encoder.{block}.{name}"] = rng.random(2, np.float32)
    return state


def tensor(key, count):
    """A tensor in the words of a pickle stream, protocol 2, as torch.save writes it."""
    number = b"K" + bytes([count])
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00" + key + b"X\x03\x00\x00\x00cpu" + number
    )
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"tQK\x00"
        + number
        + b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
    )


PICKLED = b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01" + tensor(b"0", 4) + b"X\x01\x00\x00\x00b" + tensor(b"1", 2) + b"u."
NUMBERS = np.arange(4, dtype=np.float32).tobytes()
PTH = zipped({"a/data.pkl": PICKLED, "a/data/0": NUMBERS, "a/data/1": NUMBERS[:8]}, zipfile.ZIP_STORED)
LEGACY = (
    *(pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps({"little_endian": True}, 2)),
    *(PICKLED, pickle.dumps(["0", "1"], 2), (4).to_bytes(8, "little"), NUMBERS, (2).to_bytes(8, "little"), NUMBERS[:8]),
)
SCRIPT = zipped(
    {
        "a/data.pkl": b"\x80\x02c__torch__.some\nModel\n)\x81}(X\x01\x00\x00\x00w"
        + tensor(b"0", 4)
        + b"X\x01\x00\x00\x00m"
        b"c__torch__\nInner\n)\x81}X\x01\x00\x00\x00vK\x03sbub.",
        "a/data/0": NUMBERS,
        "a/code/__torch__/some.py": b"raise SystemExit",
    },
    zipfile.ZIP_STORED,
)


def json_bytes(value):
    return json.dumps(value).encode()


INSTANCES = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
    "categories": [{"id": 3, "name": "sea"}, {"id": 5, "name": "sand"}],
    "annotations": [
        {"image_id": 1, "category_id": 3},
        {"image_id": 1, "category_id": 5},
        {"image_id": 2, "category_id": 3},
    ],
}
OFFICIAL = INSTANCES | {"categories": [{"id": 3, "name": "dog"}, {"id": 5, "name": "cat"}]}
TASKS = [
    {
        "data": {"image": f"/data/upload/1/0123abcd-{name}.jpg"},
        "annotations": [{"result": [{"type": "choices", "from_name": "label", "value": {"choices": names}}]}],
    }
    for name, names in (("a", ["sea", "sand"]), ("b", ["sea"]))
]
RECORDS = b'{"filename": "a.jpg", "label": ["sea", "sand"]}\n{"filename": "b.jpg", "label": ["sea"]}\n'
PHOTOS = {"a.jpg": photo_bytes("JPEG"), "b.jpg": photo_bytes("JPEG")}
ROBOFLOW = {f"train/{name}": content for name, content in PHOTOS.items()}
ROBOFLOW["train/_annotations.coco.json"] = json_bytes(INSTANCES)
YOLO = {f"images/{name}": content for name, content in PHOTOS.items()}
YOLO |= {"data.yaml": b"path: .\nnames: [sea, sand]\n", "labels/a.txt": b"0 .5 .5 .1 .1\n1 .5 .5 .1 .1\n"}
CATEGORIES = {"categories": [{"id": i, "name": name} for i, name in enumerate(imaterialist.LABEL_NAMES)]}
ROWS = b'ImageId,EncodedPixels,Height,Width,ClassId\na.jpg,1 2,9,9,3_12\nb.jpg,"1 2",9,9,4\na.jpg,1 2,9,9,0\n'
FASHION = {
    "train.csv": ROWS,
    "label_descriptions.json": json_bytes(CATEGORIES),
    **{f"train/{name}": content for name, content in PHOTOS.items()},
}
COCO = {
    "annotations/instances_val2014.json": json_bytes(OFFICIAL),
    **{f"val2014/{name}": content for name, content in PHOTOS.items()},
}
SUPPORT = b"file,labels\n/x/a.jpg,sea|sand\nb.jpg,sea\n"
SPLIT = {"train": ["sea"], "validation": ["sand", "tide"], "novel": ["rock", "dune"]}
LABEL_LIST = "dog\nhot_dog\thot dog\ncafé\n".encode()
ANNOTATION = (
    b'<?xml version="1.0"?><annotation><filename>a.jpg</filename><object><name>car</name><difficult>0</difficult>'
    b"</object><object><name>dog</name><difficult>1</difficult></object></annotation>"
)
VOC = {
    "VOC2007/ImageSets/Main/train.txt": b"000001\n000002\n",
    **{f"VOC2007/Annotations/00000{i}.xml": ANNOTATION for i in (1, 2)},
    **{f"VOC2007/JPEGImages/00000{i}.jpg": PHOTOS["a.jpg"] for i in (1, 2)},
}
NUS = {
    "ImageList/Imagelist.txt": b"place\\a.jpg\nb.jpg\n",
    **{f"Groundtruth/AllLabels/Labels_{label}.txt": b"1\n0\n" for label in nus_wide.LABEL_NAMES},
    **{f"images/{name}": content for name, content in PHOTOS.items()},
}
TABLE = {
    "names": np.array(["a", "b"]),
    "label_names": np.array(LABELS),
    "labels": np.eye(2, len(LABELS), dtype=bool),
    "ignored": np.zeros((2, len(LABELS)), bool),
    "records": np.array([[0, 1], [0, 0]]),
    "unreadable": np.array(["", "damaged"]),
    "notes": np.array(["a note"]),
    "digest": np.array("abc"),
}
WORDS = b"the 0.1 -0.2 3\ndog 1 2.5e-1 3\nhot -1 .5 7\ncat 1 1 1\n"
WORD_ARRAYS = {"dog": np.float32([1, 2]), "hot dog": np.float32([3, 4])}
WORD2VEC = b"3 2\n" + b"".join(w + b" " + np.float32([1, 2]).tobytes() + b"\n" for w in (b"dog", b"hot", b"cat"))
SENTENCES = b"dog\tThe dog sat.\nhot dog\ta hot dog, a hot-dog\ncat\tcats\n"
MANIFEST = {"format": 1, "config": {}, "files": {}, "models": [], "labels": {}, "identity": {}}
MANIFEST["sha256"] = saved.manifest_digest(MANIFEST)
ENTRY = {
    "n_shot": 1,
    "theta": {"chosen": 0.5},
    "validation": {"calibration": {}, "macro_ap": {}},
    "config": {"shots": [1]},
}
RUN = {
    "results.json": json_bytes([ENTRY | dict.fromkeys(("dataset", "episodes", "methods", "calibration_error"))]),
    "trained_with.json": json_bytes({"inputs": {"weights": "random"}}),
    "label_vectors.safetensors": files._packed(WORD_ARRAYS, {"splits": json.dumps({"train": ["dog"]})}),
}
RESULTS = [
    {
        "n_shot": 1,
        "config": {"shots": [1], "data": {"policy": ""}},
        "calibration_error": {},
        "tuned": {},
        "theta": {"sweep": []},
    }
]
METRICS = b'{"n_shot": 1, "step": 2, "cm_loss": 0.5}\n{"stage": "pretrain", "step": 9}\n'


def one(filename, valid, read, check, named="missing or empty"):
    """A parser of a single file."""
    return Parser(filename, filename, valid, lambda root: read(root / filename), check, named)


def photo(name, valid):
    parser = one(f"{name}.img", valid, lambda path: transforms.decode_photo(path, "my photo"), check_photo, "my photo")
    return parser._replace(name=f"photo-{name}")


def source(name, module, filename, files, named="missing or empty"):
    """The folder of a dataset, of which one file is damaged."""
    return Parser(name, filename, files[filename], lambda root: module.scan(root).read(), check_contents, named, files)


def word_vectors(path):
    return label_embeddings.load_word_vectors(path, ["dog", "hotdog"], ["dog", "hot dog"])


def sentences(path):
    return text_encoders.read_sentences(path, ["dog", "hotdog"], ["dog", "hot dog"])


def unpack(path):
    shutil.rmtree(path.parent / "out", ignore_errors=True)
    download.unpack(path, path.parent / "out")
    return path.parent


def metrics_log(path):
    MetricsLog(path, {"n_shot": 1}, after_step=2)
    return path


PARSERS = [
    photo("png", photo_bytes("PNG")),
    photo("palette", palette()),
    photo("grey16", photo_bytes("PNG", Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257))),
    photo("jpeg", rotated()),
    photo("cmyk", photo_bytes("JPEG", Image.fromarray(PIXELS).convert("CMYK"))),
    photo("gif", animation()),
    photo("bmp", photo_bytes("BMP")),
    photo("tiff", photo_bytes("TIFF")),
    photo("ico", photo_bytes("ICO")),
    *([photo("webp", photo_bytes("WEBP"))] if features.check("webp") else []),
    source("labels.csv", folder, "labels.csv", PHOTOS | {"labels.csv": b"file,labels\na.jpg,sea|sand\nb.jpg,sea\n"}),
    source("columns.csv", folder, "labels.csv", PHOTOS | {"labels.csv": b'file,sea,"sand"\na.jpg,1,0\n"b.jpg",,1\n'}),
    source("separators", folder, "x.csv", PHOTOS | {"x.csv": b'File;Tags;\na.jpg;"sea, sand";\nb.jpg;sea;\n;;\n'}),
    source("lists", folder, "x.csv", PHOTOS | {"x.csv": b'image,choice\na.jpg,"[""sea"",""sand""]"\nb.jpg,sea\n'}),
    source("labels.jsonl", folder, "labels.jsonl", PHOTOS | {"labels.jsonl": RECORDS}),
    source("tasks", folder, "export.json", PHOTOS | {"export.json": json_bytes(TASKS)}),
    source("roboflow", folder, "train/_annotations.coco.json", ROBOFLOW),
    source("yolo-names", folder, "data.yaml", YOLO),
    source("yolo-boxes", folder, "labels/a.txt", YOLO),
    source("labels.json", folder, "labels.json", PHOTOS | {"labels.json": json_bytes(INSTANCES)}),
    source("voc-annotation", voc, "VOC2007/Annotations/000001.xml", VOC, "000001"),
    source("voc-list", voc, "VOC2007/ImageSets/Main/train.txt", VOC),
    source("coco", coco, "annotations/instances_val2014.json", COCO),
    source("nus-list", nus_wide, "ImageList/Imagelist.txt", NUS),
    source("nus-truth", nus_wide, "Groundtruth/AllLabels/Labels_sun.txt", NUS),
    source("imaterialist", imaterialist, "train.csv", FASHION),
    source("categories", imaterialist, "label_descriptions.json", FASHION),
    one("support.csv", SUPPORT, lambda path: folder.read_csv(path, anywhere=True), check_table),
    one("split.json", json_bytes(SPLIT), lambda path: splits.read_label_split(path, LABELS), check_split),
    one("table.npz", npz(TABLE), lambda path: prepared._read_table(path.parent), check_table_file),
    one("archive.zip", zipped({"d/a.txt": b"a" * 100, "b.txt": b"b"}), unpack, check_unpacked),
    one("archive.tar", tarred({"d/a.txt": b"a" * 100, "b.txt": b"b"}), unpack, check_unpacked),
    one("weights.safetensors", save(state()), read_state_dict, check_state),
    one("weights.npz", npz(state()), read_state_dict, check_state),
    one("weights.pth", PTH, read_state_dict, check_state),
    one("legacy.pth", b"".join(LEGACY), read_state_dict, check_state),
    one("script.pt", SCRIPT, read_state_dict, check_state),
    one("fitting.safetensors", save(state()), lambda path: load_weights(path, Conv4(width=2), 32), check_variables),
    one("words.txt", WORDS, word_vectors, check_vectors),
    one("words.vec", b"4 3\n" + WORDS, word_vectors, check_vectors),
    one("words.vec.gz", gzip.compress(WORDS), word_vectors, check_vectors),
    one("words.npz", npz(WORD_ARRAYS), word_vectors, check_vectors),
    one("words.safetensors", save(WORD_ARRAYS), word_vectors, check_vectors),
    one("words.bin", WORD2VEC, word_vectors, check_vectors),
    one("labels.txt", LABEL_LIST, lambda path: read_labels(str(path)), check_labels),
    one("sentences.tsv", SENTENCES, sentences, check_mentions),
    one("model.json", json_bytes(MANIFEST), lambda path: saved.load(path.parent), no_result),
    one("results.json", json_bytes(RESULTS), lambda path: report.read_results(path.parent), check_results),
    one("metrics.jsonl", METRICS, lambda path: report.read_metrics(path.parent), check_metrics),
    one("log.jsonl", METRICS, metrics_log, check_log),
    *(Parser(f"run-{name}", name, RUN[name], saved.load, no_result, others=RUN) for name in RUN),
]  # fmt: skip


# --- the tests


def outcome(parser, root):
    """Whether the file is read; if not, the error is one that a user understands."""
    started = time.process_time()
    try:
        result = parser.parse(root)
    except InputError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 2000 + len(str(root)) * 2, message
        assert str(root) in message or parser.named in message, message
        message.encode()  # it can be printed
        whole = False
    else:
        parser.check(result)
        whole = True
    assert time.process_time() - started < SECONDS
    return whole


@pytest.mark.parametrize(
    "parser", [pytest.param(p, marks=[pytest.mark.extras] * (p.name == "words.bin"), id=p.name) for p in PARSERS]
)
def test_any_file_is_read_or_refused_in_one_line(parser, tmp_path):
    if parser.name == "words.bin":
        pytest.importorskip("gensim")
    root = tmp_path / "root"
    for name, content in {**parser.others, parser.filename: parser.valid}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    assert outcome(parser, root) or parser.check is no_result

    @EXAMPLES
    @given(contents(parser.valid))
    def survives(content):
        (root / parser.filename).write_bytes(content)
        outcome(parser, root)

    middle = len(parser.valid) // 2
    for token in TOKENS:
        for content in (token, parser.valid + token, parser.valid[:middle] + token + parser.valid[middle:]):
            (root / parser.filename).write_bytes(content)
            outcome(parser, root)
    survives()


EVENTS: list[tuple[str, Any]] | None = None  # what Python reports while a weights file is read
HARMLESS = {"open", "builtins.id"}


def note(event, arguments):
    if EVENTS is not None:
        EVENTS.append((event, arguments))


def global_(module, name):
    return b"c" + module + b"\n" + name + b"\n"


EVIL = [
    *(
        global_(b"posix", b"system"),
        global_(b"os", b"system"),
        global_(b"builtins", b"eval"),
        global_(b"builtins", b"exec"),
    ),
    *(global_(b"subprocess", b"Popen"), global_(b"builtins", b"getattr"), global_(b"builtins", b"__import__")),
    *(
        global_(b"torch._utils", b"_rebuild_tensor_v2"),
        global_(b"collections", b"OrderedDict"),
        global_(b"torch", b"FloatStorage"),
    ),
    *(global_(b"__torch__.os", b"system"), global_(b"torch.jit._pickle", b"build_intlist"), global_(b"numpy", b"load")),
    *(
        b"\x8c\x02os\x8c\x06system\x93",
        b"\x8c\x08builtins\x8c\x04eval\x93",
        b"ios\nsystem\n",
        b"\x82\x01",
        b"\x84\x01\x00\x00\x00",
    ),
    *(b"Vtouch executed\n", b"V__import__('os').mkdir('executed')\n", b"K\x00", b"K\x02", b"N", b")", b"]", b"}", b"("),
    *(
        b"t",
        b"l",
        b"d",
        b"\x85",
        b"\x86",
        b"\x87",
        b"R",
        b"\x81",
        b"\x92",
        b"o",
        b"b",
        b"Q",
        b"P0\n",
        b"s",
        b"u",
        b"a",
        b"e",
    ),
    *(b"q\x00", b"h\x00", b"\x94", b"0", b"2", b"r\xff\xff\xff\x7f", b"p2000000000\n", b"\x8f", b"\x90", b"\x91"),
    *(
        b"X\x07\x00\x00\x00storage",
        b"X\x01\x00\x00\x000",
        tensor(b"0", 4),
        b"\x8d" + b"\xff" * 8,
        b"I" + b"9" * 5000 + b"\n",
    ),
]


@settings(EXAMPLES, max_examples=4 * (MOST or 40))
@given(
    program=st.lists(st.sampled_from(EVIL), max_size=30).map(b"".join) | damaged(PICKLED), kind=st.sampled_from("zs")
)
def test_no_program_in_a_weights_file_does_anything(program, kind, tmp_path):
    global EVENTS
    path = tmp_path / "evil.pth"
    if kind == "z":
        path.write_bytes(zipped({"a/data.pkl": b"\x80\x02" + program + b".", "a/data/0": NUMBERS, "a/data/1": NUMBERS}))
    else:
        path.write_bytes(b"".join([*LEGACY[:3], b"\x80\x02" + program + b".", *LEGACY[4:]]))
    EVENTS = []
    try:
        check_state(read_state_dict(path))
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error) and len(str(error)) < 2000
    finally:
        events, EVENTS = EVENTS, None
    assert {event for event, _ in events} <= HARMLESS, events
    opened = [arguments for event, arguments in events if event == "open"]
    assert all(str(name) == str(path) and mode == "r" for name, mode, _ in opened), opened


for codec in ("ascii", "latin-1", "cp437", "unicode_escape", "raw_unicode_escape"):
    codecs.lookup(codec)  # imports it, which would be an event
sys.addaudithook(note)
