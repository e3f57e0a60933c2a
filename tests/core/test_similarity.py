import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from mlfsic_jax.core.functional import cosine_logits, unit


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
