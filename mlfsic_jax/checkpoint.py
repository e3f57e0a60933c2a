"""Checkpoints: the only file that knows Orbax."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mlfsic_jax import parallel
from mlfsic_jax.errors import InputError


class Checkpoints:
    """The newest and the best checkpoint of one training run, written in the background.

    A step is committed by a rename once it is complete: a run killed while it writes still has the step before.
    """

    def __init__(self, directory: str | Path, metric: str):
        """Opens or creates ``directory``; "best" means the highest ``metric`` among those given to ``save``."""
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every step
        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(1),
                preservation_policy.BestN(get_metric_fn=lambda metrics: metrics[metric], n=1),
            ]
        )
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            # Trained weights hardly compress, and trying takes longer than a training step.
            item_handlers={"state": ocp.PyTreeCheckpointHandler(use_compression=False)},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, best_fn=lambda metrics: metrics[metric], best_mode="max"
            ),
        )

    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the best metric, or None."""
        return self._manager.best_step()

    def metrics(self, step: int) -> dict:
        """What ``save`` was given for ``step``."""
        return dict(self._manager.metrics(step))

    def save(self, step: int, state, metrics: dict[str, float]) -> None:
        """Writes a pytree of arrays; returns before the disk is done."""
        if not self._manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state)), metrics=metrics):
            raise InputError(f"step {step} already stands in {self._manager.directory}: choose another workdir")

    def restore(self, step: int, like, partial: bool = False):
        """The pytree saved at ``step``, with the shapes and dtypes of ``like``; ``partial``: the parts it names."""
        # With an explicit sharding a checkpoint opens on any number of devices.
        sharding = jax.sharding.NamedSharding(parallel.mesh(), parallel.COPIED)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
        how = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(abstract, restore_args=how, partial_restore=partial))
        return self._manager.restore(step, args=args)["state"]

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the manager."""
        self._manager.wait_until_finished()
        self._manager.close()
