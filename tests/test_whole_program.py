"""Every dataset, backbone and word embedding through the whole program: prepare, cache, train a step, evaluate.

The datasets are made up in their official layouts, the backbones are narrow and shallow with random weights under their
published key names, the word vectors are random under the embedding's usual file name.
"""

import dataclasses
import functools
import importlib
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from mlfsic_jax import backbones, data
from mlfsic_jax.backbones import weights as pretrained
from mlfsic_jax.data import prepare
from mlfsic_jax.data import words as label_embeddings
from mlfsic_jax.data.splits import label_split
from mlfsic_jax.run import inputs, pretrain
from mlfsic_jax.run.experiment import train_and_evaluate
from mlfsic_jax.system.errors import InputError
from tests import made_up, tiny
from tests.made_up import save_word_vectors

TINY = tiny.TINY | {
    "ridge.n_components": 4,
    "eval.episodes": 3,
    "eval.sweep_episodes": 2,
    "eval.n_query": 1,
    "pretrain.epochs": 2,
    "pretrain.batch_size": 16,
}
# Most maps are 2 x 2 x 32, so that the programs that follow are compiled once for all runs.
_VIT = {"n_layers": 1, "n_heads": 2, "width": 32}
_MOBILENET = ((1, 8, 1, 1), (2, 8, 1, 2), (2, 8, 1, 2), (2, 8, 1, 2))
_LITE = tuple((*row, 3) for row in _MOBILENET)  # kernels of 3 x 3
_lite0 = functools.partial(backbones.EfficientNetLite, stages=_LITE, last_features=32)
_resnet50 = functools.partial(backbones.ResNet, stage_sizes=(1, 1, 1), width=2)
_vit_b_16 = functools.partial(backbones.VisionTransformer, patch=16, image_size=32, **_VIT)
SHALLOW = {
    "conv4": (32, functools.partial(backbones.Conv4, width=32)),
    "resnet50": (32, _resnet50),
    "resnet101": (32, functools.partial(backbones.ResNet, stage_sizes=(1, 2, 1), width=2)),
    "mobilenet_v2": (32, functools.partial(backbones.MobileNetV2, stages=_MOBILENET, last_features=32)),
    "efficientnet_lite0": (32, _lite0),
    "efficientnet_lite0_lite2": (32, lambda: backbones.Joined((_lite0(), _lite0()))),
    "inception_v3": (107, functools.partial(backbones.InceptionV3, width=1 / 32)),
    "vit_b_16": (32, _vit_b_16),
    "vit_b_32": (64, functools.partial(backbones.VisionTransformer, patch=32, image_size=64, **_VIT)),
    "clip_resnet50": (32, functools.partial(backbones.ClipResNet, stage_sizes=(1, 1, 1), width=2)),
    "clip_vit_b_32": (64, functools.partial(backbones.ClipVisionTransformer, patch=32, image_size=64, **_VIT)),
    "clip_vit_b_32_tokens": (
        32,
        functools.partial(backbones.ClipVisionTransformer, patch=32, image_size=32, all_tokens=True, **_VIT),
    ),
    "resnet50_vit_b_16": (32, lambda: backbones.Joined((_resnet50(), _vit_b_16()), pooled=True)),
}
FOLDER = {
    kind: functools.partial(made_up.make_folder, kind=kind, per_label=10)
    for kind in ("labels", "columns", "instances", "folders")
}
RUNS = [
    ("voc", "cpu", made_up.make_voc, "resnet101", "glove"),
    ("voc", "finetune", made_up.make_voc, "conv4", "glove50"),
    ("coco", "", functools.partial(made_up.make_coco, per_label=4), "clip_resnet50", "clip"),
    ("coco", "laso", functools.partial(made_up.make_coco, per_label=4), "mobilenet_v2", "mirrorbert"),
    ("nus_wide", "", made_up.make_nus_wide, "vit_b_16", "fasttext"),
    ("imaterialist", "", made_up.make_imaterialist, "vit_b_32", "bert_avg"),
    ("folder", "", FOLDER["labels"], "clip_vit_b_32", "word2vec"),
    ("folder", "", FOLDER["columns"], "resnet50", "glove100"),
    ("folder", "", FOLDER["instances"], "efficientnet_lite0", "minilm"),
    ("folder", "", FOLDER["folders"], "resnet50_vit_b_16", "bert_biencoder"),
    ("folder", "", FOLDER["folders"], "inception_v3", "bert_concn"),
    ("folder", "", FOLDER["folders"], "clip_vit_b_32_tokens", "mirrorwic"),
    ("folder", "", FOLDER["labels"], "conv4", "glove200"),
    ("folder", "", FOLDER["labels"], "efficientnet_lite0_lite2", "glove"),
]


