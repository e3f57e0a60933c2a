"""LCM against a plain NumPy loop with the derivative written by hand, and the properties that must always hold."""

import functools
import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mlfsic_jax import LCMSelection, lcm_select
from mlfsic_jax.core import lcm
from mlfsic_jax.core.lcm import SELECTIONS, LCMOptions, loss_change, select_positions

S, H, W, N, D, C = 5, 3, 4, 10, 8, 6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def case(seed=0, d=N):
    """Non-negative features as after a ReLU, a few labels an image, any words; float64 NumPy."""
    rng = np.random.default_rng(seed)
    features = np.maximum(rng.normal(size=(S, H, W, N)), 0) * rng.uniform(0.5, 3, (S, H, W, 1))
    labels = (rng.random((S, C)) < 0.3).astype(np.float64)
    return features, labels, rng.normal(size=(C, d)), rng.normal(size=(N, d))


def reference(features, labels, words, *, scale=10.0, steps=20, step_size=1.0, momentum=0.95):
    """Raw scores and importance, float64 [S, h, w], features in the joint space: METHOD section 4.2 image by image."""
    scores, importances = [], []
    for image, y in zip(features, labels, strict=True):
        u = image.reshape(-1, image.shape[-1])
        n_positions = len(u)
        rho, f = np.ones(n_positions), np.zeros(n_positions)
        for i in range(1, steps + 1):
            v = sum(rho[j] * u[j] for j in range(n_positions)) / n_positions
            v_length = np.sqrt(v @ v)
            dloss_dv = np.zeros_like(v)
            for c, word in enumerate(words):
                w_unit = word / np.sqrt(word @ word)
                cos = w_unit @ v / v_length
                dcos_dv = (w_unit - cos * v / v_length) / v_length
                dloss_dv += (sigmoid(scale * cos) - y[c]) * scale * dcos_dv
            gradient = np.array([dloss_dv @ u[j] / n_positions for j in range(n_positions)])
            alpha = min(1 - 1 / (i + 1), momentum)
            f = alpha * f + (1 - alpha) * abs(rho * gradient)
            rho = rho - step_size * gradient
            rho = (rho - rho.min()) / (rho.max() - rho.min())
            rho[rho == 0] = rho[rho > 0].min()
        scores.append(f.reshape(image.shape[:2]))
        importances.append(rho.reshape(image.shape[:2]))
    return np.stack(scores), np.stack(importances)


def reference_keep(scores, threshold, scaling):
    """Which positions are kept, and how far the closest of an image's scores is from the threshold."""
    keep, margin = np.zeros(scores.shape, bool), np.zeros(scores.shape)
    for k, f in enumerate(scores):
        p = sigmoid((f - f.min()) / (f.max() - f.min()) if scaling == "minmax" else f)
        keep[k], margin[k] = p >= threshold, abs(p - threshold)
        if not keep[k].any():
            keep[k].flat[f.argmax()] = True
    return keep, margin


@pytest.fixture(scope="module")
def selected():
    features, labels, words, _ = case()
    return lcm_select(*(jnp.asarray(x, jnp.float32) for x in (features, labels, words)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 20.0, "steps": 5, "step_size": 1e-2, "threshold": 0.6},
        {"momentum": np.float32(0.4), "steps": np.int64(30), "threshold": np.float64(0.55)},
        {"score_scaling": "none", "threshold": 0.505},
        {"score_scaling": "none", "threshold": 0.65},
    ],
)
def test_is_the_numpy_loop_in_float32(options):
    features, labels, words, projection = case(1, D)
    got = jax.jit(functools.partial(lcm_select, **options))(
        *(jnp.asarray(x, jnp.float32) for x in (features, labels, words)),
        projection=jnp.asarray(projection, jnp.float32),
    )
    assert isinstance(got, LCMSelection)
    assert [(x.shape, x.dtype) for x in got] == [((S, H, W), t) for t in (jnp.bool, jnp.float32, jnp.float32)]
    loop = {k: v for k, v in options.items() if k not in ("threshold", "score_scaling")}
    score, importance = reference(features @ projection, labels, words, **loop)
    # What METHOD allows between float32 and float64 over the 20 steps.
    np.testing.assert_allclose(got.score, score, atol=1e-4)
    np.testing.assert_allclose(got.importance, importance, atol=2e-3)
    keep, margin = reference_keep(score, options.get("threshold", 0.53), options.get("score_scaling", "minmax"))
    clear = margin > 1e-3  # a score error of 1e-4 on a range of some 0.1 moves the sigmoid by up to 2.5e-4
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(got.keep)[clear], keep[clear])


