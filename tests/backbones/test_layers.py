"""The layers that backbones share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax.backbones._layers import StemConv


@pytest.mark.parametrize("size", [(8, 8), (9, 6), (1, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_first_convolution_is_one_on_every_platform(monkeypatch, size, stride):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, 3)), jnp.float32)
    layer = StemConv(4, 3, stride)
    variables = {"params": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 3, 4)), jnp.float32)}}

    def value_and_slope():
        return layer.apply(variables, x), jax.grad(lambda v: jnp.sin(layer.apply(v, x)).sum())(variables)

    here = value_and_slope()
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = range(0, size[0], stride), range(0, size[1], stride)
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    windows = [[np.tensordot(padded[:, i : i + 3, j : j + 3], kernel, 3) for j in columns] for i in rows]
    expected = np.array(windows).transpose(2, 0, 1, 3)
    np.testing.assert_allclose(here[0], expected, atol=1e-5)  # 27 products in float32
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, cpu, default: default(*arrays))
    elsewhere = value_and_slope()
    np.testing.assert_allclose(elsewhere[0], expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), here[1], elsewhere[1])
