"""Exported folders: they predict what the run did, on their own."""

import gzip
import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mlfsic_jax
from mlfsic_jax import export as command
from mlfsic_jax.methods import METHODS
from mlfsic_jax.run import export
from mlfsic_jax.run.classifier import fit
from mlfsic_jax.run.saved import load
from mlfsic_jax.system.errors import InputError
from tests import made_up
from tests.own_photos import assert_like_evaluation
from tests.tiny import TINY


def test_a_trained_backbone_predicts_like_evaluation(exported_scenes):
    config, run, out = exported_scenes
    assert sorted(path.name for path in out.iterdir()) == [
        *("card.md", "model.json", "model_1shot.safetensors", "words.safetensors")
    ]
    assert_like_evaluation(load(out), config, run)


def test_a_frozen_backbone_predicts_the_same_on_its_own(exported):
    before, photos, out = exported
    after = load(out)
    labels = ["sea", "pine tree", "kelp", ["sea", "sun"], []]
    for method in ("region_word_ridge", "lcm", "ridge", "maml", "pla_words"):
        a, b = (
            fit(model, photos[:5], labels, method=method).predict(photos[5:15]).probabilities
            for model in (before, after)
        )
        # Other words than the dataset's labels are in half precision: 1e-3 of a word vector's numbers.
        np.testing.assert_allclose(b, a, atol=2e-3 if METHODS[method].needs_words else 0)
    known = [["sea"], ["rock"], ["pine tree"]]
    a, b = (fit(m, photos[:3], known).predict(photos[5:15]).probabilities for m in (before, after))
    np.testing.assert_array_equal(b, a)


def test_words_that_travel(exported, exported_scenes):
    _, photos, out = exported
    words, few = load_file(out / "words.safetensors"), load_file(out.parent / "few/words.safetensors")
    assert set(words) == {*made_up.FOLDER_LABELS, "kelp", "sun", "umbrella", "pine", "tree"}
    assert set(few) == {*made_up.FOLDER_LABELS, "kelp"}  # the file begins with beach, dune, kelp
    assert words["kelp"].dtype == np.float16 and words["pine tree"].dtype == words["sea"].dtype == np.float32
    lines = (out.parent / "moved_data/glove.6B.300d.txt").read_text().splitlines()
    table = {word: np.array(numbers, np.float32) for word, *numbers in map(str.split, lines)}
    np.testing.assert_allclose(words["kelp"], table["kelp"], rtol=1e-3)
    np.testing.assert_allclose(words["pine tree"], (table["pine"] + table["tree"]) / 2, rtol=1e-6)
    with pytest.raises(InputError, match="'blob'.*--vectors=FILE"):
        fit(load(out), photos[:2], ["blob", "sea"], method="base")
    with pytest.raises(InputError, match=r"words.safetensors has no vector for 1 of the 2 labels: 'kelp'"):
        fit(load(exported_scenes[2]), photos[:2], ["kelp", "red star"], method="base")


@pytest.mark.parametrize(
    "name",
    [
        *("vectors.vec", "vectors.txt.gz", "vectors.npz", "vectors.safetensors"),
        pytest.param("vectors.bin", marks=pytest.mark.extras),
    ],
)
def test_words_of_every_kind_of_file(tmp_path, name):
    vectors = {
        "sea": np.arange(3, dtype=np.float32),
        "New York": np.ones(3, np.float32),
        "sun": np.zeros(3, np.float32),
    }
    path = tmp_path / name
    lines = [f"{word} {' '.join(map(str, vector))}\n" for word, vector in vectors.items()]
    if name.endswith(".bin"):
        pytest.importorskip("gensim")
        vectors["New_York"] = vectors.pop("New York")  # no spaces there
        records = (word.encode() + b" " + vector.tobytes() + b"\n" for word, vector in vectors.items())
        path.write_bytes(b"3 3\n" + b"".join(records))
    elif name.endswith(".npz"):
        np.savez(path, **vectors)
    elif name.endswith(".safetensors"):
        save_file(vectors, path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress("".join(lines).encode()))
    else:
        path.write_bytes(b"3 3\n" + "".join(lines).encode() + b"\xff\xfe 1 2 3\n")
    found = dict(export._words_of(path, 3, 9))
    assert found.keys() == vectors.keys()
    for word, vector in vectors.items():
        np.testing.assert_array_equal(found[word], vector)