def test_is_the_numpy_loop_in_float64():
    features, labels, words, projection = case(2, D)
    with jax.enable_x64(True):
        got = lcm_select(features, labels, words, projection=projection)
        assert got.score.dtype == got.importance.dtype == jnp.float64
        score, importance, keep = map(np.asarray, (got.score, got.importance, got.keep))
    expected_score, expected_importance = reference(features @ projection, labels, words)
    # Rounding of 1e-16, amplified by some 20 min-maxes.
    np.testing.assert_allclose(score, expected_score, atol=1e-10)
    np.testing.assert_allclose(importance, expected_importance, atol=1e-10)
    np.testing.assert_array_equal(keep, reference_keep(expected_score, 0.53, "minmax")[0])


def cm_loss(u, y, words, rho, scale):
    """The CM loss of one image whose positions weigh ``rho`` (eqs 3-5)."""
    v, total = rho @ u, 0.0
    for word, y_c in zip(words, y, strict=True):
        p = sigmoid(scale * (word @ v) / np.sqrt((word @ word) * (v @ v)))
        total -= np.log(p) if y_c else np.log(1 - p)
    return total


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_selection_is_the_loop_over_positions(selection):
    features, labels, words, _ = case(7)
    expected_momentum, rho = (x.reshape(S, -1) for x in reference(features, labels, words, scale=9.0, steps=18))
    expected = np.zeros((S, H * W))
    for s, j in np.ndindex(S, H * W):
        u, y = features[s].reshape(H * W, N), labels[s]
        without, more, less = rho[s].copy(), rho[s].copy(), rho[s].copy()
        without[j], more[j], less[j] = 0, rho[s, j] + 1e-5, rho[s, j] - 1e-5
        here, gone, above, below = (cm_loss(u, y, words, r, 9.0) for r in (rho[s], without, more, less))
        values = {"exact": here - gone, "taylor": rho[s, j] * (above - below) / 2e-5, "importance": rho[s, j]}
        values |= {"low_importance": 1 - rho[s, j], "momentum": expected_momentum[s, j]}
        expected[s, j] = abs(values[selection])
    arguments, options = (features.reshape(S, H * W, N), labels, words), LCMOptions(steps=18, selection=selection)
    with jax.enable_x64(True):
        score, importance = loss_change(*map(jnp.asarray, arguments), scale=9.0, options=options)
        score, importance = np.asarray(score), np.asarray(importance)
    np.testing.assert_allclose(importance, rho, atol=1e-9)
    # float64 throughout; the central difference itself is right to 1e-10 times the third derivative.
    np.testing.assert_allclose(score, expected, atol=1e-7 if selection == "taylor" else 1e-9)
    in_float32 = (jnp.asarray(x, jnp.float32) for x in arguments)
    single, _ = loss_change(*in_float32, scale=9.0, options=options)
    # What METHOD allows; a removal multiplies the error of rho, 2e-3, by a change of the loss of up to 1.
    np.testing.assert_allclose(single, expected, atol=1e-4 if selection == "momentum" else 3e-3)


def test_a_selection_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="selection = 'rho': must be one of momentum, taylor"):
        LCMOptions(selection="rho")


@pytest.mark.parametrize(("selection", "largest"), [("importance", True), ("low_importance", False)])
def test_theta_on_importance_itself(selection, largest):
    features, labels, words, _ = (jnp.asarray(x, jnp.float32) for x in case(8))
    score, rho = loss_change(
        features.reshape(S, H * W, N), labels, words, scale=10.0, options=LCMOptions(selection=selection)
    )
    keep = select_positions(score, 0.6, score_scaling="none")
    limit = np.log(0.6 / 0.4)
    np.testing.assert_array_equal(keep, rho >= limit if largest else rho <= 1 - limit)
    assert 0.1 < keep.mean() < 0.9 and keep.any(axis=1).all()


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("kind", ["constant", "zero", "one position"])
def test_every_selection_keeps_everything_where_nothing_differs(selection, kind):
    features, labels, words, _ = case()
    if kind == "one position":
        features = features[:, :1, :1]
    features = np.broadcast_to(features[:, :1, :1] * (kind != "zero"), features.shape).reshape(S, -1, N)
    arguments = (jnp.asarray(x, jnp.float32) for x in (features, labels, words))
    score, _ = loss_change(*arguments, scale=10.0, options=LCMOptions(selection=selection))
    assert jnp.isfinite(score).all() and (score >= 0).all()
    assert select_positions(score, 0.65).all()


