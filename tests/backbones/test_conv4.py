"""Conv-4's convolution, whose gradient to the kernel is our own on CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax.backbones.conv4 import convolve


def xla(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("shape", [(3, 5, 7, 2), (2, 1, 1, 3), (1, 8, 2, 1)])
@pytest.mark.parametrize("episodes", [0, 2])
def test_convolution_and_gradients_are_those_of_xla(shape, episodes):
    rng = np.random.default_rng(0)
    lead = (episodes,) if episodes else ()
    x, kernel, dy = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((*lead, *shape), (3, 3, shape[-1], 4), (*lead, *shape[:-1], 4))
    )

    def results(convolve):
        def loss(x, kernel):
            found = jax.vmap(convolve, (0, None))(x, kernel) if episodes else convolve(x, kernel)
            return (found * dy).sum(), found

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, kernel)

    # Sums of some hundred float32 products of order one, in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), results(convolve), results(xla))
