"""Training steps on episodes (paper section 4.4), scanned on the devices and mapped over them."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlfsic_jax.core.lcm import LCMOptions
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.data.features import View
from mlfsic_jax.methods.episodic import init
from mlfsic_jax.system import parallel


class TrainState(NamedTuple):
    """The content of a checkpoint."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any

    def variables(self) -> dict:
        """The argument of ``model.apply``."""
        return {"params": self.params, "batch_stats": self.batch_stats}


class Batch(NamedTuple):
    """The episodes of T training steps, see ``BaseModel.losses``; all arrays have leading axes [E, T]."""

    support: jax.Array
    query: jax.Array
    support_labels: jax.Array
    query_labels: jax.Array


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step descends on: L_cm + gamma L_query (eq 20)."""

    model: BaseModel  # batch norm averages over ``parallel.EPISODE_AXES``
    optimizer: optax.GradientTransformation
    gamma: float = 1.0  # weight of the query loss
    lcm: LCMOptions | None = None  # given, regions are selected during training too
    threshold: float = 0.53  # theta where ``lcm`` is given


def read_batch(view: View, support: np.ndarray, query: np.ndarray) -> Batch:
    """Reads the images int [E, T, S] and int [E, T, Q] of T training steps."""
    return Batch(view.inputs(support), view.inputs(query), view.labels[support], view.labels[query])


@functools.cache  # the same optimizer for the same run: its step is compiled once
def create_optimizer(
    learning_rate: float, warmup_steps: int, total_steps: int, schedule: str
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Adam with linear warm-up, then ``"cosine"`` to zero or ``"constant"``; the learning rate of update 1, 2, ..."""
    rate = optax.constant_schedule(learning_rate)
    if schedule == "cosine":
        rate = optax.cosine_decay_schedule(learning_rate, total_steps - warmup_steps)
    if warmup_steps:
        rate = optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup_steps), rate], [warmup_steps])

    def of_update(n):
        return rate(jnp.minimum(n, total_steps - 1))  # where a cosine ends at 0, the last update would do nothing

    return optax.adam(lambda count: of_update(count + 1)), of_update


def create_train_state(key, model: BaseModel, view: View, optimizer, pretrained=None) -> TrainState:
    """Fresh parameters for the shapes of a view, those of the backbone from published weights where given."""
    variables = init(model, key, view.inputs(np.zeros(1, int)), view.word_vectors)
    return initial_state(variables, optimizer, pretrained)


def initial_state(variables: dict, optimizer, pretrained=None) -> TrainState:
    """The state before the first step; ``pretrained`` takes the place of the backbone's variables."""
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    if pretrained is not None:
        pretrained = jax.tree.map(jnp.array, pretrained)  # a copy: the state is donated
        params = params | {"backbone": pretrained["params"]}
        batch_stats = {"backbone": pretrained["batch_stats"]} if "batch_stats" in pretrained else {}
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, jax.jit(optimizer.init)(params))


def train_steps(state: TrainState, key, batch: Batch, word_vectors, objective: Objective, *, shared: bool = True):
    """T updates, each averaged over the episodes of its step: (the new ``TrainState``, losses).

    Args:
      state: is donated.
      key: of the run's dropout and augmentation; the number of the episode in the run is folded in.
      batch: the episodes of T steps; where they are shared, those of this process.
      word_vectors: float32 [C, d_w].
      objective: defines the losses, which are averaged over all episodes of a step.
      shared: map the episodes, a multiple of the devices, over them; else every device computes all.

    Returns:
      (state, float32 [T, 2]): L_cm and L_query of each step.
    """
    if shared:
        batch = parallel.shard(batch)
    of_episodes = parallel.SHARDED if shared else parallel.REPLICATED
    specs = (parallel.REPLICATED, parallel.REPLICATED, of_episodes, parallel.REPLICATED)
    steps = parallel.pmapped(_steps, objective, shared, specs=specs, out_specs=parallel.REPLICATED, donate=(0,))
    return steps(state, key, batch, word_vectors)


def _steps(objective: Objective, shared: bool, state: TrainState, key, batch: Batch, word_vectors):
    def step(state, t):
        return _step(objective, shared, state, key, jax.tree.map(lambda x: x[:, t], batch), word_vectors)

    n_steps = batch.support.shape[1]
    if n_steps == 1:
        state, losses = step(state, 0)
        return state, losses[None]
    return jax.lax.scan(step, state, jnp.arange(n_steps))


def _step(objective: Objective, shared: bool, state: TrainState, key, batch: Batch, word_vectors):
    n_here = len(batch.support)
    n_all = n_here * (jax.lax.axis_size(parallel.AXIS) if shared else 1)
    first = state.step * n_all + (jax.lax.axis_index(parallel.AXIS) * n_here if shared else 0)

    def loss_fn(params):
        def losses(number, episode):
            dropout_key, augment_key = jax.random.split(jax.random.fold_in(key, number))
            (cm, query_loss), updates = objective.model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                *episode,
                word_vectors,
                lcm=objective.lcm,
                threshold=objective.threshold,
                rngs={"dropout": dropout_key, "augment": augment_key},
                mutable=["batch_stats"],
                method="losses",
            )
            return cm, query_loss, updates.get("batch_stats", {})

        results = jax.vmap(losses, axis_name=parallel.EPISODE_AXES[0])(first + jnp.arange(n_here), batch)
        cm, query_loss, batch_stats = jax.tree.map(lambda x: x.mean(axis=0), results)
        return cm + objective.gamma * query_loss, (cm, query_loss, batch_stats)

    results = jax.grad(loss_fn, has_aux=True)(state.params)
    grads, (cm, query_loss, batch_stats) = parallel.mean(results)
    updates, opt_state = objective.optimizer.update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, batch_stats, opt_state), jnp.stack([cm, query_loss])
