"""Epochs of steps and validations, resumable between any two calls of the device."""

import abc
import itertools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from mlfsic_jax.run.checkpoint import Checkpoints
from mlfsic_jax.run.step import TrainState
from mlfsic_jax.run.workdir import MetricsLog
from mlfsic_jax.system import parallel
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.progress import track


class Stage(abc.ABC):
    """One training: what its steps and validations are."""

    name: str  # what is trained, for messages
    labels: dict  # tell this training's lines in the log from others'
    epochs: int  # how many
    per_epoch: int  # steps
    validate_every: int = 1  # epochs; the last one is validated anyway

    @abc.abstractmethod
    def batches(self, epoch: int, first: int) -> Iterator[Any]:
        """Batches for the epoch's steps from number ``first`` on; of one or several steps each."""

    @abc.abstractmethod
    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
        """(the state after the steps of a batch, their losses: float [T, ...])."""

    @abc.abstractmethod
    def validate(self, state: TrainState, done: int, losses: np.ndarray) -> dict[str, float]:
        """Metrics after ``done`` steps; losses [steps since the last validation, ...]."""

    @abc.abstractmethod
    def drawn_with(self, epoch: int, number: int) -> str:
        """How to draw the data of an epoch's step again, for a message."""


def run(stage: Stage, state: TrainState, checkpoints: Checkpoints, log_file: Path) -> tuple[dict, TrainState]:
    """Runs a stage from its last checkpoint to the last epoch: (the best step's metrics, its state).

    Each validation writes a line to ``log_file`` and a checkpoint. SIGTERM or SIGINT writes a checkpoint after the
    steps under way and raises ``KeyboardInterrupt``.

    Raises:
      InputError: a loss or a parameter is not finite, or a checkpoint cannot be written.
    """
    return _Loop(stage, state, checkpoints, log_file).run()


class _Loop:
    """Where a running stage stands."""

    def __init__(self, stage: Stage, state: TrainState, checkpoints: Checkpoints, log_file: Path):
        self._stage, self._state, self._checkpoints = stage, state, checkpoints
        self.done, self.losses = 0, []  # steps; their losses since the last validation, [T, ...] for each batch
        latest = checkpoints.latest()
        if latest is not None:
            self._state, self.done = checkpoints.restore(latest, state), latest
            if losses := checkpoints.metrics(latest).get("losses"):  # of a checkpoint between two validations
                self.losses = [np.asarray(losses, np.float32)]
            epoch, step = divmod(self.done, stage.per_epoch)
            at = f", step {step} of {stage.per_epoch}" if step else ""
            print(f"{stage.name}: continuing at epoch {epoch} of {stage.epochs}{at}", flush=True)
        self._log = MetricsLog(log_file, stage.labels, after_step=self.done)

    def run(self) -> tuple[dict, TrainState]:
        stage = self._stage
        remaining = range(self.done // stage.per_epoch, stage.epochs)
        note = f"stopping: writing a checkpoint after the steps under way of {stage.name} training"
        progress = track(remaining, total=len(remaining), description=f"training, {stage.name}", unit="epochs")
        with parallel.stop_requests(note) as asked_to_stop:
            for epoch in progress:
                validates = epoch + 1 == stage.epochs or (epoch + 1) % stage.validate_every == 0
                stopping = self._epoch(epoch, validates, asked_to_stop)
                if validates:
                    self._validate(epoch, stopping)
        checkpoints = self._checkpoints
        checkpoints.wait()
        if (best := checkpoints.best()) != self.done:
            self._state = checkpoints.restore(best, self._state)
        metrics = checkpoints.metrics(best)
        checkpoints.close()
        return metrics, self._state

    def _epoch(self, epoch: int, validates: bool, asked_to_stop) -> bool:
        """The epoch's remaining steps; whether to stop after the validation that follows."""
        stopping = False
        for batch in self._stage.batches(epoch, self.done % self._stage.per_epoch):
            self._state, losses = self._stage.step(self._state, batch)
            self.losses.append(losses)
            self.done += len(losses)
            # Two batches under way at most: each holds its photos or features.
            self._require_finite(self.losses[-2:][:1], self.done - sum(map(len, self.losses[-2:])))
            stopping = asked_to_stop(self.done)
            if stopping and not (validates and self.done % self._stage.per_epoch == 0):
                self._require_all_finite()
                self._save({"losses": self._all_losses().tolist()}, stopping)
        return stopping

    def _validate(self, epoch: int, stopping: bool) -> None:
        self._require_all_finite()
        found = self._stage.validate(self._state, self.done, self._all_losses())
        metrics = {"epoch": epoch + 1, "step": self.done, **found}
        self.losses = []
        self._log.write(metrics)
        self._save(metrics, stopping)

    def _save(self, metrics: dict, stopping: bool) -> None:
        self._checkpoints.save(self.done, self._state, metrics)
        if stopping:
            self._checkpoints.close()
            raise KeyboardInterrupt(signal.SIGTERM)

    def _all_losses(self) -> np.ndarray:
        return np.concatenate(jax.device_get(self.losses))

    def _require_all_finite(self) -> None:
        self._require_finite(self.losses, self.done - sum(map(len, self.losses)))
        if not _all_finite(self._state):
            self._fail(f"the parameters after step {self.done} are not finite")

    def _require_finite(self, losses: list, first: int) -> None:
        """``losses`` are those of the steps from ``first`` on, counted from 0."""
        for number, value in enumerate(itertools.chain.from_iterable(jax.device_get(losses)), first):
            if not np.isfinite(value).all():
                epoch, in_epoch = divmod(number, self._stage.per_epoch)
                shown, how = ", ".join(map(str, np.ravel(value))), self._stage.drawn_with(epoch, in_epoch)
                self._fail(f"the loss of step {number + 1} is {shown} (epoch {epoch + 1}; {how})")

    def _fail(self, what: str) -> NoReturn:
        checkpoints = self._checkpoints
        checkpoints.wait()
        good = checkpoints.latest()
        kept = "no checkpoint was written yet" if good is None else f"the last good checkpoint is that of step {good}"
        checkpoints.close()
        hint = "Lower the learning rate or look at these photos, and start in another workdir"
        raise InputError(f"{self._stage.name}: {what}; {kept} in {checkpoints.directory}. {hint}")


@jax.jit
def _all_finite(state: TrainState) -> jax.Array:
    leaves = jax.tree.leaves((state.params, state.batch_stats))
    return jnp.array([jnp.isfinite(x).all() for x in leaves]).all()
