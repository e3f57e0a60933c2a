"""Checkpoints: the only file that knows Orbax."""

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mlfsic_jax.system import parallel
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import sha256, write_json
from mlfsic_jax.system.untrusted import read_json

_CHECKSUMS, _TO_DELETE = "sha256.json", "to_delete"
_WRITTEN_LATER = (_CHECKSUMS, "_CHECKPOINT_METADATA", "commit_success.txt")  # by Orbax, at the commit


class Checkpoints:
    """The two newest and the best checkpoint of one training run, written in the background.

    A step is committed by a rename once it is complete: a run killed while it writes still has the step before. It
    comes with the checksums of its files, ``sha256.json``: Orbax itself restores a flipped bit without a word.
    """

    def __init__(self, directory: str | Path, metric: str):
        """Opens or creates ``directory``; the best step is that with the highest ``metric`` given to ``save``.

        Steps whose files are not those that were written are reported, and put aside as ``damaged_<step>``.
        """
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every step
        self.directory, self._metric = Path(directory).absolute(), metric
        self._saving: int | None = None
        if parallel.is_first():
            self._put_damaged_aside()
        parallel.wait_for_all()

        def value(metrics: dict) -> float:
            return metrics.get(metric, -math.inf)

        kept = [preservation_policy.LatestN(2), preservation_policy.BestN(get_metric_fn=value, n=1)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
            best_fn=value,
            best_mode="max",
            todelete_subdir=_TO_DELETE,  # by a rename: a step that is half deleted would look damaged
            async_options=ocp.AsyncOptions(post_finalization_callback=self._note_checksums),
        )
        # Trained weights hardly compress, and trying takes longer than a training step.
        handlers = {"state": ocp.PyTreeCheckpointHandler(use_compression=False)}
        self._manager = ocp.CheckpointManager(self.directory, item_handlers=handlers, options=options)

    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the best metric, or None."""
        step = self._manager.best_step()
        return None if step is None or self._metric not in self.metrics(step) else step

    def metrics(self, step: int) -> dict:
        """Those given to ``save`` for ``step``."""
        return dict(self._manager.metrics(step))

    def save(self, step: int, state, metrics: dict) -> None:
        """Writes a pytree of arrays; returns before the disk is done. Without its metric the step is never the best.

        ``InputError`` when this step or the one before cannot be written; those that stand there are kept.
        """
        self.wait()
        self._saving = step
        needs = 1.2 * sum(x.nbytes for x in jax.tree.leaves(state)) + 1e6  # where a disk is full, TensorStore is noisy
        free = shutil.disk_usage(self.directory).free
        if parallel.is_first() and free < needs:
            raise self._cannot_write(f"it needs {needs / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB")
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state))
        with self._clear_errors():
            saved = self._manager.save(step, args=args, metrics=metrics)
        if not saved:
            raise InputError(f"step {step} already stands in {self.directory}: choose another workdir")

    def restore(self, step: int, like, partial: bool = False):
        """The pytree saved at ``step``, with the shapes and dtypes of ``like``; ``partial``: the parts it names."""
        # With an explicit sharding a checkpoint opens on any number of devices.
        sharding = jax.sharding.NamedSharding(parallel.mesh(), parallel.REPLICATED)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
        how = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(abstract, restore_args=how, partial_restore=partial))
        return self._manager.restore(step, args=args)["state"]

    def wait(self) -> None:
        """Returns when everything is on disk; ``InputError`` when the last step cannot be written."""
        with self._clear_errors():
            self._manager.wait_until_finished()
        if parallel.is_first():
            shutil.rmtree(self.directory / _TO_DELETE, ignore_errors=True)

    def close(self) -> None:
        """Waits, then frees the manager."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a full disk, TensorStore, Orbax and the file system each have their own
            raise self._cannot_write(" ".join(str(error).split())[-200:]) from error

    def _cannot_write(self, reason: str) -> InputError:
        what = f"the checkpoint of step {self._saving} cannot be written to {self.directory} ({reason})"
        return InputError(f"{what}: free space there; the same command goes on from the checkpoint before")

    def _note_checksums(self) -> None:
        """Called by Orbax when a step is complete, before its folder gets its name."""
        if parallel.is_first():
            (folder,) = self.directory.glob(f"{self._saving}.*tmp*")
            write_json(folder / _CHECKSUMS, _checksums(folder))

    def _put_damaged_aside(self) -> None:
        for step in sorted(path for path in self.directory.glob("*") if path.name.isdigit() and path.is_dir()):
            if wrong := _wrong_file(step):
                aside = step.with_name(f"damaged_{step.name}")
                print(f"checkpoint {step} is damaged ({wrong} is not what was written): put aside as {aside.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(step, aside)


def _checksums(step: Path) -> dict[str, str]:
    files = {str(path.relative_to(step)): path for path in sorted(step.rglob("*")) if path.is_file()}
    return {name: sha256(path) for name, path in files.items() if name not in _WRITTEN_LATER}


def _wrong_file(step: Path) -> str | None:
    """The name of a file that is missing, new or changed, or None."""
    try:
        expected, found = read_json(step / _CHECKSUMS), _checksums(step)
        return next((name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)), None)
    except (OSError, ValueError, TypeError, AttributeError):
        return _CHECKSUMS
