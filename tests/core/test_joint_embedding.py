import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax.core.model import JointEmbedding


def initialise(module, n=6, d_w=5):
    def both(module, features, words):
        return module.visual(features), module.text(words)

    init = jax.jit(functools.partial(module.init, method=both))
    return init(jax.random.key(0), jnp.zeros((1, n)), jnp.zeros((1, d_w)))


def test_two_linear_maps_without_bias():
    rng = np.random.default_rng(0)
    module = JointEmbedding(d_joint=4)
    variables = initialise(module)
    shapes = jax.tree.map(jnp.shape, variables)
    assert shapes == {"params": {"a_visual": {"kernel": (6, 4)}, "a_text": {"kernel": (5, 4)}}}
    features, words = rng.normal(size=(2, 3, 3, 6)), rng.normal(size=(7, 5))
    for method, x, name in (("visual", features, "a_visual"), ("text", words, "a_text")):
        got = module.apply(variables, jnp.asarray(x, jnp.float32), method=method)
        kernel = np.asarray(variables["params"][name]["kernel"], np.float64)
        expected = np.stack([row @ kernel for row in x.reshape(-1, x.shape[-1])]).reshape(*x.shape[:-1], 4)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)  # float32 sums of 6 products


def test_projecting_locals_then_pooling_is_pooling_then_projecting():
    module = JointEmbedding(d_joint=4)
    variables = initialise(module)
    features = jax.random.normal(jax.random.key(1), (2, 9, 6))
    first = module.apply(variables, features, method="visual").mean(axis=1)
    last = module.apply(variables, features.mean(axis=1), method="visual")
    np.testing.assert_allclose(first, last, atol=1e-6)  # the same sum of values of size 1 in another order


@pytest.mark.parametrize(("n", "d_joint"), [(6, 9), (6, 6), (9, 6)])
def test_orthogonal_start(n, d_joint):
    variables = initialise(JointEmbedding(d_joint, orthogonal=True), n=n)
    kernel = np.asarray(variables["params"]["a_visual"]["kernel"], np.float64)
    # Isometry where the joint space has room for it, else a projection with orthonormal outputs.
    product = kernel @ kernel.T if n <= d_joint else kernel.T @ kernel
    np.testing.assert_allclose(product, np.eye(min(n, d_joint)), atol=1e-5)  # float32 QR
