"""Prototypes and ridge against NumPy and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import cosine_similarity

from mlfsic_jax.methods.closed_form import prototypes, ridge


@pytest.fixture
def episode():
    rng = np.random.default_rng(0)
    support, query = rng.normal(size=(10, 6)), rng.normal(size=(7, 6))
    labels = rng.random((10, 4)) < 0.4
    labels[:4] |= np.eye(4, dtype=bool)
    return support, labels, query


def as_float32(support, labels, query):
    return jnp.asarray(support, jnp.float32), jnp.asarray(labels), jnp.asarray(query, jnp.float32)


def test_prototypes_are_the_means_of_each_labels_images(episode):
    support, labels, query = episode
    means = np.stack([support[labels[:, c]].mean(axis=0) for c in range(4)])
    expected = 1 / (1 + np.exp(-10 * cosine_similarity(query, means)))
    got = jax.jit(prototypes)(*as_float32(*episode))
    np.testing.assert_allclose(got, expected, atol=1e-5)  # float32 cosines, times 10, times a slope of 1/4 at most


def test_a_label_without_support_scores_one_half(episode):
    support, labels, query = episode
    labels[:, 2] = False
    np.testing.assert_array_equal(prototypes(*as_float32(support, labels, query))[:, 2], 0.5)


@pytest.mark.parametrize("regulariser", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("n_support", [10, 4])  # more images than features, and fewer
def test_ridge_is_scikit_learns_on_centred_targets(episode, regulariser, n_support):
    support, labels, query = episode
    support, labels = support[:n_support], labels[:n_support]
    mean = labels.mean(axis=0)
    model = Ridge(alpha=regulariser, fit_intercept=False).fit(support, labels - mean)
    got = jax.jit(ridge)(*as_float32(support, labels, query), regulariser=regulariser)
    # float32 solve; the kernel's condition number is below 300 at 0.1.
    np.testing.assert_allclose(got, model.predict(query) + mean, atol=2e-4 if regulariser < 1 else 2e-5)


def test_ridge_equals_the_primal_solution(episode):
    support, labels, query = episode
    targets = labels - labels.mean(axis=0)
    weights = np.linalg.inv(support.T @ support + np.eye(6)) @ support.T @ targets
    got = ridge(*as_float32(*episode))
    np.testing.assert_allclose(got, query @ weights + labels.mean(axis=0), atol=2e-5)  # float32, condition below 40


def test_ridge_falls_back_to_the_target_mean_far_from_the_support(episode):
    support, labels, query = episode
    got = ridge(*as_float32(support, labels, query * 0))
    np.testing.assert_allclose(got, np.tile(labels.mean(axis=0), (7, 1)), atol=1e-7)
