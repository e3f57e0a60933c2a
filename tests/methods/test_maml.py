"""MAML's inner loop against a NumPy loop, its meta-gradient against PyTorch's autograd."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax.methods import maml

N, H, C, S, Q = 6, 5, 3, 7, 4
INNER = {"steps": 3, "learning_rate": 0.5}


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    start = maml.Learner(*(rng.normal(size=s) for s in ((N, H), (H,), (H, 1), (1,))))
    x, q = rng.normal(size=(S, N)), rng.normal(size=(Q, N))
    return start, x, (rng.random((S, C)) < 0.4) * 1.0, q, (rng.random((Q, C)) < 0.4) * 1.0


def float32(tree):
    return jax.tree.map(jnp.float32, tree)


def test_adaptation_is_gradient_descent_by_hand(case):
    start, x, y, _, _ = case
    w, a, v, b = start.embedding, start.embedding_bias, np.tile(start.output, (1, C)), np.tile(start.output_bias, C)
    for _ in range(3):
        hidden = np.maximum(x @ w + a, 0)
        residual = (1 / (1 + np.exp(-(hidden @ v + b))) - y) / S
        back = (residual @ v.T) * (hidden > 0)
        gradients = (x.T @ back, back.sum(0), hidden.T @ residual, residual.sum(0))
        w, a, v, b = (p - 0.5 * g for p, g in zip((w, a, v, b), gradients, strict=True))
    got = jax.jit(functools.partial(maml.adapt, **INNER))(float32(start), *float32((x, y)))
    for name, expected, value in zip(maml.Learner._fields, (w, a, v, b), got, strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5, err_msg=name)  # float32, values of order one


@pytest.mark.extras
@pytest.mark.parametrize("first_order", [False, True])
def test_the_meta_gradient_is_pytorchs(case, first_order):
    torch = pytest.importorskip("torch")
    start, x, y, q, q_y = case
    leaves = [torch.tensor(p, requires_grad=True) for p in start]
    learner = [leaves[0], leaves[1], leaves[2].repeat(1, C), leaves[3].repeat(C)]

    def loss(learner, x, y):
        w, a, v, b = learner
        logits = torch.relu(torch.tensor(x) @ w + a) @ v + b
        each = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(y), reduction="none")
        return each.sum(dim=1).mean()

    for _ in range(3):
        gradients = torch.autograd.grad(loss(learner, x, y), learner, create_graph=not first_order)
        learner = [p - 0.5 * g for p, g in zip(learner, gradients, strict=True)]
    loss(learner, q, q_y).backward()
    meta = functools.partial(maml.episode_loss, **INNER, first_order=first_order)
    got = jax.jit(jax.grad(meta))(float32(start), *float32((x, y, q, q_y)))
    for name, expected, value in zip(maml.Learner._fields, leaves, got, strict=True):
        np.testing.assert_allclose(value, expected.grad.numpy(), atol=2e-5, err_msg=name)  # float32 against float64


def test_first_and_second_order_differ(case):
    start, *episode = float32(case)
    one, two = (jax.grad(functools.partial(maml.episode_loss, **INNER, first_order=f))(start, *episode) for f in (1, 0))
    assert np.abs(one.embedding - two.embedding).max() > 1e-3
