"""Prototypes and ridge against NumPy and scikit-learn."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import cosine_similarity

from mlfsic_jax.methods import create
from tests.methods.episode import episode_scores


@pytest.fixture
def episode():
    rng = np.random.default_rng(0)
    support, query = rng.normal(size=(10, 6)), rng.normal(size=(7, 6))
    labels = rng.random((10, 4)) < 0.4
    labels[:4] |= np.eye(4, dtype=bool)
    return support, labels, query


def scores_of(name, support, labels, query, mean=None, **options):
    """Scores of global features: images of one region; the mean of the base images is 0 unless given."""
    trained = {"mean": jnp.zeros(6) if mean is None else mean}
    return episode_scores(create(name, **options), trained, support[:, None], labels, query[:, None])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_prototypes_are_the_means_of_each_labels_images(episode):
    support, labels, query = episode
    means = np.stack([support[labels[:, c]].mean(axis=0) for c in range(4)])
    expected = 1 / (1 + np.exp(-10 * cosine_similarity(query, means)))
    got = scores_of("prototypes", *episode)
    np.testing.assert_allclose(got, expected, atol=1e-5)  # float32 cosines, times 10, times a slope of 1/4 at most


def test_centred_prototypes_are_means_of_unit_features_minus_the_base_mean(episode):
    support, labels, query = episode
    mean = np.random.default_rng(1).normal(size=6).astype(np.float32)
    x, q = unit(support - mean), unit(query - mean)
    means = np.stack([x[labels[:, c]].mean(axis=0) for c in range(4)])
    got = scores_of("prototypes_centered", *episode, mean=mean)
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-10 * cosine_similarity(q, means))), atol=1e-5)


def test_a_label_without_support_scores_one_half(episode):
    support, labels, query = episode
    labels[:, 2] = False
    np.testing.assert_array_equal(scores_of("prototypes", support, labels, query)[:, 2], 0.5)


@pytest.mark.parametrize("regulariser", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("n_support", [10, 4])  # more images than features, and fewer
def test_ridge_is_scikit_learns_on_centred_targets(episode, regulariser, n_support):
    support, labels, query = episode
    support, labels = support[:n_support], labels[:n_support]
    mean = labels.mean(axis=0)
    model = Ridge(alpha=regulariser, fit_intercept=False).fit(unit(support), labels - mean)
    got = scores_of("ridge", support, labels, query, regulariser=regulariser)
    # float32 solve; the kernel's condition number is below 300 at 0.1.
    np.testing.assert_allclose(got, model.predict(unit(query)) + mean, atol=2e-4 if regulariser < 1 else 2e-5)


def test_ridge_equals_the_primal_solution(episode):
    support, labels, query = episode
    targets = labels - labels.mean(axis=0)
    x = unit(support)
    weights = np.linalg.inv(x.T @ x + np.eye(6)) @ x.T @ targets
    got = scores_of("ridge", *episode)
    expected = unit(query) @ weights + labels.mean(axis=0)
    np.testing.assert_allclose(got, expected, atol=2e-5)  # float32, condition below 40


def test_ridge_falls_back_to_the_target_mean_far_from_the_support(episode):
    support, labels, query = episode
    got = scores_of("ridge", support, labels, query * 0)
    np.testing.assert_allclose(got, np.tile(labels.mean(axis=0), (7, 1)), atol=1e-7)
