"""Shared by methods that train: local features in batches, and Adam with many steps in one program."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from mlfsic_jax.system.progress import track

if TYPE_CHECKING:
    from mlfsic_jax.data.features import View

_READ = 64


def map_regions(base: View, rows, fn: Callable) -> np.ndarray:
    """Maps local features of images, a batch at a time.

    Args:
      base: a view whose inputs are local features.
      rows: int [I], which images.
      fn: float32 [B, L, n] -> array [B, ...].

    Returns:
      The results for all rows, [I, ...].
    """
    rows, parts = np.asarray(rows), []
    for start in range(0, len(rows), _READ):
        regions = np.asarray(base.inputs(rows[start : start + _READ]), np.float32)
        parts.append(fn(regions.reshape(len(regions), -1, regions.shape[-1])))
    return np.concatenate(parts)


def pooled_features(base: View) -> np.ndarray:
    """Local features of a view, averaged over positions: float32 [I, n]."""
    return map_regions(base, np.arange(len(base.labels)), lambda regions: regions.mean(axis=1))


def mean_feature(pooled) -> np.ndarray:
    """Mean of features float32 [I, n], summed in float64: float32 [n]."""
    return pooled.mean(axis=0, dtype=np.float64).astype(np.float32)


def adam(loss: Callable, params, batches, *, learning_rate: float, opt_state=None) -> tuple[Any, Any]:
    """One step of Adam per batch; traceable.

    Args:
      loss: (params, batch) -> scalar.
      params: where to start, a pytree of arrays.
      batches: a pytree of arrays whose first axis is the step.
      learning_rate: of Adam.
      opt_state: of earlier steps, to continue them.

    Returns:
      (params, opt_state) after the last step.
    """
    optimizer = optax.adam(learning_rate)

    def step(state, batch):
        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(loss)(params, batch), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, optimizer.init(params) if opt_state is None else opt_state), batches)[0]


def adam_in_chunks(
    loss: Callable, params, data, draw: Callable, *, steps: int, chunk: int, learning_rate: float, description: str
):
    """``adam`` on many batches, a chunk of them in one program, with a progress bar.

    Args:
      loss: (params, data, batch) -> scalar.
      params: where to start, a pytree of arrays.
      data: a pytree of arrays that all steps share.
      draw: chunk number -> its batches, see ``adam``.
      steps: how many; rounded up to whole chunks.
      chunk: steps in one program.
      learning_rate: of Adam.
      description: what is trained, for the progress bar.

    Returns:
      params after the last step.
    """

    @jax.jit
    def run(params, opt_state, data, batches):
        def on_data(params, batch):
            return loss(params, data, batch)

        return adam(on_data, params, batches, learning_rate=learning_rate, opt_state=opt_state)

    opt_state, n_chunks = jax.jit(optax.adam(learning_rate).init)(params), -(-steps // chunk)
    for number in track(range(n_chunks), total=n_chunks, description=description, unit=f"x {chunk} steps"):
        params, opt_state = run(params, opt_state, data, draw(number))
    return params
