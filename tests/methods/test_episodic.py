"""The papers' models through their contract, and fine-tuning in the test phase, against steps written by hand."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax import lcm_select
from mlfsic_jax.bench.made_up import random_variables
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.data.features import View
from mlfsic_jax.methods import create, episodic
from tests.methods.episode import episode_scores

S, Q, L, N, D, D_W, C = 5, 4, 3, 6, 8, 5, 3


def episode(seed=0):
    """Support, labels, queries and word vectors."""
    rng = np.random.default_rng(seed)
    support, query = np.abs(rng.normal(size=(S, L, N))), np.abs(rng.normal(size=(Q, L, N)))
    labels = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 1]], bool)
    return *(jnp.asarray(x, jnp.float32) for x in (support, labels, query)), words()


def words():
    return jnp.asarray(np.random.default_rng(9).normal(size=(C, D_W)), jnp.float32)


def build(**options):
    options = {"attention": "standard", "dynamic": False} | options
    model = BaseModel(d_joint=D, n_heads=2, d_dynamic=3, n_dynamic=4, dropout=0.0, scale=7.0, **options)
    support, labels, _, vectors = episode()
    photos = support[:, None]
    return model, random_variables(model, photos, photos, labels, labels, vectors)


@functools.partial(jax.jit, static_argnums=0, static_argnames="epochs")
def fine_tune(model, variables, support, labels, vectors, *, epochs, learning_rate=1e-4):
    options = {"epochs": epochs, "learning_rate": learning_rate}
    return episodic.fine_tune(model, variables, support.mean(axis=1), labels, vectors, **options)


def score(model, variables, support, labels, query, vectors, **options):
    method = create("fine_tuned", model=model, **options)
    return episode_scores(method, {"variables": variables}, support, labels, query, vectors)


def by_hand(model, variables, support, labels, query, vectors, keep=None):
    """Probabilities of the queries by prototypes of the support's regions, which ``keep`` selects."""
    regions, texts = model.apply(variables, support, method="regions"), model.apply(variables, vectors, method="words")
    prototypes = np.asarray(model.apply(variables, regions, labels, texts, keep, method="prototypes"))
    images = np.asarray(query.mean(axis=1) @ variables["params"]["joint"]["a_visual"]["kernel"])
    return 1 / (1 + np.exp(-7 * unit(images) @ unit(prototypes).T))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cm_loss_and_gradient(a_visual, a_text, pooled, labels, vectors, scale=7.0):
    """The CM loss, and its gradient by the chain rule through the two normalisations; float64."""
    images, texts = pooled @ a_visual, vectors @ a_text
    x, w = unit(images), unit(texts)
    logits = scale * x @ w.T
    loss = (np.logaddexp(0, logits) - labels * logits).sum()
    residual = scale * (1 / (1 + np.exp(-logits)) - labels)  # [S, C]
    d_x, d_w = residual @ w, residual.T @ x
    d_images = (d_x - (d_x * x).sum(1, keepdims=True) * x) / np.linalg.norm(images, axis=1, keepdims=True)
    d_texts = (d_w - (d_w * w).sum(1, keepdims=True) * w) / np.linalg.norm(texts, axis=1, keepdims=True)
    return loss, pooled.T @ d_images, vectors.T @ d_texts


def adam_by_hand(variables, support, labels, vectors, epochs, rate):
    """A_visual, A_text and the losses before every step and after the last."""
    joint = variables["params"]["joint"]
    weights = [np.asarray(joint[name]["kernel"], np.float64) for name in ("a_visual", "a_text")]
    pooled, labels, vectors = (np.asarray(x, np.float64) for x in (support.mean(axis=1), labels, vectors))
    first, second, losses = [0.0, 0.0], [0.0, 0.0], []
    for t in range(1, epochs + 1):
        loss, *gradients = cm_loss_and_gradient(*weights, pooled, labels, vectors)
        losses.append(loss)
        for i, g in enumerate(gradients):
            first[i], second[i] = 0.9 * first[i] + 0.1 * g, 0.999 * second[i] + 0.001 * g**2
            step = first[i] / (1 - 0.9**t) / (np.sqrt(second[i] / (1 - 0.999**t)) + 1e-8)
            weights[i] = weights[i] - rate * step
    return weights, [*losses, cm_loss_and_gradient(*weights, pooled, labels, vectors)[0]]


@pytest.mark.parametrize(("epochs", "rate"), [(1, 1e-3), (40, 1e-3), (40, 1e-4)])
def test_fine_tuning_is_adam_on_the_cm_loss_of_the_support(epochs, rate):
    model, variables = build()
    support, labels, _, vectors = episode(1)
    tuned = fine_tune(model, variables, support, labels, vectors, epochs=epochs, learning_rate=rate)
    weights, losses = adam_by_hand(variables, support, labels, vectors, epochs, rate)
    assert all(after < before for before, after in itertools.pairwise(losses))
    joint = tuned["params"]["joint"]
    for name, expected in zip(("a_visual", "a_text"), weights, strict=True):
        # Weights of size 0.5 in float32 over 40 steps; a step of Adam moves every weight by about the rate.
        np.testing.assert_allclose(joint[name]["kernel"], expected, atol=1e-5)
        assert np.abs(joint[name]["kernel"] - variables["params"]["joint"][name]["kernel"]).max() > 0.5 * rate
    for path, x in jax.tree.leaves_with_path(variables["params"]["prototype"]):
        np.testing.assert_array_equal(x, functools.reduce(lambda t, k: t[k.key], path, tuned["params"]["prototype"]))


