"""The command that labels photos: its files, its lines, and mistakes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import jax
import numpy as np
import pytest

from mlfsic_jax import predict
from mlfsic_jax.run.classifier import fit, labels_above, predict_each
from mlfsic_jax.system.errors import InputError


@pytest.fixture
def user(frozen, tmp_path, monkeypatch):
    """A folder as a user has it: photos, two of them bad, and a support.csv of five lines."""
    monkeypatch.chdir(tmp_path)
    source = sorted((frozen[1].parent / "photos/photos").iterdir())
    for i, path in enumerate(source[:20]):
        target = tmp_path / "mine" / ("deeper" if i % 4 == 0 else "") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (tmp_path / "mine" / "notes.txt").write_text("no photo")
    for i, path in enumerate(source[20:25]):
        shutil.copy(path, tmp_path / f"example{i}.png")
    labels = ["kelp", "kelp|sea", "pine tree", "sea", ""]
    lines = ["file,labels", *(f"example{i}.png,{names}" for i, names in enumerate(labels))]
    (tmp_path / "support.csv").write_text("\n".join(lines))
    return tmp_path


def arguments(frozen, **changes):
    flags = {"workdir": frozen[1], "support": "support.csv", "images": "mine", "out": "out.csv"}
    flags["cache_dir"] = jax.config.jax_compilation_cache_dir
    return [f"--{name}={value}" for name, value in (flags | changes).items()]


@pytest.fixture(autouse=True)
def keep_compilation_cache():
    """The command sets it for its process, which here is that of all tests."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_command(frozen, user, model):
    command = [sys.executable, "-m", "mlfsic_jax.predict", *arguments(frozen)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "best on validation labels" in done.stdout and "wrote out.csv: 20 photos, 3 labels" in done.stdout
    assert "predicting: 20/20 photos" in done.stderr and "Traceback" not in done.stderr
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "labels", "kelp", "sea", "pine tree"] and len(rows) == 20
    few = fit(model, [f"example{i}.png" for i in range(5)], [["kelp"], ["kelp", "sea"], ["pine tree"], ["sea"], []])
    for row in rows:
        (p,) = few.predict(row["file"]).probabilities
        np.testing.assert_allclose([float(row[name]) for name in few.label_names], p, atol=1e-4)  # four decimals
        assert row["labels"] == "|".join(labels_above(few, p))


def test_json_and_photos_that_cannot_be_read(frozen, user, capsys):
    for name, content in (("cut.png", Path("example0.png").read_bytes()[:300]), ("text.jpg", b"not a photo")):
        Path("mine", name).write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        predict.main([*arguments(frozen, out="out.json", method="prototypes"), "--images", "example0.png", "mine/00*"])
    assert caught.value.code == predict.UNREADABLE == 3
    captured = capsys.readouterr()
    bad = [line for line in captured.err.splitlines() if line.startswith("unreadable: ")]
    assert len(bad) == 2 and "mine/cut.png" in bad[0] and "mine/text.jpg" in bad[1]
    assert "wrote out.json: 21 photos, 3 labels, 2 unreadable photos left out" in captured.out
    content = json.loads(Path("out.json").read_text())
    assert content["method"] == "prototypes" and content["thresholds"] == {"kelp": 0.5, "sea": 0.5, "pine tree": 0.5}
    assert [entry["file"] for entry in content["unreadable"]] == ["mine/cut.png", "mine/text.jpg"]
    assert len(content["photos"]) == 21 and content["photos"][-1]["file"] == "example0.png"
    for photo in content["photos"]:
        assert set(photo["labels"]) == {name for name, p in photo["probabilities"].items() if p > 0.5}


def test_label_studio_s_tasks(frozen, user, model, capsys):
    Path("mine/cut.png").write_bytes(Path("example0.png").read_bytes()[:300])
    flags = {"format": "label-studio", "out": "out.json", "image_root": user, "method": "ridge"}
    with pytest.raises(SystemExit) as caught:
        predict.main(arguments(frozen, **flags))
    assert caught.value.code == predict.UNREADABLE
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("wrote out.json: 20 photos, 3 labels, 1 unreadable") and line.count("out.xml") == 1
    choices = ElementTree.parse("out.xml").findall("Choices/Choice")
    assert [choice.get("value") for choice in choices] == ["kelp", "sea", "pine tree"]
    photos = [f"example{i}.png" for i in range(5)]
    few = fit(model, photos, [["kelp"], ["kelp", "sea"], ["pine tree"], ["sea"], []], method="ridge")
    tasks = json.loads(Path("out.json").read_text())
    found = [task["data"]["image"].removeprefix("/data/local-files/?d=") for task in tasks]
    assert len(set(found)) == 20 and all(photo.startswith("mine/") for photo in found)
    results = [task["predictions"][0]["result"] for task in tasks]
    labels = [result[0]["value"]["choices"] if result else [] for result in results]
    assert labels == [list(names) for names in few.predict(found).labels] and any(labels)


