"""The prior from a classifier, on a published-size example and against NumPy."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax.core import class_words, word_ridge
from mlfsic_jax.data.class_words import mixtures

N, K, C, S, Q = 7, 11, 3, 6, 5


@pytest.fixture(scope="module")
def golden():
    path = Path(os.environ.get("MLFSIC_SHARED", "../shared")) / "ready/golden.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there: set MLFSIC_SHARED")
    return dict(np.load(path))


def scores_of(golden, words, gated):
    weight, bias, mean, mean_logits = (golden[name] for name in ("head", "bias", "mean_g", "mean_l"))
    classes = np.stack([golden["class_gloss"], golden["class_photo"]])
    directions = class_words.directions(weight, mixtures(words, classes=classes))
    support, query = (
        class_words.embed(weight, bias, mean, mean_logits, golden[f"maps_{of}"].astype(np.float32))
        for of in ("support", "query")
    )
    fitted = class_words.fit(directions, *support, golden["y_support"], regulariser=1.0, gated=gated)
    return fitted, class_words.scores(fitted, *query), query


def test_an_episode_of_voc_computed_elsewhere(golden):
    """Six labels, five shots, EfficientNet-Lite2: float32 here against float64 there."""
    fitted, scores, (x, z) = scores_of(golden, golden["label_gloss"], gated=False)
    for found, name in zip((*fitted.directions, x, z), ("D", "A", "x_query", "l_query"), strict=True):
        np.testing.assert_allclose(found, golden[name], atol=1e-4, err_msg=name)
    np.testing.assert_allclose(class_words.prior(fitted.directions, x, z), golden["prior_query"], atol=1e-4)
    np.testing.assert_allclose(fitted.left_out, golden["left_out_beta1"], atol=1e-4)
    np.testing.assert_allclose(scores, golden["scores_beta1"], atol=1e-4)


def test_the_gate_opens_for_right_words_and_closes_for_wrong_ones(golden):
    fitted, scores, _ = scores_of(golden, golden["label_gloss"], gated=True)
    assert fitted.beta == 1
    np.testing.assert_allclose(scores, golden["scores_gate"], atol=1e-4)
    fitted, scores, _ = scores_of(golden, np.roll(golden["label_gloss"], 1, axis=0), gated=True)
    assert fitted.beta == 0
    np.testing.assert_allclose(scores, golden["scores_ridge"], atol=1e-4)
    np.testing.assert_allclose(golden["scores_gate_wrong_words"], golden["scores_ridge"], atol=1e-4)


def episode(seed=0):
    rng = np.random.default_rng(seed)

    def unit(*shape):
        x = rng.normal(size=shape)
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    labels = np.eye(C, dtype=bool)[np.arange(S) % C]
    return (unit(C, N), unit(C, K)), (unit(S, N), unit(S, K)), labels, (unit(Q, N), unit(Q, K))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_left_out_scores_are_those_of_fits_without_an_image(beta):
    directions, (x, z), labels, _ = episode()
    p, y = beta * np.asarray(class_words.prior(directions, x, z)), labels.astype(np.float64)

    def without(i):
        rest = np.arange(S) != i
        target = y[rest] - p[rest]
        gram = x[rest] @ x[rest].T + np.eye(S - 1)
        return p[i] + x[i] @ x[rest].T @ np.linalg.solve(gram, target - target.mean(axis=0))

    expected = np.array([without(i) for i in range(S)])
    if beta:
        fitted = class_words.fit(directions, x, z, labels, regulariser=1.0, gated=False)
    else:  # a prior of nothing
        fitted = class_words.fit((0 * directions[0], 0 * directions[1]), x, z, labels, regulariser=1.0, gated=False)
    np.testing.assert_allclose(fitted.left_out, expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_names_are_left_out_by_half_a_standard_error(seed):
    directions, (x, z), labels, _ = episode(seed)
    labels = np.where(np.arange(S)[:, None] == S - 1, np.nan, labels)  # the last image only fills the set up
    p, errors = np.asarray(class_words.prior(directions, x, z)), []
    for beta in (1.0, 0.0):
        _, left_out = word_ridge.solve(x[:-1] @ x[:-1].T, beta * p[:-1], labels[:-1].astype(np.float32), 1.0)
        errors.append(((np.asarray(left_out) - labels[:-1]) ** 2).sum(axis=1))
    difference = errors[0] - errors[1]
    clearly = difference.mean() > difference.std(ddof=1) / np.sqrt(S - 1) / 2
    options = {"regulariser": 1.0, "least_spread": 0.0}
    fitted = class_words.fit(directions, x, z, labels.astype(np.float32), **options)
    assert fitted.beta == (0 if clearly else 1)
    one = np.where(np.arange(S)[:, None] == 0, labels, np.nan).astype(np.float32)
    assert class_words.fit(directions, x, z, one, **options).beta == 1


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_names_that_tell_nothing_apart_are_left_out(factor):
    directions, (x, z), _, _ = episode()
    p = np.asarray(class_words.prior(directions, x, z))[:-1]
    c = p.shape[1]
    labels = (p > 0).astype(np.float32)  # as the prior has it: left-out errors do not speak against it
    labels = np.concatenate([labels, np.full((1, c), np.nan, np.float32)])  # the last image only fills the set up
    spread = np.sqrt((p**2).mean() * c / (c - 1))
    least = class_words.LEAST_SPREAD * (1 - 1 / np.sqrt(p.size))
    scaled = tuple(factor * least / spread * np.asarray(d) for d in directions)
    assert class_words.fit(scaled, x, z, labels, regulariser=1.0).beta == (factor > 1)
    assert class_words.fit(scaled, x, z, labels, regulariser=1.0, least_spread=0.0).beta == 1
    assert class_words.fit(scaled, x, z, labels, regulariser=1.0, gated=False).beta == 1
    assert class_words.fit(scaled, x, z, np.full_like(labels, np.nan), regulariser=1.0).beta == 1
    some = np.where(np.arange(c) == 0, 0, labels)  # a label without an example
    some[-1] = np.nan
    assert class_words.fit(scaled, x, z, some, regulariser=1.0).beta == 1
    one = tuple(d[:1] for d in scaled)
    assert class_words.fit(one, x, z, labels[:, :1], regulariser=1.0).beta == 1


def test_without_photos_the_prior_scores():
    directions, (x, z), labels, query = episode()
    fitted = class_words.fit(directions, x[:0], z[:0], labels[:0], regulariser=1.0)
    np.testing.assert_allclose(class_words.scores(fitted, *query), class_words.prior(directions, *query), atol=1e-6)


def test_a_single_label_is_not_compared_with_others():
    (d, a), _, _, (x, z) = episode()
    p = x @ d[:1].T + 1.25 * (z @ a[:1].T)  # 17.2 prior - 2.56 is to be 12.3 p - 3.4
    np.testing.assert_allclose(17.2 * class_words.prior((d[:1], a[:1]), x, z) - 2.56, 12.3 * p - 3.4, atol=1e-5)


def test_episodes_are_mapped():
    episodes = [episode(seed) for seed in range(3)]
    together = jax.tree.map(lambda *x: np.stack(x), *episodes)

    def run(directions, support, labels, query):
        return class_words.scores(class_words.fit(directions, *support, labels, regulariser=1.0), *query)

    one_by_one = jnp.stack([run(*e) for e in episodes])
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(*together), one_by_one, atol=1e-5)


def test_with_clip_the_prior_is_a_multiple_of_cosines_less_their_mean():
    """Less those of the mean image too, which shifts a label's cosines alike in all images."""
    rng = np.random.default_rng(4)
    features, proj = rng.normal(size=(Q, 1 + 4, N)), rng.normal(size=(N, K))
    mean, (texts, mean_pooled) = rng.normal(size=N), rng.normal(size=(2, C, K))
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
    mean_pooled = mean_pooled[0] / 9
    x, pooled = class_words.embed_clip({"proj": proj}, mean, mean_pooled, features)
    centred = features.mean(axis=1) - mean
    np.testing.assert_allclose(x, centred / np.linalg.norm(centred, axis=1, keepdims=True), atol=1e-6)
    images = features[:, 0] @ proj
    cosines = images @ texts.T / np.linalg.norm(images, axis=1, keepdims=True) - mean_pooled @ texts.T
    found = class_words.prior(class_words.directions_clip(texts, N), x, pooled)
    np.testing.assert_allclose(found, 7 * (cosines - cosines.mean(axis=1, keepdims=True)), atol=1e-5)


def test_x_and_prior_are_sums_over_regions():
    rng = np.random.default_rng(3)
    directions, *_ = episode()
    weight, bias, mean, mean_logits = (rng.normal(size=s).astype(np.float32) for s in ((K, N), K, N, K))
    features = rng.normal(size=(Q, 4, N)).astype(np.float32)
    x, z = class_words.embed(weight, bias, mean, mean_logits, features)
    parts, by_region = class_words.by_region(weight, bias, mean, mean_logits, directions, features)
    np.testing.assert_allclose(parts.sum(axis=1), x, atol=1e-6)
    expected = x @ directions[0].T + 1.25 * (z @ directions[1].T)
    np.testing.assert_allclose(by_region.sum(axis=1), expected, atol=1e-5)