def test_one_step_by_hand():
    # Two positions (1, 0) and (0, 1), one label with the word (1, 0). Mean (1/2, 1/2), cosine 1/sqrt(2),
    # d cos / d rho = +-1 / (2 sqrt(2)), so g = scale (1 - sigmoid(scale / sqrt(2))) / (2 sqrt(2)) at both.
    features = jnp.array([[[[1.0, 0.0], [0.0, 1.0]]]])
    got = lcm_select(features, jnp.array([[1]]), jnp.array([[1.0, 0.0]]), scale=2.0, steps=1)
    g = 2 * (1 - sigmoid(2 / np.sqrt(2))) / (2 * np.sqrt(2))
    np.testing.assert_allclose(got.score, np.full((1, 1, 2), g / 2), rtol=1e-5)  # alpha_1 = 1/2; float32
    # Descent raises the first and lowers the second: 1 and 0, and that zero takes the lowest non-zero value, 1.
    np.testing.assert_array_equal(got.importance, np.ones((1, 1, 2)))
    assert got.keep.all()
    # A third position (0, 3) at once: rho is then 1, something, and the zero that takes its value.
    features = jnp.array([[[[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]]]])
    rho = np.asarray(lcm_select(features, jnp.array([[1]]), jnp.array([[1.0, 0.0]]), steps=1).importance).ravel()
    assert rho[0] == 1 and rho[1] == rho[2] and 0 < rho[1] < 1
    weak = lcm_select(features, jnp.array([[1]]), jnp.array([[1.0, 0.0]]), steps=1, momentum=0.2)
    strong = lcm_select(features, jnp.array([[1]]), jnp.array([[1.0, 0.0]]), steps=1)
    np.testing.assert_allclose(weak.score, 1.6 * strong.score, rtol=1e-6)  # 1 - 0.2 against 1 - 1/2


def test_jit_vmap_and_single_images_agree(selected):
    features, labels, words, _ = (jnp.asarray(x, jnp.float32) for x in case())
    jitted = jax.jit(lcm_select)(features, labels, words)
    mapped = jax.vmap(lambda f, y: lcm_select(f[None], y[None], words))(features, labels)
    mapped = jax.tree.map(lambda x: x[:, 0], mapped)
    singly = [lcm_select(features[i : i + 1], labels[i : i + 1], words) for i in range(S)]
    singly = jax.tree.map(lambda *x: jnp.concatenate(x), *singly)
    for other in (jitted, mapped, singly):
        np.testing.assert_allclose(other.score, selected.score, atol=1e-5)
        np.testing.assert_allclose(other.importance, selected.importance, atol=2e-3)  # float32 over 20 steps
        np.testing.assert_array_equal(other.keep, selected.keep)


def test_images_are_independent(selected):
    features, labels, words, _ = case()
    features[1:] = 5 * np.roll(features[1:], 1, axis=0)
    features[2], labels[1:] = 0, 1 - labels[1:]
    got = lcm_select(*(jnp.asarray(x, jnp.float32) for x in (features, labels, words)))
    np.testing.assert_allclose(got.score[0], selected.score[0], atol=1e-6)  # the same program on the same numbers
    np.testing.assert_array_equal(got.keep[0], selected.keep[0])
    assert (got.keep[1:] != selected.keep[1:]).any()


def test_images_that_do_not_fit_the_cache_at_once(monkeypatch):
    monkeypatch.setattr(lcm, "_CACHE_BYTES", 2 * 4 * H * W * (H * W + C))  # two of them: a scan over 2 + 2 and one more
    features, labels, words, projection = case(6, D)
    # A number of steps that no other test has, so that nothing compiled before is used.
    got = lcm_select(*(jnp.asarray(x, jnp.float32) for x in (features @ projection, labels, words)), steps=17)
    score, importance = reference(features @ projection, labels, words, steps=17)
    np.testing.assert_allclose(got.score, score, atol=1e-4)
    np.testing.assert_allclose(got.importance, importance, atol=2e-3)


