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
    """Maps local features of images a batch at a time: int [I], (float32 [B, L, n] -> [B, ...]) -> [I, ...]."""
    rows, parts = np.asarray(rows), []
    for start in range(0, len(rows), _READ):
        regions = np.asarray(base.inputs(rows[start : start + _READ]), np.float32)
        parts.append(fn(regions.reshape(len(regions), -1, regions.shape[-1])))
    return np.concatenate(parts)


def some_regions(base: View, rows) -> np.ndarray:
    """Local features of up to 512 images, spread evenly over ``rows``, int [I]: float32 [<= 512, L, n]."""
    return map_regions(base, rows[np.unique(np.linspace(0, len(rows) - 1, 512).astype(int))], lambda regions: regions)


def pooled_features(base: View) -> np.ndarray:
    """Local features of a view, averaged over positions: float32 [I, n]."""
    return map_regions(base, np.arange(len(base.labels)), lambda regions: regions.mean(axis=1))


def mean_feature(pooled) -> np.ndarray:
    """Mean of features float32 [I, n], summed in float64: float32 [n]."""
    return pooled.mean(axis=0, dtype=np.float64).astype(np.float32)


def adam(loss: Callable, params, batches, *, learning_rate: float, opt_state=None) -> tuple[Any, Any]:
    """One step of Adam per batch; traceable.

    ``loss`` takes (params, batch); ``batches`` is a pytree of arrays whose first axis is the step; ``opt_state``
    continues earlier steps. Returns (params, opt_state) after the last step.
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
    """Parameters after ``adam`` on many batches, ``chunk`` of them in one program, with a progress bar.

    ``loss`` takes (params, data, batch), where all steps share ``data``, a pytree of arrays; ``draw`` makes a chunk's
    batches from its number. ``steps`` are rounded up to whole chunks.
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
