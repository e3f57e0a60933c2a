"""Fine-tuning in the test phase, against plain steps with gradients written by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax.bench.benchmark import random_variables
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.methods import wga

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


fine_tune = jax.jit(wga.fine_tune, static_argnums=0, static_argnames="epochs")
score = jax.jit(wga.score, static_argnums=0, static_argnames="epochs")


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
    regions, texts = model.apply(variables, support, method="regions"), model.apply(variables, vectors, method="words")
    prototypes = np.asarray(model.apply(variables, regions, labels, texts, method="prototypes"))
    images = np.asarray(query.mean(axis=1) @ variables["params"]["joint"]["a_visual"]["kernel"])
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-7 * unit(images) @ unit(prototypes).T)), atol=1e-5)


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
    episodes = [episode(seed)[:3] for seed in range(3)]
    stacked = tuple(map(jnp.stack, zip(*episodes, strict=True)))
    one = functools.partial(wga.score, model, variables, word_vectors=words(), epochs=20, learning_rate=0.05)
    mapped = jax.jit(lambda arrays: jax.lax.map(lambda e: one(*e), arrays))(stacked)
    for got, arrays in zip(mapped, episodes, strict=True):
        expected = score(model, variables, *arrays, words(), epochs=20, learning_rate=0.05)
        np.testing.assert_allclose(got, expected, atol=1e-5)