def test_compiled_once(caplog):
    def compilations(seed, **options):
        features, labels, words, _ = (x.astype(np.float32) for x in case(seed))
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            lcm_select(features, labels, words, steps=16, **options)
        return sum("Compiling" in record.getMessage() for record in caplog.records)

    assert compilations(0) > 0
    assert [compilations(1), compilations(2, scale=20.0, step_size=0.1, momentum=0.5)] == [0, 0]


def test_positions_have_no_order(selected):
    features, labels, words, _ = case()
    order = np.random.default_rng(0).permutation(H * W)
    shuffled = features.reshape(S, H * W, N)[:, order].reshape(S, H, W, N)
    got = lcm_select(*(jnp.asarray(x, jnp.float32) for x in (shuffled, labels, words)))
    np.testing.assert_allclose(got.score.reshape(S, -1), selected.score.reshape(S, -1)[:, order], atol=1e-4)


def test_inputs_of_other_types(selected):
    features, labels, words, _ = case()
    got = lcm_select(features.astype(np.float32), labels.astype(bool), words.astype(np.float32))
    np.testing.assert_array_equal(got.keep, selected.keep)
    np.testing.assert_allclose(got.score, selected.score, atol=1e-6)
    half = lcm_select(jnp.asarray(features, jnp.bfloat16), labels.astype(int), jnp.asarray(words, jnp.bfloat16))
    assert half.score.dtype == half.importance.dtype == jnp.float32
    np.testing.assert_allclose(half.score, selected.score, atol=0.03)  # rounded inputs, 3 digits, float32 inside


def test_projection_is_projecting_first():
    features, labels, words, projection = (jnp.asarray(x, jnp.float32) for x in case(3, D))
    inside = lcm_select(features, labels, words, projection=projection)
    before = lcm_select(features @ projection, labels, words)
    np.testing.assert_allclose(inside.score, before.score, atol=1e-5)
    np.testing.assert_allclose(inside.importance, before.importance, atol=2e-3)
    np.testing.assert_array_equal(inside.keep, before.keep)


@pytest.mark.parametrize(("features_by", "words_by"), [(1e-30, 1.0), (1e30, 1.0), (1.0, 1e-6), (100.0, 1e6)])
def test_lengths_do_not_matter(selected, features_by, words_by):
    features, labels, words, _ = case()
    got = lcm_select(
        jnp.asarray(features_by * features, jnp.float32), labels, jnp.asarray(words_by * words, jnp.float32)
    )
    np.testing.assert_allclose(got.score, selected.score, atol=1e-4)  # other roundings, over 20 steps
    np.testing.assert_array_equal(got.keep, selected.keep)


def odd_cases():
    features, labels, words, _ = (x.astype(np.float32) for x in case())
    constant = np.broadcast_to(features[:, :1, :1], features.shape).copy()
    yield "constant maps", constant, labels, words
    yield "zero features", 0 * features, labels, words
    yield "one zero image", features * (np.arange(S) > 0)[:, None, None, None], labels, words
    yield "no labels", features, 0 * labels, words
    yield "all labels", features, 0 * labels + 1, words
    yield "one label", features, labels[:, :1], words[:1]
    yield "one position", features[:, :1, :1], labels, words
    yield "two positions", features[:, :1, :2], labels, words
    yield "zero words", features, labels, 0 * words
    yield "huge", 1e30 * features, labels, words
    yield "small", 1e-30 * features, labels, words
    yield "one large channel", features + 1e4 * np.eye(N, dtype=np.float32)[0], labels, words
    yield "opposite features", features * np.float32([1, -1, 1, -1])[:, None], labels, words


@pytest.mark.parametrize(("features", "labels", "words"), [pytest.param(*x[1:], id=x[0]) for x in odd_cases()])
@pytest.mark.parametrize("score_scaling", ["minmax", "none"])
def test_odd_inputs_stay_finite(features, labels, words, score_scaling):
    select = jax.jit(functools.partial(lcm_select, score_scaling=score_scaling))
    got = select(features, labels, words)
    assert jnp.isfinite(got.score).all() and (got.score >= 0).all()
    assert jnp.isfinite(got.importance).all() and (got.importance > 0).all() and (got.importance <= 1).all()
    assert got.keep.any(axis=(1, 2)).all()


