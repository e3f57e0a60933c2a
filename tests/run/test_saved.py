"""Exported folders: they predict what the run did, on their own, and what was cut short is noticed."""

import gzip
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.test_predict import assert_like_evaluation, folder_run

import mlfsic_jax
from configs import demo
from mlfsic_jax.run import classifier as predict
from mlfsic_jax.run import saved as export
from mlfsic_jax.run import train
from mlfsic_jax.system import files
from mlfsic_jax.system.errors import InputError
from tests import made_up
from tests.tiny import TINY


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A run on generated scenes whose backbone is trained: config, workdir and its export."""
    root = tmp_path_factory.mktemp("scenes")
    config = demo.get_config()
    config.update_from_flattened_dict(TINY | {"data.images_per_split": (60, 40, 40)})
    config.cache_dir = str(root / "cache")
    train.train_and_evaluate(config, root / "run")
    export.export(root / "run", root / "out")
    return config, root / "run", root / "out"


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A run with a frozen backbone and GloVe, whose files move away after the export: model, photos and the export."""
    root = tmp_path_factory.mktemp("frozen")
    _, run = folder_run(root)
    before = predict.load(run)
    export.export(run, root / "out")
    export.export(run, root / "few", n_words=3)
    for name in ("run", "data", "cache"):
        (root / name).rename(root / f"moved_{name}")
    words = root / "moved_run/label_vectors.safetensors", root / "moved_data/glove.6B.300d.txt"
    return before._replace(word_files=words), sorted((root / "photos/photos").iterdir()), root / "out"


def test_a_trained_backbone_predicts_like_evaluation(scenes):
    config, run, out = scenes
    assert sorted(path.name for path in out.iterdir()) == [
        *("card.md", "model.json", "model_1shot.safetensors", "words.safetensors")
    ]
    assert_like_evaluation(predict.load(out), config, run)


def test_a_frozen_backbone_predicts_the_same_on_its_own(frozen):
    before, photos, out = frozen
    after = predict.load(out)
    labels = ["sea", "pine tree", "kelp", ["sea", "sun"], []]
    for method in ("region_word_ridge", "lcm", "ridge"):
        a, b = (
            predict.predict(predict.fit(model, photos[:5], labels, method=method), photos[5:15]).probabilities
            for model in (before, after)
        )
        # Other words than the dataset's labels are in half precision: 1e-3 of a word vector's numbers.
        np.testing.assert_allclose(b, a, atol=2e-3 if method not in predict.WORDLESS else 0)
    known = [["sea"], ["rock"], ["pine tree"]]
    a, b = (predict.predict(predict.fit(m, photos[:3], known), photos[5:15]).probabilities for m in (before, after))
    np.testing.assert_array_equal(b, a)


def test_words_that_travel(frozen, scenes):
    _, photos, out = frozen
    words, few = load_file(out / "words.safetensors"), load_file(out.parent / "few/words.safetensors")
    assert set(words) == {*made_up.FOLDER_LABELS, "kelp", "sun", "umbrella", "pine", "tree"}
    assert set(few) == {*made_up.FOLDER_LABELS, "kelp"}  # the file begins with beach, dune, kelp
    assert words["kelp"].dtype == np.float16 and words["pine tree"].dtype == words["sea"].dtype == np.float32
    lines = (out.parent / "moved_data/glove.6B.300d.txt").read_text().splitlines()
    table = {word: np.array(numbers, np.float32) for word, *numbers in map(str.split, lines)}
    np.testing.assert_allclose(words["kelp"], table["kelp"], rtol=1e-3)
    np.testing.assert_allclose(words["pine tree"], (table["pine"] + table["tree"]) / 2, rtol=1e-6)
    with pytest.raises(InputError, match="'blob'.*--vectors=FILE"):
        predict.fit(predict.load(out), photos[:2], ["blob", "sea"], method="base")
    with pytest.raises(InputError, match=r"words.safetensors has no vector for 1 of the 2 labels: 'kelp'"):
        predict.fit(predict.load(scenes[2]), photos[:2], ["kelp", "red star"], method="base")