@pytest.mark.parametrize(
    ("changes", "table", "complaint"),
    [
        ({"out": "out.txt"}, None, "--out=out.txt must end in .csv or .json"),
        ({"out": "out.json", "format": "csv"}, None, "--out=out.json must end in .csv"),
        ({"out": "out.csv", "format": "json"}, None, "--out=out.csv must end in .json"),
        ({"out": "out.csv", "format": "label-studio"}, None, "--out=out.csv must end in .json"),
        ({"out": "out.json", "format": "coco"}, None, "invalid choice: 'coco' (choose from 'csv', 'json', 'label-s"),
        ({"out": "out.json", "format": "label-studio"}, None, "give it as --image_root=FOLDER"),
        (
            {"out": "out.json", "format": "label-studio", "image_root": "empty"},
            None,
            "lies outside of --image_root=empty",
        ),
        ({"out": "none/out.csv"}, None, "--out=none/out.csv cannot be written"),
        ({"support": "none.csv"}, None, "--support=none.csv: no such file"),
        ({"images": "none"}, None, "--images=none is no file, no folder and no pattern"),
        ({"images": "empty"}, None, "--images=empty holds no photos"),
        ({"images": "support.csv"}, None, "none of the 1 photos can be read"),
        ({"workdir": "mine"}, None, "mine holds no model"),
        ({"n_shot": "5"}, None, "has no model for 5 shots, only for 1"),
        ({"n_shot": "five"}, None, "invalid int value: 'five'"),
        ({"shard": "2/2"}, None, "--shard=2/2 must be i/n with i from 0 to n-1"),
        ({"shard": "-1/2"}, None, "--shard=-1/2 must be i/n with i from 0 to n-1"),
        ({"shard": "1"}, None, "--shard=1 must be i/n with i from 0 to n-1"),
        ({"shard": "20/21"}, None, "--shard=20/21 has none of the 20 photos: divide them among fewer"),
        ({"method": "cnn"}, None, "invalid choice: 'cnn'"),
        ({}, "file,labels\nexample0.png,kelp\nexample1.png,kepl\n", "'kepl' (missing: kepl)"),
        ({}, "file,kelp,sea,sun\nexample0.png,1,0,0\nexample1.png,0,1,0\n", "label 'sun' has no support photo"),
        (
            {},
            "file,labels\nexample0.png,kelp\nnone.png,sea\n",
            "support.csv: the photo none.png is not there: paths in it",
        ),
        ({}, "file,labels\nexample0.png,kelp\nsupport.csv,sea\n", "photo support.csv is not a photo of any known kind"),
        ({}, "name,labels\nexample0.png,kelp\n", "support.csv, line 1: the columns must be file,labels"),
        ({}, "file,labels\n", "support.csv names no photo"),
        ({}, "file,labels\nexample0.png,labels\nexample1.png,sea\n", "a label called file or labels"),
    ],
)
def test_mistakes_of_the_user_end_in_one_line(frozen, user, capsys, changes, table, complaint):
    (user / "empty").mkdir()
    if table is not None:
        (user / "support.csv").write_text(table)
    with pytest.raises(SystemExit) as caught:
        predict.main(arguments(frozen, **{"method": "word_ridge"} | changes))
    line = str(caught.value.code)
    assert line.startswith("error: ") and complaint in line and "\n" not in line
    assert not any(user.glob("*out*"))


def stop_after(patch, n, error):
    """The command predicts n photos, then ends by an error; returns the list to which it adds those that it reads."""
    began = []

    def stopped(classifier, photos):
        def noted():
            for photo in photos:
                began.append(photo)
                yield photo

        for i, row in enumerate(predict_each(classifier, noted())):
            if i == n:
                raise error
            yield row

    patch.setattr(predict, "predict_each", stopped)
    return began


