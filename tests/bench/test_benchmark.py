"""The benchmark runs, and what it compares with computes the same."""

import functools
import importlib.util
import json
import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax import benchmark
from mlfsic_jax.bench import functions, made_up, measure, table
from mlfsic_jax.core import lcm
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.core.prototypes import Prototypes
from mlfsic_jax.run import inputs
from mlfsic_jax.system.errors import InputError

S, L, D, C = 6, 5, 8, 3
ROW = measure.Row("a", 2.0, "b", 1.5, 8.0, "mm", 10, {"x": 4.0, "y": 3.0}, {"ratio": 1.4, "pytorch": 3.5, "memory": 9})


# These compute more than the others; what is special to them is tested below, and by the rows of training.
SLOW = ("training_end_to_end", "growth")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in table.CASES]
)
def test_rows(name):
    rows = table.rows(name, True)
    assert rows
    for row in rows:
        assert 0 < row.seconds < 60 and row.ratio > 0 and row.work > 0 and row.kind in ("mm", "copy")
        assert row.reference and row.memory > 1e6 and not row.missed()  # no targets for tiny sizes
        assert all(ratio > 0 for ratio in row.pytorch.values())
    assert len({row.name for row in rows}) == len(rows)


def test_the_table_by_its_command():
    command = [sys.executable, "-m", "mlfsic_jax.benchmark", "--quick", "--rows=tuning, prototypes"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["measuring tuning", "measuring prototypes"]
    machine, columns, *lines = done.stdout.splitlines()
    assert "GFLOP/s" in machine and f"jax {jax.__version__}" in machine and columns.split()[0] == "seconds"
    assert [line.split(",")[0] for line in lines] == ["tuning on 3 x 16", "tuning on 6 x 16", "prototypes"]


def test_json(capsys):
    benchmark.main(["--quick", "--here", "--json", "--rows=prototypes"])
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # no NaN, no Infinity
    (row,) = found["rows"]
    assert set(found) == {"machine", "peaks", "rows", "missed"} and found["missed"] == []
    assert row["peak"] == pytest.approx(row["work"] / row["seconds"] / found["peaks"]["mm"])


def test_missed_targets_are_told():
    assert ROW.missed() == [
        "a: ratio 1.5, asked for at most 1.4",
        "a: pytorch 3, asked for at least 3.5",
        "a: memory 10, asked for at most 9",
    ]
    assert ROW._replace(ratio=1.4, pytorch={}, memory=9).missed() == []  # PyTorch is not installed


def test_unknown_rows_are_refused_before_anything_is_measured():
    with pytest.raises(InputError, match="no rows lcm, x: choose among sample_episode, features"):
        table.run(["lcm", "prototypes", "x"], quick=True, here=True, as_json=False)


def test_the_shortest_of_calls_in_turns(monkeypatch):
    clock, calls = iter([0, *(0, 3), *(3, 4), *(4, 9), *(9, 16), 16]), []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    times = measure.fastest({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.0)
    assert calls == ["a", "b"] * 3  # first to compile
    assert times == {"a": 3, "b": 1}


def test_growth_is_fitted(monkeypatch):
    def fastest(functions, budget):  # time = size^2
        return {size: size**2 if isinstance(size, int) else 1.0 for size in functions}

    monkeypatch.setattr(measure, "fastest", fastest)
    for row in table.rows("growth", True):
        assert row.exponent == pytest.approx(2)


def test_made_up_labels_have_cocos_numbers():
    n_images, n_labels, n_positives = made_up.COCO
    labels = made_up.label_matrix(*made_up.COCO)
    assert labels.shape == (n_images, n_labels) and abs(labels.sum() / n_positives - 1) < 0.02
    assert labels.sum(axis=0).min() >= 14


def test_nothing_is_compiled_after_the_first_step(caplog):
    features = np.random.default_rng(0).random((60, 2, 2, 16), np.float32).astype(np.float16)
    split = made_up.view(features.__getitem__, made_up.one_label_each(60, 3))
    model = BaseModel(d_joint=D, n_heads=2, d_dynamic=4, n_dynamic=4)
    step, _, _ = made_up.training_step(model, split)

    def compilations():
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            jax.block_until_ready(step())
        return sum("Compiling" in record.getMessage() for record in caplog.records)

    jax.clear_caches()  # other tests may have compiled the same step
    assert compilations() > 0
    assert [compilations() for _ in range(3)] == [0, 0, 0]


def episode():
    rng = np.random.default_rng(0)
    labels = np.arange(S)[:, None] % C == np.arange(C)
    return rng.normal(size=(S, L, D)).astype(np.float32), labels, rng.normal(size=(C, D)).astype(np.float32)


@pytest.fixture
def reference():
    pytest.importorskip("torch")
    from mlfsic_jax.bench import torch_reference

    return torch_reference


@pytest.mark.extras
@pytest.mark.parametrize("einsum", [False, True])
def test_pytorchs_lcm_is_ours(reference, einsum):
    u, labels, words = episode()
    got = reference.loss_change(
        *map(reference.as_tensor, (u, labels.astype(np.float32), words)), scale=20.0, steps=15, einsum=einsum
    )
    expected = lcm.loss_change(u, labels, words, scale=20.0, options=lcm.LCMOptions(steps=15))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)  # float32 over 15 steps


@pytest.mark.extras
def test_pytorchs_prototypes_are_ours(reference):
    u, labels, words = episode()
    module = Prototypes(n_heads=2, d_dynamic=4, n_dynamic=7)
    params = made_up.random_variables(module, u, labels, words)["params"]
    expected = jax.jit(module.apply)({"params": params}, u, labels, words)
    parameters = reference.as_parameters(params)
    got = reference.label_prototypes(module, parameters, *map(reference.as_tensor, (u, labels, words)))
    np.testing.assert_allclose(got, expected, atol=1e-5)  # float32


@pytest.mark.extras
def test_pytorchs_losses_are_ours(reference):
    rng = np.random.default_rng(1)
    model = BaseModel(d_joint=D, n_heads=2, d_dynamic=4, n_dynamic=4, dropout=0.0)
    support, query = (rng.random((n, 2, 2, 6), np.float32) for n in (S, 4))
    labels, query_labels = episode()[1], rng.random((4, C)) < 0.5
    arguments = (support, query, labels, query_labels, rng.normal(size=(C, 7)).astype(np.float32))
    params = made_up.random_variables(model, *arguments)["params"]
    expected = jax.jit(model.apply)({"params": params}, *arguments, rngs={"dropout": jax.random.key(0)})
    got = reference.losses(model, reference.as_parameters(params), *map(reference.as_tensor, arguments))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.extras
@pytest.mark.parametrize(
    ("what", "axes"), [("forward", (0, 2, 3, 1)), ("to its input", (0, 2, 3, 1)), ("to its kernel", (2, 3, 1, 0))]
)
def test_pytorchs_convolutions_are_ours(reference, what, axes):
    rng = np.random.default_rng(0)
    x, kernel, dy = (rng.random(shape, np.float32) for shape in ((2, 4, 5, 3), (3, 3, 3, 6), (2, 4, 5, 6)))
    got = reference.convolution(what, x, kernel, dy)["conv2d"]().permute(axes)
    np.testing.assert_allclose(got, functions.CONVOLUTIONS[what](x, kernel, dy), rtol=1e-5)  # float32


@pytest.mark.extras
@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs OpenVINO")
def test_openvinos_features_are_ours():
    from mlfsic_jax.bench import openvino_reference

    backbone, variables = made_up.photo_backbone("mobilenet_v2"), made_up.backbone_variables("mobilenet_v2", 64)
    photos = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8)
    got = openvino_reference.features(backbone, variables, photos)()
    np.testing.assert_allclose(got, inputs.features_of(backbone, variables, photos), atol=1e-4)  # of 0 to 6, float32


def test_an_episode_is_the_library_put_together():
    support, labels, word_vectors, queries = made_up.growth_case(S, C, 4, 6)
    model = BaseModel(d_joint=D, n_heads=2, d_dynamic=4, n_dynamic=4)
    variables = made_up.random_variables(model, support, support, labels, labels, word_vectors)
    apply = jax.jit(model.apply, static_argnames="method")
    score = jax.jit(functools.partial(model.apply, method=functions.one_episode))
    got = score(variables, support, labels, word_vectors, queries)
    assert got.shape == (64, C) and (jnp.abs(got) <= model.scale * 1.001).all()
    joint = variables["params"]["joint"]
    words, projection = word_vectors @ joint["a_text"]["kernel"], joint["a_visual"]["kernel"]
    keep = jax.jit(lcm.lcm_select)(support, labels, words, projection=projection).keep.reshape(S, -1)
    regions = apply(variables, support, method="regions")
    prototypes = apply(variables, regions, labels, words, keep, method="prototypes")
    q = np.asarray(apply(variables, queries, method="regions"))[:, 0]
    cosines = q @ prototypes.T / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(prototypes, axis=1)
    np.testing.assert_allclose(got, model.scale * cosines, atol=1e-3)