@pytest.mark.parametrize("name", ["vectors.vec", "vectors.txt.gz", "vectors.bin", "vectors.npz", "vectors.safetensors"])
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
        path.write_text("3 3\n" + "".join(lines))
    found = dict(export._words_of(path, 3, 9))
    assert found.keys() == vectors.keys()
    for word, vector in vectors.items():
        np.testing.assert_array_equal(found[word], vector)


def test_word_vectors_that_are_missing_or_damaged(frozen, tmp_path):
    model = frozen[0]
    path = tmp_path / "words.txt"
    model = model._replace(word_files=(model.word_files[0], path))
    with pytest.raises(InputError, match=r"words.txt are missing: work in the folder"):
        export._words(model, 9)
    path.write_text(f"sea {'1 ' * 9}x\n")
    with pytest.raises(InputError, match=r"words.txt is missing, cut short or damaged \(could not convert"):
        export._words(model, 9)


def test_the_card_and_the_manifest(scenes, frozen):
    results = json.loads((scenes[1] / "results.json").read_text())[0]
    card, manifest = ((scenes[2] / name).read_text() for name in ("card.md", "model.json"))
    score = results["methods"]["region_word_ridge"]["macro_ap"]
    for part in (
        *("8 labels: red circle", "6 labels that it was not trained on: red square"),
        f"1-shot, {TINY['eval.episodes']} episodes",
        f"| region_word_ridge | {100 * score['mean']:.1f} ± {100 * score['ci95']:.1f} |",
        *("trained from random weights", "generated scenes", "Only the dataset's labels have vectors here"),
    ):
        assert part in card
    assert json.loads(manifest)["card"] == card and json.loads(manifest)["mlfsic_jax"] == mlfsic_jax.__version__
    other = (frozen[2] / "card.md").read_text()
    for part in ("frozen", "conv4.safetensors, sha256", "Public Domain Dedication", "have vectors here (glove)"):
        assert part in other
    here = str(frozen[2].parent)
    assert not any(here in path.read_text() for path in (frozen[2] / "card.md", frozen[2] / "model.json"))


def cut(name):
    return lambda out: (out / name).write_bytes((out / name).read_bytes()[:-1])


def change(name, old, new):
    return lambda out: (out / name).write_text((out / name).read_text().replace(old, new))


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        *((cut(name), f"{name} is cut short or was altered") for name in ("card.md", "words.safetensors")),
        (cut("model_1shot.safetensors"), "model_1shot.safetensors is cut short or was altered"),
        (cut("backbone.safetensors"), "backbone.safetensors is cut short or was altered"),
        (lambda out: (out / "words.safetensors").unlink(), "words.safetensors is missing: copy or export"),
        (cut("model.json"), "model.json is missing, cut short or damaged"),
        (change("model.json", '"theta": 0.', '"theta": 1.'), "model.json was altered or is damaged"),
        (change("model.json", '"format": 1', '"format": 2'), "model.json was altered or is damaged"),
        (lambda out: (out / "model.json").unlink(), "out holds no model"),
    ],
)
def test_a_folder_that_is_cut_short(frozen, tmp_path, harm, complaint):
    out = shutil.copytree(frozen[2], tmp_path / "out")
    harm(out)
    with pytest.raises(InputError, match=complaint) as caught:
        predict.load(out)
    assert "\n" not in str(caught.value)


def rewritten(out, change_manifest=lambda manifest: None, **arrays):
    """Changes a folder as somebody would who also mends its checksums."""
    for name, change_arrays in arrays.items():
        path = out / f"{name}.safetensors"
        content, metadata = files.read_arrays(path)
        change_arrays(content)
        files.write_arrays(path, content, metadata)
    manifest = json.loads((out / "model.json").read_text())
    change_manifest(manifest)
    for name in manifest["files"] if isinstance(manifest["files"], dict) else ():
        manifest["files"][name] = files.sha256(out / name)
    manifest["sha256"] = export._manifest_digest(manifest)
    (out / "model.json").write_text(json.dumps(manifest))