@pytest.mark.parametrize("step_size", [1.0, 1e3])
@pytest.mark.parametrize(
    ("size", "n_labels", "width", "scale"), [(7, 20, 64, 10.0), (2, 80, 64, 20.0), (3, 5, 16, 30.0)]
)
def test_constant_maps_keep_everything(size, n_labels, width, scale, step_size):
    rng = np.random.default_rng(4)
    features = np.broadcast_to(10 * rng.normal(size=(6, 1, 1, width)), (6, size, size, width))
    labels, words = rng.random((6, n_labels)) < 0.2, rng.normal(size=(n_labels, width))
    got = lcm_select(
        jnp.asarray(features, jnp.float32), labels, jnp.asarray(words, jnp.float32), scale=scale, step_size=step_size
    )
    assert got.keep.all() and (got.importance == 1).all()


def test_a_position_without_features_has_score_zero_and_is_dropped():
    features, labels, words, _ = (x.astype(np.float32) for x in case())
    features[:, 1, 2] = 0
    got = lcm_select(features, labels, words, threshold=0.501)
    assert (got.score[:, 1, 2] == 0).all() and not got.keep[:, 1, 2].any() and (got.score > 0).sum() == S * (H * W - 1)


@pytest.mark.parametrize("score_scaling", ["minmax", "none"])
def test_the_two_ends_of_the_threshold(score_scaling):
    features, labels, words, _ = (x.astype(np.float32) for x in case())
    features[0, 0, 0] = 0  # a score of exactly 0
    everything = lcm_select(features, labels, words, threshold=0.5, score_scaling=score_scaling)
    assert everything.keep.all() and everything.score[0, 0, 0] == 0
    best = lcm_select(features, labels, words, threshold=0.99, score_scaling=score_scaling)
    expected = np.asarray(best.score).reshape(S, -1)
    np.testing.assert_array_equal(best.keep.reshape(S, -1), expected == expected.max(axis=1, keepdims=True))


@pytest.mark.parametrize("score_scaling", ["minmax", "none"])
def test_several_thresholds_at_once(score_scaling):
    scores = np.abs(np.random.default_rng(5).normal(size=(4, 9))).astype(np.float32)
    scores[1] = 0.25  # constant
    thresholds = np.float32([0.5, 0.53, 0.6, 0.7, 0.9])
    got = select_positions(jnp.asarray(scores), thresholds[:, None, None], score_scaling=score_scaling)
    assert got.shape == (5, 4, 9)
    for t, threshold in enumerate(thresholds):
        for k, f in enumerate(scores.astype(np.float64)):
            constant = f.max() == f.min()
            scaled = f if score_scaling == "none" else np.ones(9) if constant else (f - f.min()) / (f.max() - f.min())
            expected = sigmoid(scaled) >= threshold
            if not expected.any():
                expected = np.arange(9) == f.argmax()
            np.testing.assert_array_equal(got[t, k], expected)
        one = select_positions(jnp.asarray(scores), float(threshold), score_scaling=score_scaling)
        np.testing.assert_array_equal(got[t], one)
    features, labels, words, _ = case()
    of_images = lcm_select(features, labels, words, threshold=np.full((S, 1), 0.6))
    np.testing.assert_array_equal(of_images.keep, lcm_select(features, labels, words, threshold=0.6).keep)


def test_works_inside_shard_map(selected):
    features, labels, words, _ = (jnp.asarray(x, jnp.float32) for x in case())
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    mapped = jax.jit(jax.shard_map(lcm_select, mesh=mesh, in_specs=(P("data"), P("data"), P()), out_specs=P("data")))
    got = mapped(features, labels, words)
    np.testing.assert_allclose(got.score, selected.score, atol=1e-5)
    np.testing.assert_array_equal(got.keep, selected.keep)
    # Labels and words of the device alone, the same features everywhere.
    mapped = jax.shard_map(lcm_select, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(mapped)(features, labels, words).keep, selected.keep)


def test_numbers_of_numpy_leave_the_precision_of_the_features(selected):
    features, labels, words, _ = (np.asarray(x, np.float32) for x in case())
    with jax.enable_x64(True):
        got = lcm_select(
            features, labels, words, step_size=np.float64(1.0), momentum=np.float64(0.95), scale=np.float64(10)
        )
    assert got.score.dtype == np.float32
    np.testing.assert_array_equal(got.keep, selected.keep)


