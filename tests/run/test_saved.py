"""A run or an exported folder that was cut short, altered, or means harm."""

import json
import shutil

import numpy as np
import pytest

from mlfsic_jax.run import saved
from mlfsic_jax.run.classifier import fit
from mlfsic_jax.run.saved import load
from mlfsic_jax.system import files
from mlfsic_jax.system.errors import InputError


def run_copy(frozen, tmp_path):
    return shutil.copytree(frozen[1], tmp_path / "copy")


def damage(name, change=lambda data: data[: len(data) // 2]):
    def damage(run):
        for path in run.glob(name):
            path.write_bytes(change(path.read_bytes()))

    return damage


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda run: shutil.rmtree(run), "copy holds no model: give the workdir"),
        (damage("results.json"), "results.json is missing, cut short or damaged"),
        (
            damage("results.json", lambda _: b"[]"),
            "copy was trained by an older version: run its training command again",
        ),
        (damage("results.json", lambda data: data.replace(b'"scale"', b'"scales"')), "of another version"),
        (damage("trained_with.json"), "trained_with.json is missing, cut short"),
        (lambda run: (run / "label_vectors.safetensors").unlink(), "copy was trained by an older version"),
        (damage("label_vectors.safetensors"), "label_vectors.safetensors is missing, cut short or damaged"),
        (damage("model_1shot.safetensors"), "model_1shot.safetensors is missing, cut short or damaged"),
        (lambda run: (run / "model_1shot.safetensors").unlink(), "model_1shot.safetensors is missing"),
        (
            damage("trained_with.json", lambda data: data.replace(b'"weights": "', b'"weights": "0')),
            "other backbone weights than those",
        ),
        (
            damage("results.json", lambda data: data.replace(b"conv4.saf", b"gone.saf")),
            "gone.safetensors, the backbone",
        ),
    ],
)
def test_a_run_that_is_cut_short(frozen, tmp_path, harm, complaint):
    run = run_copy(frozen, tmp_path)
    harm(run)
    with pytest.raises(InputError, match=complaint) as caught:
        load(run)
    assert "\n" not in str(caught.value)


def test_a_shot_count_that_was_not_trained(frozen):
    assert load(frozen[1], n_shot=1).trained[0].n_shot == 1
    with pytest.raises(InputError, match="no model for 5 shots, only for 1"):
        load(frozen[1], n_shot=5)


def cut(name):
    return lambda out: (out / name).write_bytes((out / name).read_bytes()[:-1])


def change(name, old, new):
    return lambda out: (out / name).write_text((out / name).read_text().replace(old, new))


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (cut("words.safetensors"), "words.safetensors is cut short or was altered"),
        (cut("model_1shot.safetensors"), "model_1shot.safetensors is cut short or was altered"),
        (cut("backbone.safetensors"), "backbone.safetensors is cut short or was altered"),
        (lambda out: (out / "words.safetensors").unlink(), "words.safetensors is missing: copy or export"),
        (cut("model.json"), "model.json is missing, cut short or damaged"),
        (change("model.json", '"lcm": 0.', '"lcm": 1.'), "model.json was altered or is damaged"),
        (change("model.json", '"format": 2', '"format": 3'), "model.json was altered or is damaged"),
        (lambda out: (out / "model.json").unlink(), "out holds no model"),
    ],
)
def test_a_folder_that_is_cut_short(exported, tmp_path, harm, complaint):
    out = shutil.copytree(exported[2], tmp_path / "out")
    harm(out)
    with pytest.raises(InputError, match=complaint) as caught:
        load(out)
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
    manifest["sha256"] = saved.manifest_digest(manifest)
    (out / "model.json").write_text(json.dumps(manifest))


def put(**values):
    return lambda content: content.update(values)