def random_variables(network, size):
    """Without compiling the initialiser: every array of its usual size and spread."""
    rng = np.random.default_rng(0)
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)

    def draw(x):
        noise = rng.normal(size=x.shape)
        return np.exp(noise / 10) if x.ndim == 1 else noise / np.sqrt(np.prod(x.shape[:-1]))

    return jax.tree.map(lambda x: draw(x).astype(np.float32), jax.eval_shape(network.init, jax.random.key(0), image))


@pytest.fixture
def prepare_run(tmp_path, monkeypatch):
    """Makes up everything that a run needs under ``tmp_path``, and gives its config."""

    def prepare_run(config_name, variant, make, backbone, embedding):
        config = importlib.import_module(f"configs.{config_name}").get_config(variant)
        config.update_from_flattened_dict(TINY)
        config.backbone, config.labels.embedding = backbone, embedding
        config.data.source = str(tmp_path / "source")
        config.cache_dir, config.data_dir = str(tmp_path / "cache"), str(tmp_path / "data")
        names = make(tmp_path / "source")
        if config_name != "folder":  # a few labels of each split are enough here
            labels = label_split(config_name)
            split = {part: labels[part][:n] for part, n in (("train", 4), ("validation", 2), ("novel", 2))}
            (tmp_path / "split.json").write_text(json.dumps(split))
            config.data.split = str(tmp_path / "split.json")
        (tmp_path / "data").mkdir()
        path = label_embeddings.default_path(embedding, config.data.name, config.data_dir)
        save_word_vectors(path, [*names, "dining table", "potted plant", "tv monitor"])

        size, make_network = SHALLOW[backbone]
        spec = dataclasses.replace(backbones.BACKBONES[backbone], create=lambda axis_name=None: make_network())
        monkeypatch.setitem(backbones.BACKBONES, backbone, spec)
        config.data.image_size = size
        network = make_network()
        parts = getattr(network, "parts", (network,))
        files = [Path(file.url).name for file in spec.files] or ["conv4.safetensors"]
        for part, name in zip(parts, files, strict=True):
            variables = random_variables(part, size)
            path = tmp_path / "data" / Path(name).with_suffix(".safetensors")
            pretrained.save_weights(path, variables, part)
        # The published files are .pth; tests/backbones/test_weights.py reads such files.
        names = [str(tmp_path / "data" / Path(name).with_suffix(".safetensors")) for name in files]
        config.backbone_weights = ",".join(names)
        return config

    return prepare_run


def test_every_name_has_a_run():
    wider = {f"efficientnet_lite{i}" for i in (1, 2, 3, 4)}  # as lite0 but for two numbers and the size
    assert {backbone for *_, backbone, _ in RUNS} == set(backbones.BACKBONES) - wider
    assert {embedding for *_, embedding in RUNS} == set(label_embeddings.EMBEDDINGS)
    assert {name for name, *_ in RUNS} == set(data.PHOTO_DATASETS)