def test_word_vectors_that_are_missing_or_damaged(exported, tmp_path):
    model = exported[0]
    path = tmp_path / "words.txt"
    model = model._replace(word_files=(model.word_files[0], path))
    with pytest.raises(InputError, match=r"words.txt are missing: work in the folder"):
        export._words(model, 9)
    path.write_text(f"sea {'1 ' * 9}x\n")
    with pytest.raises(InputError, match=r"words.txt is missing, cut short or damaged \(could not convert"):
        export._words(model, 9)


def test_the_card_and_the_manifest(exported_scenes, exported):
    results = json.loads((exported_scenes[1] / "results.json").read_text())[0]
    card, manifest = ((exported_scenes[2] / name).read_text() for name in ("card.md", "model.json"))
    score = results["methods"]["region_word_ridge"]["macro_ap"]
    for part in (
        *("8 labels: red circle", "6 labels that it was not trained on: red square"),
        f"1-shot, {TINY['eval.episodes']} episodes",
        f"| region_word_ridge | {100 * score['mean']:.1f} ± {100 * score['ci95']:.1f} |",
        *("trained from random weights", "generated scenes", "Only the dataset's labels have vectors here"),
    ):
        assert part in card
    assert json.loads(manifest)["card"] == card and json.loads(manifest)["mlfsic_jax"] == mlfsic_jax.__version__
    other = (exported[2] / "card.md").read_text()
    for part in ("frozen", "conv4.safetensors, sha256", "Public Domain Dedication", "have vectors here (glove)"):
        assert part in other
    here = str(exported[2].parent)
    assert not any(here in path.read_text() for path in (exported[2] / "card.md", exported[2] / "model.json"))


def test_the_card_may_be_edited(exported_scenes, tmp_path):
    out = shutil.copytree(exported_scenes[2], tmp_path / "out")
    assert json.loads((out / "model.json").read_text())["files"].keys() == {
        "model_1shot.safetensors",
        "words.safetensors",
    }
    (out / "card.md").write_text("# Our model\n")
    assert load(out).trained[0].n_shot == 1
    (out / "card.md").unlink()
    assert load(out).trained[0].n_shot == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_export_that_fails_costs_nothing(exported_scenes, tmp_path, monkeypatch, error):
    out = shutil.copytree(exported_scenes[2], tmp_path / "out")
    (out / "notes").mkdir()
    (out / "notes/model.json").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (tmp_path / "link").symlink_to(out)

    def fails(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_json", fails)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else InputError):
            export.export(exported_scenes[1], tmp_path / "link", n_words=2)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    export.export(exported_scenes[1], tmp_path / "link", n_words=2)
    assert load(out).trained[0].n_shot == 1 and (out / "notes/model.json").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["link", "out"] and (tmp_path / "link").is_symlink()


def test_the_command_replaces_exports_only(exported_scenes, tmp_path, capsys, monkeypatch):
    flags = [f"--workdir={exported_scenes[1]}", f"--out={tmp_path / 'deeper/out'}"]
    command.main(flags)
    assert "card.md says what it is" in capsys.readouterr().out
    (tmp_path / "deeper/out/notes.txt").write_text("mine")
    (tmp_path / "deeper/out/words.safetensors").write_bytes(b"")
    command.main(flags)
    assert load(tmp_path / "deeper/out").trained[0].n_shot == 1
    assert (tmp_path / "deeper/out/notes.txt").read_text() == "mine"
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["out"]

    (tmp_path / "other").mkdir()
    (tmp_path / "other/photo.jpg").write_bytes(b"")
    monkeypatch.chdir(tmp_path / "deeper/out")
    for changes, complaint in (
        (["--out=."], "--out=. holds the working folder"),
        (["--out=.."], "--out=.. holds"),
        ([f"--out={tmp_path / 'other'}"], "other holds something that is no export"),
        ([f"--out={tmp_path / 'other/photo.jpg'}"], "photo.jpg is a file: give a folder"),
        ([f"--workdir={tmp_path / 'other'}"], "other holds no model"),
        ([f"--workdir={exported_scenes[2]}"], "is an exported folder already"),
        (["--words=-1"], "--words=-1 must be 0 or more"),
    ):
        with pytest.raises(SystemExit) as caught:
            command.main([*flags, *changes])
        assert str(caught.value.code).startswith("error: ") and complaint in str(caught.value.code)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["photo.jpg"]
