"""The folder of a run: its lock, what was trained there, and its log."""

import contextlib
import importlib.metadata
import json
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from mlfsic_jax import __version__
from mlfsic_jax.data.prepared import digest
from mlfsic_jax.run.config import default
from mlfsic_jax.system import parallel
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import atomic, lock, write_json
from mlfsic_jax.system.untrusted import expand, read_json


def episodes_file(workdir: Path, n_shot: int) -> Path:
    """The file with the metrics of every novel episode, {"method.metric": float32 [E]}; its metadata: "config"."""
    return workdir / f"episodes_{n_shot}shot.safetensors"


@contextlib.contextmanager
def open_workdir(workdir: str | Path) -> Iterator[Path]:
    """``InputError``, before anything is computed, where results cannot be written or another run writes."""
    workdir = expand(workdir)
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / "metrics.jsonl").touch()
            if parallel.is_first():
                refusal = f"another run has the workdir {workdir}: wait for its end, or choose another workdir"
                stack.enter_context(lock(workdir / ".lock", refusal=refusal))
        except OSError as error:
            raise InputError(f"cannot write to the workdir {workdir}: {error.strerror}") from None
        yield workdir


def claim(workdir: Path, config: ConfigDict, settings: dict) -> None:
    """Notes in the workdir what is trained there: ``settings``, and all that concerns photos.

    ``InputError``, naming the fields that differ, when something else was trained there.
    """
    fields, path = config.to_dict(), workdir / "trained_with.json"
    data_fields = {k: v for k, v in fields["data"].items() if k not in ("source", "prepared_dir", "split")}
    wanted = {name: fields[name] for name in ("seed", "backbone", "augment")} | {"data": data_fields} | settings
    wanted = json.loads(json.dumps(wanted))
    # A run that ended before anything was trained holds nothing to lose.
    trained = any(any(workdir.glob(pattern)) for pattern in ("checkpoints*/*", "results.json", "*.safetensors"))
    if parallel.is_first() and not (path.exists() and trained):
        write_json(path, wanted)
    parallel.wait_for_all()
    try:
        found = dict(read_json(path))
    except (ValueError, TypeError):
        raise InputError(f"{path} is damaged: choose another workdir") from None
    for name, section in default().to_dict().items():  # fields that came later had their defaults there
        if isinstance(section, dict) and isinstance(found.get(name), dict):
            found[name] = {k: v for k, v in section.items() if k in wanted[name]} | found[name]
    if found != wanted:
        differ = ", ".join(f"{k} (there {_short(a)}, now {_short(b)})" for k, a, b in _differences(found, wanted))
        raise InputError(f"{workdir} holds a run with other settings, {differ}: choose another workdir")


def _short(value) -> str:
    """A setting; of a hash the first digits."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1..", str(value))


def _differences(a, b, prefix=""):
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from _differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
    elif a != b:
        yield prefix, a, b


def provenance(identity: dict[str, str]) -> dict:
    """Where results come from besides the config: code, packages, devices, and hashes of data, weights and words."""
    package = Path(__file__).parents[1]
    sources = [path for path in package.rglob("*") if path.suffix in (".py", ".json")]
    sources = sorted(path for path in sources if path.parent.name != "configs")  # which are there in a wheel only
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "pillow")
    return {
        "mlfsic_jax": {"version": __version__, "sha256": digest(sources)},
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in names},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} processes",
        "inputs": identity,
    }


class MetricsLog:
    """``metrics.jsonl``: one line per validation, without those that a resumed run will write again.

    The same numbers go to ``tensorboard/`` beside it.
    """

    def __init__(self, path: Path, run: dict, after_step: int):
        """``run`` stands at the start of every line and tells this run's lines from the others'."""
        self._path, self._run = path, run
        if parallel.is_first():
            lines = path.read_text(errors="replace").splitlines() if path.exists() else []
            whole = [(metrics, run.items() <= metrics.items()) for metrics in map(_whole, lines) if metrics]
            kept = [(metrics, mine) for metrics, mine in whole if not mine or metrics["step"] <= after_step]
            self._mine = [metrics for metrics, mine in kept if mine]
            with atomic(path) as part:
                part.write_text("".join(json.dumps(metrics) + "\n" for metrics, _ in kept))

    def write(self, metrics: dict) -> None:
        if parallel.is_first():
            with self._path.open("a") as file:
                file.write(json.dumps(self._run | metrics) + "\n")
            self._mine.append(metrics)
            name = "-".join(f"{key}={value}" for key, value in self._run.items())
            scalars_to_tensorboard(self._mine, self._path.parent / "tensorboard" / name, without=tuple(self._run))


def scalars_to_tensorboard(metrics: list[dict], folder: Path, without: tuple[str, ...] = ()) -> None:
    """Writes lines of ``metrics.jsonl`` for TensorBoard, in place of what the folder held: no step stands twice."""
    from tensorboardX import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for line in metrics:
            for name, value in line.items():
                if name not in ("step", *without):
                    writer.add_scalar(name, value, line["step"])


def _whole(line: str) -> dict | None:
    """The metrics of a line, or None where the run was killed while it wrote it."""
    with contextlib.suppress(ValueError, RecursionError):
        metrics = json.loads(line)
        if isinstance(metrics, dict) and isinstance(metrics.get("step"), int):
            return metrics
    return None