# Inception has so many layers of different shapes that compiling it takes a minute.
@pytest.mark.parametrize(
    ("name", "variant", "make", "backbone", "embedding"),
    [
        pytest.param(
            *run, marks=[pytest.mark.slow] * ("inception_v3" in run) + [pytest.mark.extras] * (run[-1] == "word2vec")
        )
        for run in RUNS
    ],
)
def test_from_photos_to_results(prepare_run, tmp_path, name, variant, make, backbone, embedding, capsys):
    if embedding == "word2vec":
        pytest.importorskip("gensim")
    config = prepare_run(name, variant, make, backbone, embedding)
    flags = [f"--dataset={name}", f"--source={config.data.source}", f"--prepared_dir={config.cache_dir}/datasets"]
    prepare.main([*flags, f"--policy={config.data.policy}", f"--split={config.data.split}"])
    card = capsys.readouterr().out
    assert "Images in which a label is positive" in card and "prepared in " in card

    train_and_evaluate(config, tmp_path / "run")
    captured = capsys.readouterr()
    assert card.split("prepared in")[0] in captured.out and "preparing" not in captured.err
    (entry,) = json.loads((tmp_path / "run" / "results.json").read_text())
    assert entry["dataset"] == name and entry["episodes"] == 3
    assert all(0 < values["macro_ap"]["mean"] <= 1 for values in entry["methods"].values())
    trained = variant == "finetune"
    (values,) = tmp_path.glob(f"cache/{name}-{'photos' if trained else backbone}-{config.data.image_size}-*/values.npy")
    array = np.load(values, mmap_mode="r")
    assert array.dtype == ("uint8" if trained else "float16")
    assert np.abs(array[0].astype(np.float32)).sum() > 0


def test_a_pretrained_backbone_is_where_the_episodes_start(prepare_run, tmp_path):
    config = prepare_run("folder", "", FOLDER["labels"], "resnet50", "glove")
    path = pretrain.pretrain(config, tmp_path / "run")
    first = json.loads((tmp_path / "run/pretrain/metrics.jsonl").read_text().splitlines()[0])
    assert first["stage"] == "pretrain" and 0 < first["held_out_macro_ap"] <= 1
    before, after = (pretrained.read_state_dict(p) for p in (config.backbone_weights, path))
    moved = [key for key in before if not np.allclose(before[key], after[key])]
    assert set(before) == set(after) and {"conv1.weight", "bn1.running_mean"} <= set(moved)
    config.backbone_weights = str(path)
    train_and_evaluate(config, tmp_path / "run")
    assert json.loads((tmp_path / "run/results.json").read_text())[0]["methods"]["base"]

    # Run again it has nothing left to do; with other settings it is refused.
    modified = path.stat().st_mtime_ns
    config.backbone_weights = str(tmp_path / "data/resnet50-0676ba61.safetensors")
    assert pretrained.read_state_dict(pretrain.pretrain(config, tmp_path / "run")).keys() == after.keys()
    assert path.stat().st_mtime_ns > modified
    np.testing.assert_array_equal(pretrained.read_state_dict(path)["conv1.weight"], after["conv1.weight"])
    config.pretrain.epochs = 3
    with pytest.raises(InputError, match=r"other settings, pretrain.epochs \(there 2, now 3\)"):
        pretrain.pretrain(config, tmp_path / "run")


def test_pretraining_stops_at_a_signal_and_goes_on_to_the_same_bytes(prepare_run, tmp_path, monkeypatch):
    config = prepare_run("folder", "", FOLDER["labels"], "resnet50", "glove")
    config.pretrain.batch_size = 8  # several steps an epoch
    undisturbed = pretrain.pretrain(config, tmp_path / "run").read_bytes()
    asked, steps = tiny.acting(pretrain.pretrain_step, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(pretrain, "pretrain_step", asked)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(config, tmp_path / "stopped")
    assert [path.name for path in (tmp_path / "stopped/pretrain/checkpoints").iterdir()] == ["2"] and len(steps) == 2
    assert pretrain.pretrain(config, tmp_path / "stopped").read_bytes() == undisturbed
    log = [(tmp_path / run / "pretrain/metrics.jsonl").read_text() for run in ("run", "stopped")]
    assert log[0] == log[1]


def test_a_photo_that_is_cut_short_is_left_out(prepare_run, tmp_path, capsys):
    config = prepare_run("voc", "cpu", made_up.make_voc, "conv4", "glove")
    config.data.split = ""  # the published one, in which every image has a place
    cut = tmp_path / "source/VOC2007/JPEGImages/000003.jpg"
    cut.write_bytes(cut.read_bytes()[:200])
    inputs.load(config)
    out = capsys.readouterr().out
    assert "160 images, 20 labels" in out and "tv monitor" in out
    assert "skipped photo 2007/000003" in out and "1 of 160 photos could not be read" in out
