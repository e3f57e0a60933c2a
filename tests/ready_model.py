"""A small network and a small encoder in place of the published files of the model out of the box."""

import dataclasses
import string

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlfsic_jax import backbones
from mlfsic_jax.backbones import weights
from mlfsic_jax.data import class_words
from mlfsic_jax.run import ready
from tests.data import test_minilm
from tests.test_whole_program import SHALLOW, random_variables

BACKBONE = "efficientnet_lite0"
SIZE, make = SHALLOW[BACKBONE]


def write_files(folder):
    """Weights of a small Lite0 that has a classifier, and a small MiniLM."""
    weights.save_weights(folder / "lite.safetensors", random_variables(make(), SIZE), make())
    state, rng = load_file(folder / "lite.safetensors"), np.random.default_rng(1)
    state |= {"classifier.weight": rng.normal(size=(1000, 32)), "classifier.bias": rng.normal(size=1000)}
    save_file({name: a.astype(np.float32) for name, a in state.items()}, folder / "lite.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_minilm, "HIDDEN", 384)  # as the vectors of the classes
        signs = string.ascii_lowercase + string.digits + "<>=()|#"  # so that it reads any English name
        patch.setattr(test_minilm, "PIECES", (*test_minilm.PIECES, *signs, *(f"##{sign}" for sign in signs)))
        test_minilm.write_model(folder / "minilm", test_minilm.tensors_of_bert())


def stand_in(patch, folder):
    """Has them taken for the published ones; returns the means over noise, of features [32] and logits [1000]."""
    spec = backbones.BACKBONES[BACKBONE]
    file = dataclasses.replace(spec.files[0], url="https://example.org/lite.safetensors")
    changed = dataclasses.replace(spec, create=lambda axis_name=None: make(), files=(file,), image_size=SIZE)
    patch.setitem(backbones.BACKBONES, BACKBONE, changed)
    patch.setitem(ready.QUALITIES, "standard", (BACKBONE, SIZE))
    noise = np.random.default_rng(2).normal(size=(8, SIZE, SIZE, 3)).astype(np.float32)
    variables = weights.load_weights(folder / "lite.safetensors", make(), SIZE)
    local = np.asarray(jax.jit(make().apply)(variables, noise)).reshape(8, -1, 32)
    w, b = weights.load_head(folder / "lite.safetensors", BACKBONE)
    means = local.mean(axis=(0, 1)), (local @ w.T + b).max(axis=1).mean(axis=0)
    patch.setattr(class_words, "backbone_means", lambda *_: means)
    return means
