import jax
import jax.numpy as jnp
import numpy as np

from mlfsic_jax.core.functional import binary_cross_entropy


def test_is_the_formula_elementwise():
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
