"""Logistic regression against scikit-learn's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from mlfsic_jax.methods import create, logistic
from tests.methods.episode import episode_scores


def episode(n_support=9):
    rng = np.random.default_rng(0)
    labels = rng.random((n_support, 3)) < 0.4
    labels[:3] |= np.eye(3, dtype=bool)
    return rng.normal(size=(n_support, 4, 6)), labels, rng.normal(size=(7, 4, 6)), rng.normal(size=6)


def unit_features(local, mean):
    x = local.mean(axis=1) - mean
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("c", [0.1, 10.0, 1000.0])
@pytest.mark.parametrize("n_support", [9, 4])  # more images than features; fewer, so that labels can be separated
def test_probabilities_are_scikit_learns(c, n_support):
    support, labels, query, mean = episode(n_support)
    x, q = unit_features(support, mean), unit_features(query, mean)
    fits = [LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(x, y) for y in labels.T]
    expected = np.stack([fit.predict_proba(q)[:, 1] for fit in fits], axis=1)
    trained = {"mean": jnp.asarray(mean, jnp.float32)}
    got = episode_scores(create("logistic", inverse_regulariser=c), trained, support, labels, query)
    np.testing.assert_allclose(got, expected, atol=2e-4)  # float32 solve, conditioned by C


def test_the_minimum_has_no_gradient():
    support, labels, _, mean = episode(30)
    x = unit_features(support, mean)
    a, b = logistic.newton(jnp.asarray(x @ x.T, jnp.float32), jnp.asarray(labels[:, 0]), inverse_regulariser=5.0)
    w = x.T @ np.asarray(a, np.float64)
    residual = 1 / (1 + np.exp(-(x @ w + float(b)))) - labels[:, 0]
    np.testing.assert_allclose(w + 5 * x.T @ residual, 0, atol=2e-5)
    np.testing.assert_allclose(5 * residual.sum(), 0, atol=2e-5)


@pytest.mark.parametrize("present", [False, True])
def test_a_label_of_all_or_of_no_image_stays_finite(present):
    support, _, _, mean = episode()
    x = jnp.asarray(unit_features(support, mean), jnp.float32)
    a, b = logistic.newton(x @ x.T, jnp.full(len(x), present), inverse_regulariser=100.0)
    p = jax.nn.sigmoid(x @ x.T @ a + b)
    assert np.isfinite(p).all() and (np.abs(p - present) < 0.01).all()