KERNEL = "episodes/variables/params/joint/a_text/kernel"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"change_manifest": lambda m: m.pop("config")}, "the config of .* is of another version .*'config'"),
        ({"change_manifest": put(format=None)}, "has format None, this version reads 2"),
        ({"change_manifest": put(files=["card.md"])}, "model.json was altered or is of another version"),
        ({"change_manifest": put(models=7)}, "model.json was altered or is of another version"),
        ({"change_manifest": lambda m: m["models"][0].pop("tuned")}, "another version .*KeyError: 'tuned'"),
        ({"change_manifest": lambda m: m["config"].update(backbone="vgg")}, "config.backbone = 'vgg': must be one of"),
        (
            {"change_manifest": lambda m: m["config"]["model"].update(d_joint=13)},
            "config.model.d_joint = 13: must be a",
        ),
        ({"change_manifest": lambda m: m["config"]["model"].update(d_joint="x")}, "is of another version"),
        (
            {"change_manifest": lambda m: m["config"]["model"].update(d_joint=32)},
            r"model_1shot.safetensors does not fit its config: 'episodes/variables/params/.*' is \[.*\], expected \[",
        ),
        ({"model_1shot": lambda a: a.pop(KERNEL)}, f"does not fit its config: '{KERNEL}' is absent, expected "),
        ({"model_1shot": lambda a: a.pop("fitted/mean")}, r"'fitted/mean' is absent, expected \["),
        (
            {"model_1shot": lambda a: a.update({"fitted/mean": a["fitted/mean"][:-1]})},
            r"'fitted/mean' is \[\d+\], expected \[",
        ),
        ({"model_1shot": lambda a: a.pop("maml/mean")}, "does not fit its config: maml: KeyError: 'mean'"),
        (
            {"model_1shot": lambda a: a.update({"laso/components": a["laso/components"][:, 1:]})},
            "model_1shot.safetensors does not fit its config: laso: ",
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
def test_a_folder_that_means_harm(exported, tmp_path, changes, complaint):
    out = shutil.copytree(exported[2], tmp_path / "out")
    rewritten(out)
    load(out)
    rewritten(out, **changes)
    with pytest.raises(InputError, match=complaint) as caught:
        load(out)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_folder_of_the_first_format(exported, tmp_path):
    """As earlier versions wrote it: other names of the arrays, theta of LCM alone, two more fields."""
    folder = shutil.copytree(exported[2], tmp_path / "old")
    arrays, _ = files.read_arrays(folder / "model_1shot.safetensors")
    old = {name.removeprefix("episodes/"): a for name, a in arrays.items() if name.startswith(("episodes/", "fitted/"))}
    files.write_arrays(folder / "model_1shot.safetensors", old)
    manifest = json.loads((folder / "model.json").read_text())
    manifest |= {"format": 1}
    manifest["config"]["ridge"] |= {"variants": False, "variants_threshold": 0.53}
    kept = ("n_shot", "calibration", "validation_macro_ap")
    manifest["models"] = [{name: entry[name] for name in kept} | {"theta": 0.57} for entry in manifest["models"]]
    manifest["files"]["model_1shot.safetensors"] = files.sha256(folder / "model_1shot.safetensors")
    manifest["sha256"] = saved.manifest_digest({k: v for k, v in manifest.items() if k != "sha256"})
    (folder / "model.json").write_text(json.dumps(manifest))
    model, before = load(folder), load(exported[2])
    assert model.trained[0].tuned == {"lcm_untuned": 0.57} and "lcm" not in model.trained[0].validation
    for name in ("ridge", "base", "lcm_untuned"):
        few, same = (
            fit(m, exported[1][:3], ["kelp", "sea", "pine tree"], method=name)
            for m in (model, before._replace(trained=(before.trained[0]._replace(tuned={"lcm_untuned": 0.57}),)))
        )
        expected = same.predict(exported[1]).probabilities
        np.testing.assert_allclose(few.predict(exported[1]).probabilities, expected, atol=1e-6)


def test_a_folder_of_a_later_format(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "FORMAT", 0)
    with pytest.raises(InputError, match="out has format 2, this version reads 0"):
        load(exported[2])