def test_without_epochs_it_is_the_trained_model():
    model, variables = build()
    support, labels, query, vectors = episode(2)
    tuned = fine_tune(model, variables, support, labels, vectors, epochs=0)
    jax.tree.map(np.testing.assert_array_equal, tuned, variables)
    got = score(model, variables, support, labels, query, vectors, epochs=0)
    np.testing.assert_allclose(got, by_hand(model, variables, support, labels, query, vectors), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"attention": "channelwise", "dynamic": True}, {"query_top": 2}], ids=str)
def test_scores_are_those_of_the_fine_tuned_model(options):
    model, variables = build(**options)
    support, labels, query, vectors = episode(3)
    got = score(model, variables, support, labels, query, vectors, epochs=20, learning_rate=0.05)
    tuned = fine_tune(model, variables, support, labels, vectors, epochs=20, learning_rate=0.05)
    expected = score(model, tuned, support, labels, query, vectors, epochs=0)
    assert got.shape == (Q, C)
    np.testing.assert_allclose(got, expected, atol=1e-5)  # float32, compiled as another program
    before = score(model, variables, support, labels, query, vectors, epochs=0)
    assert np.abs(got - before).max() > 1e-3
    if not model.query_top:
        means = query.mean(axis=1, keepdims=True)
        np.testing.assert_allclose(
            score(model, variables, support, labels, means, vectors, epochs=20, learning_rate=0.05), got, atol=1e-5
        )


def test_episodes_are_mapped():
    model, variables = build()
    method, trained = create("fine_tuned", model=model, epochs=20, learning_rate=0.05), {"variables": variables}
    episodes = [episode(seed)[:3] for seed in range(3)]
    stacked = tuple(map(jnp.stack, zip(*episodes, strict=True)))

    def one(arrays):
        support, labels, query = arrays
        state = method.fit(trained, method.embed(trained, support), labels, words())
        return method.score(trained, state, method.embed(trained, query))

    mapped = jax.jit(lambda arrays: jax.lax.map(one, arrays))(stacked)
    for got, arrays in zip(mapped, episodes, strict=True):
        expected = score(model, variables, *arrays, words(), epochs=20, learning_rate=0.05)
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_words_alone_score_by_cosine_and_ignore_the_support():
    model, variables = build()
    support, labels, query, vectors = episode(4)
    joint = {name: np.asarray(layer["kernel"]) for name, layer in variables["params"]["joint"].items()}
    images, texts = np.asarray(query).mean(axis=1) @ joint["a_visual"], np.asarray(vectors) @ joint["a_text"]
    zero_shot, trained = create("zero_shot", model=model), {"variables": variables}
    got = episode_scores(zero_shot, trained, support, labels, query, vectors)
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-7 * unit(images) @ unit(texts).T)), atol=1e-5)
    other = episode_scores(zero_shot, trained, 2 + support, 1 - labels, query, vectors)
    np.testing.assert_array_equal(got, other)


def test_base_scores_by_prototypes_of_all_regions():
    model, variables = build(attention="channelwise", dynamic=True)
    arrays = episode(5)
    got = episode_scores(create("base", model=model), {"variables": variables}, *arrays)
    np.testing.assert_allclose(got, by_hand(model, variables, *arrays), atol=1e-5)


@pytest.mark.parametrize("theta", [0.52, 0.6])
def test_lcm_scores_by_prototypes_of_the_regions_that_lcm_select_keeps(theta):
    model, variables = build()
    support, labels, _, vectors = arrays = episode(6)
    joint = {name: layer["kernel"] for name, layer in variables["params"]["joint"].items()}
    options = {"steps": 6, "momentum": 0.8}
    select = functools.partial(lcm_select, scale=7.0, threshold=theta, **options)
    keep = select(support[:, None], labels, vectors @ joint["a_text"], projection=joint["a_visual"]).keep[:, 0]
    assert 0.1 < keep.mean() < 0.95
    method, trained = create("lcm", model=model, **options), {"variables": variables, "theta": np.float32(theta)}
    got = episode_scores(method, trained, *arrays)
    np.testing.assert_allclose(got, by_hand(model, variables, *arrays, keep), atol=1e-5)
    images = method.embed(trained, support)
    images |= method.embed_support(trained, images, labels, vectors)
    state = method.fit(trained, images, labels, vectors)
    assert method.statistics(state)["kept"] == keep.mean()


def test_without_episodes_a_model_is_untrained():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4, 2, 3, N)).astype(np.float16)
    base = View(features.__getitem__, np.eye(4, C, dtype=bool), np.asarray(words()), ("a", "b", "c"))
    method = create("base", model=dataclasses.replace(build()[0], anchor=True, attention="channelwise"))
    first, again, other = (method.train(jax.random.key(i), base)["variables"]["params"] for i in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    a_visual, a_text = (np.asarray(first["joint"][name]["kernel"]) for name in ("a_visual", "a_text"))
    np.testing.assert_allclose(a_visual @ a_visual.T, np.eye(N), atol=1e-5)  # the orthogonal start of an anchor
    assert a_text.shape == (D_W, D) and not np.allclose(a_text, other["joint"]["a_text"]["kernel"])
    assert first["prototype"]["attention"]["mlp_gate"] == 0
