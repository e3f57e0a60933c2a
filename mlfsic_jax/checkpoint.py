"""Checkpoints: the only file that knows Orbax."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mlfsic_jax import parallel
from mlfsic_jax.errors import InputError
from mlfsic_jax.files import write_json


class Checkpoints:
    """The two newest and the best checkpoint of one training run, written in the background.

    A step is committed by a rename once it is complete: a run killed while it writes still has the step before. Beside
    each committed step stand the checksums of its files, ``<step>.sha256.json``: Orbax itself restores a step with a
    flipped bit without a word.
    """

    def __init__(self, directory: str | Path, metric: str):
        """Opens or creates ``directory``; "best" means the highest ``metric`` among those given to ``save``.

        Steps whose files are not those that were written are reported, and put aside as ``damaged_<step>``.
        """
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every step
        self._directory = Path(directory).absolute()
        if parallel.is_first():
            self._put_damaged_aside()
        parallel.wait_for_all()
        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(2),
                preservation_policy.BestN(get_metric_fn=lambda metrics: metrics[metric], n=1),
            ]
        )
        self._manager = ocp.CheckpointManager(
            self._directory,
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
        self.wait()
        if not self._manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state)), metrics=metrics):
            raise InputError(f"step {step} already stands in {self._directory}: choose another workdir")

    def restore(self, step: int, like, partial: bool = False):
        """The pytree saved at ``step``, with the shapes and dtypes of ``like``; ``partial``: the parts it names."""
        # With an explicit sharding a checkpoint opens on any number of devices.
        sharding = jax.sharding.NamedSharding(parallel.mesh(), parallel.COPIED)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
        how = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(abstract, restore_args=how, partial_restore=partial))
        return self._manager.restore(step, args=args)["state"]

    def wait(self) -> None:
        """Returns when everything is on disk, with its checksums."""
        self._manager.wait_until_finished()
        if parallel.is_first():
            self._note_checksums()

    def close(self) -> None:
        """Waits, then frees the manager."""
        self.wait()
        self._manager.close()

    def _note_checksums(self) -> None:
        for path in self._directory.glob("*.sha256.json"):
            if not (self._directory / path.name.partition(".")[0]).is_dir():
                path.unlink()  # of a step that was not kept
        for step in _steps(self._directory):
            path = step.with_name(f"{step.name}.sha256.json")
            if not path.exists():
                write_json(path, _checksums(step))

    def _put_damaged_aside(self) -> None:
        for step in _steps(self._directory):
            path = step.with_name(f"{step.name}.sha256.json")
            # A run that was killed between commit and checksums has none for its last step.
            wrong = _wrong_file(step, path) if path.exists() else None
            if wrong is not None:
                aside = step.with_name(f"damaged_{step.name}")
                print(f"checkpoint {step} is damaged ({wrong} is not what was written): put aside as {aside.name}")
                os.replace(step, aside)
                path.unlink()


def _steps(directory: Path) -> list[Path]:
    """The folders of committed steps."""
    return sorted(path for path in directory.glob("*") if path.name.isdigit() and path.is_dir())


def _checksums(step: Path) -> dict[str, str]:
    files = sorted(path for path in step.rglob("*") if path.is_file())
    return {str(path.relative_to(step)): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wrong_file(step: Path, noted: Path) -> str | None:
    """The name of a file that is missing, new or changed, or None."""
    try:
        expected = json.loads(noted.read_text())
    except ValueError:
        return noted.name
    found = _checksums(step)
    return next((name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)), None)