@pytest.mark.parametrize("out", ["out.csv", "out.json", "tasks.json"])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(frozen, user, monkeypatch, capsys, out):
    Path("mine/cut.png").write_bytes(Path("example0.png").read_bytes()[:300])
    flags = {"out": out, "method": "ridge"}
    flags |= {"format": "label-studio", "image_root": user} if out == "tasks.json" else {}

    def run(status, **changes):
        with pytest.raises(SystemExit) as caught:
            predict.main(arguments(frozen, **flags | changes))
        assert caught.value.code == status
        return capsys.readouterr()

    def files():
        return {path.name: path.read_bytes() for path in user.iterdir() if path.is_file()}

    run(predict.UNREADABLE)
    undisturbed = files()
    Path(out).unlink()
    for number in (signal.SIGTERM, signal.SIGINT):
        with monkeypatch.context() as patch:
            stop_after(patch, 6, KeyboardInterrupt(number))
            said = run(128 + number)
        assert said.err.splitlines()[-1] == "interrupted: the same command goes on with the photos that are left"
        assert not Path(out).exists() and Path(f"{out}.journal").exists()
    assert "going on: 6 of 21 photos are done" in said.out
    with monkeypatch.context() as patch:
        began = stop_after(patch, None, None)
        said = run(predict.UNREADABLE)
    assert "going on: 12 of 21 photos are done" in said.out and "predicting: 9/9 photos" in said.err
    assert len(began) == 9 and said.err.count("unreadable: ") == 1
    assert files() == undisturbed  # and no journal


def test_other_settings_or_another_support_begin_anew(frozen, user, monkeypatch, capsys):
    for method in ("ridge", "prototypes"):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_after(patch, 6, KeyboardInterrupt(signal.SIGINT))
            predict.main(arguments(frozen, method=method))
    shutil.copy("example3.png", "example0.png")
    predict.main(arguments(frozen, method="prototypes"))
    said = capsys.readouterr().out
    assert said.count("starting anew") == 2 and "going on" not in said and "wrote out.csv: 20 photos" in said


def test_shards_are_the_parts_of_the_whole(frozen, user, monkeypatch):
    predict.main(arguments(frozen, method="ridge"))
    head, *whole = Path("out.csv").read_text().splitlines()
    for i in range(3):
        predict.main(arguments(frozen, method="ridge", shard=f"{i}/3", out=f"part{i}.csv"))
        assert Path(f"part{i}.csv").read_text().splitlines() == [head, *whole[i::3]]
    assert predict._shard(list("abcde"), None) == list("abcde")


@pytest.mark.parametrize("names", [("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")])
def test_launched_processes_take_a_shard_each(frozen, user, monkeypatch, capsys, names):
    for name, value in zip(names, "12", strict=True):
        monkeypatch.setenv(name, value)
    predict.main(arguments(frozen, method="ridge"))
    assert "--shard=1/2, as this process was launched" in capsys.readouterr().out
    assert len(Path("out.csv").read_text().splitlines()) == 1 + 10  # of 20 photos
    monkeypatch.setenv(names[0], "second")
    with pytest.raises(InputError, match="--shard=second/2 must be i/n"):
        predict._shard(list("abcde"), None)
    assert predict._shard(list("abcde"), "0/1") == list("abcde")


def test_photos_outside_of_the_csv_file_s_folder(frozen, user, tmp_path):
    (user / "tables").mkdir()
    absolute = user / "example1.png"
    (user / "tables/support.csv").write_text(f"file,labels\n../example0.png,kelp\n{absolute},sea\n")
    predict.main(arguments(frozen, support="tables/support.csv", images="mine/deeper", method="ridge"))
    assert len(Path("out.csv").read_text().splitlines()) == 6


def test_names_of_photos_and_labels_in_any_script(frozen, user, capsys):
    for name in (b"caf\xe9.png", "\u6d77.png".encode()):  # the first in Latin-1, which is no UTF-8
        shutil.copy("example0.png", os.path.join(b"mine/deeper", name))
    Path("support.csv").write_text(
        "file,labels\nexample0.png,caf\u00e9\nexample1.png,cafe\u0301|\u6d77\nexample2.png,\u6d77\n"
    )
    predict.main(arguments(frozen, images="mine/deeper", method="ridge"))
    lines = Path("out.csv").read_bytes().splitlines()
    assert lines[0].decode() == "file,labels,caf\u00e9,\u6d77"
    assert any(line.startswith(b"mine/deeper/caf\xe9.png,") for line in lines)
    assert any(line.startswith("mine/deeper/\u6d77.png,".encode()) for line in lines)
    Path("cut.csv").write_text("file,labels\n/dev/zero,sea\nexample1.png,kelp\n")
    with pytest.raises(SystemExit, match="error: photo /dev/zero cannot be read from /dev/zero: it is no file"):
        predict.main(arguments(frozen, support="cut.csv", method="ridge"))