def test_numbers_may_be_traced():
    features, labels, words, _ = case()
    numbers = {"step_size": 0.5, "momentum": 0.9, "threshold": 0.6}
    plain = lcm_select(features, labels, words, **numbers)
    traced = jax.jit(lambda numbers: lcm_select(features, labels, words, **numbers))(numbers)
    np.testing.assert_allclose(traced.score, plain.score, atol=1e-5)  # another program
    slope = jax.grad(lambda x: lcm_select(features, labels, words, step_size=x).score.sum())(0.5)
    assert np.isfinite(slope) and slope != 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local_features": np.zeros((S, H * W, N))}, r"local_features must be \[S, h, w, n\]"),
        ({"local_features": np.float32(0)}, r"local_features must be \[S, h, w, n\]"),
        ({"local_features": np.zeros((S, 0, W, N))}, r"local_features .* hold no number"),
        ({"labels": np.zeros((S + 1, C))}, r"labels must be \[S, C\] with S = 5"),
        ({"labels": np.zeros(S)}, r"labels must be \[S, C\]"),
        ({"label_embeddings": np.zeros((C, N + 1))}, "give projection"),
        ({"label_embeddings": np.zeros((C + 1, N))}, "label_embeddings must be"),
        ({"label_embeddings": np.zeros(N)}, "label_embeddings must be"),
        ({"projection": np.zeros((N + 1, N))}, r"projection must be \[n, d\] with n = 10"),
        ({"projection": np.zeros(N)}, r"projection must be \[n, d\]"),
        ({"projection": np.zeros((N, N + 1))}, r"label_embeddings must be \[C, d\] = \(6, 11\)"),
        ({"labels": np.full((S, C), -1)}, "labels must be bool, or 0 and 1"),
        ({"labels": np.full((S, C), np.nan)}, "labels must be bool, or 0 and 1"),
        ({"threshold": 2.0}, "threshold must be from 0 to 1, not 2.0"),
        ({"threshold": float("nan")}, "threshold must be from"),
        ({"scale": -1.0}, "scale must be from"),
        ({"scale": float("inf")}, "scale must be from"),
        ({"steps": 0}, "steps"),
        ({"steps": 2.0}, "steps = 2.0: must be a whole number"),
        ({"momentum": 1.5}, "momentum"),
        ({"momentum": float("nan")}, "momentum"),
        ({"score_scaling": "max"}, "score_scaling"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    features, labels, words, _ = case()
    arguments = {"local_features": features, "labels": labels, "label_embeddings": words, **change}
    with pytest.raises(ValueError, match=message):
        lcm_select(**arguments)


FOUR_DEVICES = """
import jax, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from mlfsic_jax import lcm_select

rng = np.random.default_rng(0)
arguments = (np.abs(rng.normal(size=(8, 2, 2, 6))), rng.random((8, 3)) < 0.4, rng.normal(size=(3, 6)))
arguments = [a.astype(np.float32) for a in arguments]
mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))
mapped = jax.shard_map(lcm_select, mesh=mesh, in_specs=(P("devices"), P("devices"), P()), out_specs=P("devices"))
for a, b in zip(jax.jit(mapped)(*arguments), lcm_select(*arguments)):
    np.testing.assert_allclose(a, b, atol=1e-4)  # float32, 20 iterations with a normalisation each

# The same images everywhere, other labels on every device.
images, labels, words = arguments[0][:2], arguments[1], arguments[2]
mapped = jax.shard_map(lcm_select, mesh=mesh, in_specs=(P(), P("devices"), P()), out_specs=P("devices"))
alone = [lcm_select(images, labels[i : i + 2], words) for i in range(0, 8, 2)]
for a, b in zip(jax.jit(mapped)(images, labels, words), zip(*alone)):
    np.testing.assert_allclose(a, np.concatenate(b), atol=1e-4)

# The same images and labels everywhere, another number on every device.
labels = labels[:2]
for name, values in (("scale", (10, 5, 2, 1)), ("step_size", (1, 0.5, 2, 0.1)), ("momentum", (0.9, 0.5, 0.1, 0))):
    def select(*arrays):
        return lcm_select(*arrays[:3], **{name: arrays[3][0]})
    mapped = jax.shard_map(select, mesh=mesh, in_specs=(P(), P(), P(), P("devices")), out_specs=P("devices"))
    alone = [lcm_select(images, labels, words, **{name: np.float32(value)}) for value in values]
    for a, b in zip(jax.jit(mapped)(images, labels, words, np.array(values, np.float32)), zip(*alone)):
        np.testing.assert_allclose(a, np.concatenate(b), atol=1e-4, err_msg=name)
"""


def test_mapped_over_four_devices():
    """A rho that does not vary over the mesh would get the gradient of all devices' images at once."""
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "NPROC": "32", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES], env=os.environ | devices, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
