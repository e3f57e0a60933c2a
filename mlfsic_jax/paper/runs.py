"""The runs behind a table: one for every change of a config, each in a folder of its own."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from mlfsic_jax.data import usual_policy
from mlfsic_jax.methods import METHODS
from mlfsic_jax.run import experiment, inputs, sources
from mlfsic_jax.run.config import validate
from mlfsic_jax.run.workdir import episodes_file
from mlfsic_jax.system import parallel
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import read_arrays, write_arrays

METRICS = {"macro_ap": "Ma-AP", "micro_ap": "Mi-AP", "macro_f1": "Ma-F1", "micro_f1": "Mi-F1"}  # those of the papers
# Changes of these sections need no other training, unless LCM takes part in it.
_EVALUATION = ("lcm.", "ridge.", "eval.")
# Where things are kept, and the shots, which have a file each: no part of a file's content depends on them.
_NOT_COMPARED = ("workdir", "cache_dir", "data_dir", "shots", "data.source", "data.prepared_dir")

Values = dict[str, np.ndarray]  # metric -> float32 [E], one value for each novel episode


class Runs:
    """The runs of one config and its changes, in folders of ``root``; a finished one is not done again.

    ``untrained`` are methods that need no training by episodes: these are evaluated together, and nothing is trained.
    """

    def __init__(self, config: ConfigDict, root: Path, untrained: tuple[str, ...] = ()):
        self.config, self.root, self.untrained = config, root, untrained
        self._done: dict[tuple[Path, str], dict[int, Values] | InputError] = {}
        self._inputs: dict[Path, inputs.Inputs] = {}

    def changes(self, changes: Mapping) -> dict:
        """The changes without those that change nothing."""
        flat = _flat(self.config.to_dict())
        return {field: value for field, value in changes.items() if flat[field] != value}

    def changed(self, changes: Mapping) -> ConfigDict:
        """The config of a run; ``InputError`` when the changes do not fit."""
        config = self.config.copy_and_resolve_references()
        config.update_from_flattened_dict(dict(changes))
        config.train.episodes_per_step = config.train.episodes_per_step or jax.device_count()
        validate(config)
        return config

    def folder(self, changes: Mapping) -> Path:
        """Where a run is kept."""
        name = ",".join(f"{field}={value}" for field, value in self.changes(changes).items()) or "base"
        return self.root / re.sub(r"[^\w.,=-]", "_", name)

    def is_alone(self, method: str) -> bool:
        """Whether a method is evaluated without a run, since a run leaves it out or none is wanted."""
        name = method.partition("@")[0]
        if self.untrained:
            return True
        return METHODS[name].on_request and name not in self.config.eval.methods

    def values(self, changes: Mapping, method: str) -> dict[int, Values]:
        """Metrics of every novel episode, from the files of the run; what is missing is run first.

        ``method`` as in ``Row``. ``InputError`` when something that the run needs is missing or does not fit.
        """
        done = self._finished(self.changes(changes), method if self.is_alone(method) else "")
        if any(f"{method}.macro_ap" not in values for values in done.values()):
            raise InputError(f"config.eval.methods = {tuple(self.config.eval.methods)} leaves out {method}: add it")
        return {k: {m: values[f"{method}.{m}"] for m in METRICS} for k, values in done.items()}

    def _finished(self, changes: dict, alone: str) -> dict[int, Values]:
        key = (self.folder(changes), alone)
        if key not in self._done:  # another row of the table may want the same, or fail for the same reason
            try:
                self._done[key] = self._evaluate(changes, alone) if alone else self._run(changes)
            except InputError as error:
                self._done[key] = error
        if isinstance(self._done[key], InputError):
            raise self._done[key]
        return self._done[key]

    def _run(self, changes: dict) -> dict[int, Values]:
        config, folder = self.changed(changes), self.folder(changes)
        files = {k: episodes_file(folder, k) for k in config.shots}
        if any(read_values(path, config) is None for path in files.values()):
            workdir = self.folder(self._of_training(changes))
            experiment.train_and_evaluate(config, workdir, None if folder == workdir else folder)
        return {k: read_values(path, config) for k, path in files.items()}

    def _evaluate(self, changes: dict, name: str) -> dict[int, Values]:
        config, folder, found = self.changed(changes), self.folder(changes), {}
        for n_shot in config.shots:
            files = {n: folder / f"peer_{n}_{n_shot}shot.safetensors" for n in self.untrained or (name,)}
            found[n_shot] = read_values(files[name], config)
            if found[n_shot] is not None:
                continue
            trains_model = config.train_backbone or "episodes" in METHODS[name].stores
            if trains_model:
                self._finished(changes, "")
            if folder not in self._inputs:
                self._inputs[folder] = inputs.load(config)
            run, workdir = self._inputs[folder], self.folder(self._of_training(changes))
            variables = experiment.restore_best(config, run, n_shot, workdir) if trains_model else None
            values = experiment.evaluate_alone(config, run, n_shot, tuple(files), variables)
            of_method = {n: {k: v for k, v in values.items() if re.match(rf"{n}[.@]", k)} for n in files}
            found[n_shot] = of_method[name]
            if parallel.is_first():
                folder.mkdir(parents=True, exist_ok=True)
                for n, path in files.items():
                    write_arrays(path, of_method[n], sources.metadata(config))
        return found

    def _of_training(self, changes: dict) -> dict:
        """The changes that need another training."""
        if self.changed(changes).lcm.during_training:
            return changes
        return {field: value for field, value in changes.items() if not field.startswith(_EVALUATION)}


def read_values(path: Path, config: ConfigDict) -> Values | None:
    """The content of a file of episodes; None where there is none that was made with these settings and inputs."""
    try:
        arrays, metadata = read_arrays(path)
        same = _compared(json.loads(metadata["config"])) == _compared(json.loads(json.dumps(config.to_dict())))
    except (InputError, KeyError):  # one that is missing or damaged is made again
        return None
    return arrays if same and sources.agree(config, metadata.get(sources.KEY)) else None


def _compared(fields: dict) -> dict:
    compared = {name: value for name, value in _flat(fields).items() if name not in _NOT_COMPARED}
    return compared | {"data.policy": compared["data.policy"] or usual_policy(compared["data.name"])}


def _flat(fields: Mapping, prefix: str = "") -> dict:
    flat = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
