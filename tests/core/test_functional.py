"""Cosines against scikit-learn, the loss against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from mlfsic_jax.core.functional import binary_cross_entropy, cosine_logits, unit


def test_unit_divides_by_the_length_along_an_axis():
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    for axis in (-1, 0, 1):
        expected = x / np.sqrt((x.astype(np.float64) ** 2).sum(axis=axis, keepdims=True))
        np.testing.assert_allclose(unit(jnp.asarray(x), axis), expected, rtol=1e-5)  # a few float32 roundings


def test_zero_stays_zero_with_a_finite_gradient():
    value, gradient = jax.value_and_grad(lambda x: unit(x).sum())(jnp.zeros(4))
    assert value == 0 and jnp.isfinite(gradient).all()


@pytest.mark.parametrize("factor", [1e-8, 1e-3, 1e3, 1e8])
def test_cosine_logits_are_scaled_cosines_of_any_length(factor):
    rng = np.random.default_rng(1)
    x, prototypes = rng.normal(size=(6, 8)), rng.normal(size=(3, 8))
    got = cosine_logits(jnp.asarray(factor * x, jnp.float32), jnp.asarray(prototypes / factor, jnp.float32), 7.0)
    np.testing.assert_allclose(got, 7 * cosine_similarity(x, prototypes), atol=1e-5)  # 7 * a few float32 roundings


def test_cosine_logits_keep_leading_axes_and_take_zero_vectors():
    rng = np.random.default_rng(2)
    x, prototypes = rng.normal(size=(2, 3, 4)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    prototypes[2] = 0
    got = cosine_logits(jnp.asarray(x), jnp.asarray(prototypes), 10.0)
    assert got.shape == (2, 3, 5)
    np.testing.assert_allclose(got, 10 * cosine_similarity(x.reshape(6, 4), prototypes).reshape(2, 3, 5), atol=1e-5)
    assert (got[..., 2] == 0).all()


def test_the_loss_is_the_formula_elementwise():
    rng = np.random.default_rng(0)
    logits, labels = 4 * rng.normal(size=(5, 7)), rng.random((5, 7)) < 0.4
    p = 1 / (1 + np.exp(-logits))
    expected = np.where(labels, -np.log(p), -np.log(1 - p))
    for label_type in (bool, np.int32, np.float32):
        got = binary_cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels.astype(label_type)))
        assert got.shape == (5, 7) and got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)  # float32: log(1 + e^s) - s cancels


def test_labels_broadcast():
    got = binary_cross_entropy(jnp.zeros((2, 3)), jnp.array([1, 0, 1]))
    np.testing.assert_allclose(got, np.full((2, 3), np.log(2)), rtol=1e-6)


def test_large_logits_stay_finite_with_the_right_gradient():
    logits = jnp.array([-1e4, -1e4, 1e4, 1e4, 0.0])
    labels = jnp.array([0.0, 1.0, 0.0, 1.0, 1.0])
    loss, gradient = jax.vmap(jax.value_and_grad(binary_cross_entropy))(logits, labels)
    np.testing.assert_allclose(loss, [0, 1e4, 1e4, 0, np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(gradient, [0, -1, 1, 0, -0.5], atol=1e-6)  # sigmoid(s) - y
