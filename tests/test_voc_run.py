"""The whole program on a made-up VOCdevkit: frozen backbone with cached features, and trained end to end."""

import json

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from configs import voc
from mlfsic_jax import train
from mlfsic_jax.backbones import create
from mlfsic_jax.data.splits import label_split
from mlfsic_jax.data.voc import DISPLAY_NAMES, LABEL_NAMES

PER_LABEL = 8
TINY = {
    "shots": (1,),
    "backbone": "conv4",
    "data.image_size": 32,
    "model.d_joint": 16,
    "model.n_heads": 2,
    "model.d_dynamic": 4,
    "model.n_dynamic": 4,
    "train.epochs": 2,
    "train.warmup_epochs": 1,
    "train.episodes_per_epoch": 2,
    "train.n_query": 1,
    "train.validation_episodes": 2,
    "eval.episodes": 4,
    "eval.sweep_episodes": 4,
    "eval.n_query": 2,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A devkit of noise photos, one of them cut short, word vectors in GloVe's format, Conv-4 weights."""
    folder = tmp_path_factory.mktemp("voc")
    rng = np.random.default_rng(0)
    year = folder / "VOCdevkit" / "VOC2007"
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (year / part).mkdir(parents=True)
    names = []
    for split in label_split("voc").values():
        for label in split:
            for _ in range(PER_LABEL):
                name = f"{len(names):06}"
                noise = rng.integers(0, 255, (40, 50, 3), np.uint8)
                Image.fromarray(noise).save(year / "JPEGImages" / f"{name}.jpg")
                thing = f"<object><name>{label}</name><difficult>0</difficult></object>"
                (year / "Annotations" / f"{name}.xml").write_text(f"<annotation>{thing}</annotation>")
                names.append(name)
    cut = year / "JPEGImages" / f"{names[3]}.jpg"
    cut.write_bytes(cut.read_bytes()[:200])
    (year / "ImageSets" / "Main" / "train.txt").write_text("\n".join(names[:100]))
    (year / "ImageSets" / "Main" / "val.txt").write_text("\n".join(names[100:]))
    words = sorted({w for label in LABEL_NAMES for w in DISPLAY_NAMES.get(label, label).split()})
    lines = [" ".join([w, *(f"{x:.4f}" for x in rng.normal(size=10))]) for w in words]
    (folder / "glove.txt").write_text("\n".join(lines) + "\n")
    network = create("conv4")
    variables = jax.jit(network.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    leaf = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    state = {}
    for (_, *modules, name), array in traverse_util.flatten_dict(variables).items():
        array = np.asarray(array)
        key = ".".join(modules).replace("_", ".") + "." + leaf[name]
        state[key] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
    np.savez(folder / "conv4.npz", **state)
    return folder


@pytest.mark.parametrize("variant", ["cpu", "finetune"])
def test_from_photos_to_results(inputs, variant, capsys):
    config = voc.get_config(variant)
    config.update_from_flattened_dict(TINY)
    config.data.source = str(inputs / "VOCdevkit")
    config.labels.vectors = str(inputs / "glove.txt")
    config.backbone_weights = str(inputs / "conv4.npz")
    config.cache_dir = str(inputs / "cache")
    train.train_and_evaluate(config, inputs / variant)
    (entry,) = json.loads((inputs / variant / "results.json").read_text())
    assert entry["dataset"] == "voc"
    assert all(0 < values["macro_ap"]["mean"] < 1 for values in entry["methods"].values())
    out = capsys.readouterr().out
    assert "160 images, 20 labels" in out and "tv monitor" in out
    assert "skipped photo 2007/000003" in out and "1 of 160 photos could not be read" in out
    (values,) = inputs.glob(f"cache/voc-{'photos' if variant == 'finetune' else 'conv4'}-32-*/values.npy")
    array = np.load(values, mmap_mode="r")
    assert array.dtype == ("uint8" if variant == "finetune" else "float16") and len(array) == 160
    # Published weights are where training starts, and what a frozen backbone computes with.
    assert np.abs(array[0].astype(np.float32)).sum() > 0