def put(**values):
    return lambda content: content.update(values)


KERNEL = "variables/params/joint/a_text/kernel"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"change_manifest": lambda m: m.pop("config")}, "the config of .* is of another version .*'config'"),
        ({"change_manifest": put(format=None)}, "has format None, this version reads 1"),
        ({"change_manifest": put(files=["card.md"])}, "model.json was altered or is of another version"),
        ({"change_manifest": put(models=7)}, "model.json was altered or is of another version"),
        ({"change_manifest": lambda m: m["models"][0].pop("theta")}, "another version .*KeyError: 'theta'"),
        ({"change_manifest": lambda m: m["config"].update(backbone="vgg")}, "config.backbone = 'vgg': must be one of"),
        (
            {"change_manifest": lambda m: m["config"]["model"].update(d_joint=13)},
            "config.model.d_joint = 13: must be a",
        ),
        ({"change_manifest": lambda m: m["config"]["model"].update(d_joint="x")}, "is of another version"),
        (
            {"change_manifest": lambda m: m["config"]["model"].update(d_joint=32)},
            r"model_1shot.safetensors does not fit its config: 'variables/params/.*' is \[.*\], expected \[",
        ),
        ({"model_1shot": lambda a: a.pop(KERNEL)}, f"does not fit its config: '{KERNEL}' is absent, expected "),
        ({"model_1shot": lambda a: a.pop("fitted/mean")}, "another version .*'mean'"),
        (
            {"model_1shot": lambda a: a.update({"fitted/mean": a["fitted/mean"][:-1]})},
            r"'fitted/mean' is \[\d+\], expected \[",
        ),
        (
            {"model_1shot": lambda a: a[KERNEL].fill(np.nan)},
            f"model_1shot.safetensors .*{KERNEL} holds NaN or infinity",
        ),
        (
            {"backbone": lambda a: a.update({k: v[..., :1] for k, v in a.items() if k.endswith("1_0/kernel")})},
            "backbone.safetensors does not fit its config: 'params/network/",
        ),
    ],
)
def test_a_folder_that_means_harm(frozen, tmp_path, changes, complaint):
    out = shutil.copytree(frozen[2], tmp_path / "out")
    rewritten(out)
    predict.load(out)
    rewritten(out, **changes)
    with pytest.raises(InputError, match=complaint) as caught:
        predict.load(out)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_folder_of_a_later_format(frozen, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "FORMAT", 0)
    with pytest.raises(InputError, match="out has format 1, this version reads 0"):
        predict.load(frozen[2])


def test_the_command_replaces_exports_only(scenes, tmp_path, capsys):
    flags = [f"--workdir={scenes[1]}", f"--out={tmp_path / 'deeper/out'}"]
    export.main(flags)
    assert "card.md says what it is" in capsys.readouterr().out
    (tmp_path / "deeper/out/notes.txt").write_text("mine")
    (tmp_path / "deeper/out/words.safetensors").write_bytes(b"")
    export.main(flags)
    assert predict.load(tmp_path / "deeper/out").trained[0].n_shot == 1
    assert (tmp_path / "deeper/out/notes.txt").read_text() == "mine"
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["out"]

    (tmp_path / "other").mkdir()
    (tmp_path / "other/photo.jpg").write_bytes(b"")
    for changes, complaint in (
        ([f"--out={tmp_path / 'other'}"], "other holds something that is no export"),
        ([f"--out={tmp_path / 'other/photo.jpg'}"], "photo.jpg is a file: give a folder"),
        ([f"--workdir={tmp_path / 'other'}"], "other holds no model"),
        ([f"--workdir={scenes[2]}"], "is an exported folder already"),
        (["--words=-1"], "--words=-1 must be 0 or more"),
    ):
        with pytest.raises(SystemExit) as caught:
            export.main([*flags, *changes])
        assert str(caught.value.code).startswith("error: ") and complaint in str(caught.value.code)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["photo.jpg"]
