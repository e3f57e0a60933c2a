"""One training step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.data.features import View
from mlfsic_jax.run.step import Batch, Objective, create_optimizer, create_train_state, train_steps


def test_schedule_warms_up_then_decays():
    _, schedule = create_optimizer(0.5, 10, 50, "cosine")
    np.testing.assert_allclose([schedule(i) for i in (1, 5, 10)], [0.05, 0.25, 0.5], rtol=1e-6)
    np.testing.assert_allclose(schedule(30), 0.25, rtol=1e-6)  # half a cosine
    last = 0.25 * (1 + np.cos(np.pi * 39 / 40))  # the last update has the rate before the cosine's zero
    np.testing.assert_allclose([schedule(49), schedule(50)], last, rtol=1e-4)  # float32 of 1 - 0.997


def test_every_update_changes_the_parameters():
    optimizer, _ = create_optimizer(0.5, 1, 3, "cosine")
    params, gradient = jnp.zeros(1), jnp.ones(1)
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(gradient, state, params)
        assert abs(updates[0]) > 1e-3


def test_a_constant_learning_rate_stays():
    _, schedule = create_optimizer(0.5, 10, 50, "constant")
    np.testing.assert_allclose([schedule(i) for i in (10, 50)], 0.5)


def test_train_step_is_adam_on_the_mean_loss_of_its_episodes():
    rng = np.random.default_rng(0)
    model = BaseModel(d_joint=4, n_heads=2, d_dynamic=5, n_dynamic=2, dropout=0.0)
    batch = Batch(
        *(rng.random((2, n, 1, 2, 3)).astype(np.float32) for n in (3, 4)),
        *(rng.random((2, n, 2)) < 0.7 for n in (3, 4)),
    )
    words = rng.normal(size=(2, 5)).astype(np.float32)
    split = View(lambda rows: batch.support[0, rows], batch.support_labels[0], words, ("a", "b"))
    optimizer = optax.adam(0.1)
    state = create_train_state(jax.random.key(0), model, split, optimizer)

    def loss(params):  # one episode after the other
        losses = []
        for episode in zip(*batch, strict=True):
            noise = {"dropout": jax.random.key(0)}
            cm, query = model.apply({"params": params}, *episode, words, method="losses", rngs=noise)
            losses.append(cm + 3.0 * query)
        return sum(losses) / 2

    # Adam's first step is lr * g / (|g| + eps).
    before = jax.device_get(state.params)
    total, gradient = jax.jit(jax.value_and_grad(loss))(before)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g / (jnp.abs(g) + 1e-8), before, gradient)
    objective = Objective(model, optimizer, gamma=3.0)
    batch = jax.tree.map(lambda x: x[:, None], batch)  # one step
    new, ((cm, query),) = train_steps(state, jax.random.key(1), batch, words, objective)
    np.testing.assert_allclose(cm + 3.0 * query, total, rtol=1e-5)
    # float32; where a gradient is about zero its sign may be lost
    close = jax.tree.map(lambda a, b: float(np.isclose(a, b, atol=1e-4).mean()), new.params, expected)
    assert min(jax.tree.leaves(close)) > 0.95
    assert int(new.step) == 1


def test_steps_in_one_call_are_steps_one_by_one():
    """With dropout, which follows the number of the episode."""
    rng = np.random.default_rng(0)
    model = BaseModel(d_joint=4, n_heads=2, d_dynamic=5, n_dynamic=2, dropout=0.5)
    steps = Batch(
        *(rng.random((2, 3, n, 1, 2, 3)).astype(np.float32) for n in (3, 4)),
        *(rng.random((2, 3, n, 2)) < 0.7 for n in (3, 4)),
    )
    words = rng.normal(size=(2, 5)).astype(np.float32)
    split = View(lambda rows: steps.support[0, 0, rows], steps.support_labels[0, 0], words, ("a", "b"))
    objective, key = Objective(model, optax.adam(0.01)), jax.random.key(1)
    new = {name: create_train_state(jax.random.key(0), model, split, objective.optimizer) for name in ("one", "all")}
    new["all"], expected = train_steps(new["all"], key, steps, words, objective)
    losses = []
    for t in range(3):
        one = Batch(*(x[:, t : t + 1] for x in steps))
        new["one"], loss = train_steps(new["one"], key, one, words, objective)
        losses.append(loss[0])
    assert expected.shape == (3, 2) and int(new["all"].step) == 3
    np.testing.assert_allclose(expected, losses, rtol=1e-5)  # float32, another program
    # where a gradient is about zero its sign, and with it a step of Adam, may differ
    close = jax.tree.map(lambda a, b: float(np.isclose(a, b, atol=1e-4).mean()), new["all"].params, new["one"].params)
    assert min(jax.tree.leaves(close)) > 0.95
