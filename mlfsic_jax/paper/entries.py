"""The numbers of a table, row by row: ours, the published ones, and differences on the same episodes."""

import csv
import io
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlfsic_jax.core.metrics import bootstrap_ci95, mean_and_ci95
from mlfsic_jax.data import usual_policy
from mlfsic_jax.paper.runs import METRICS, Runs, Values
from mlfsic_jax.paper.tables import Row, Table, published

_COLUMNS = (
    *("table", "row", "n_shot", "metric", "ours", "interval", "interval_of", "published", "published_sd"),
    *("published_in", "difference", "against", "paired", "low", "high", "distinguishable", "published_paired"),
    *("reason", "command"),
)


class Line(NamedTuple):
    """A row that was run.

    Attributes:
      row: the row.
      values: n_shot -> the values of each of its runs; empty where it was not run.
      reason: why it was not run, else "".
    """

    row: Row
    values: dict[int, list[Values]]
    reason: str = ""


class Made(NamedTuple):
    """A table that was run.

    Attributes:
      name: of ``TABLES``.
      table: the table.
      runs: its runs.
      given: the flags that the config comes from.
      lines: its rows.
    """

    name: str
    table: Table
    runs: Runs
    given: Sequence[str]
    lines: list[Line]

    def command(self) -> str:
        """The command that makes the table."""
        flags = [f"--table={self.name}", *self.given, f"--workdir={self.runs.root}"]
        return shlex.join(["python", "-m", "mlfsic_jax.reproduce", *flags])

    def row_command(self, row: Row) -> str:
        """The commands of a row's runs, one a line; the table's where they are not enough; "" where nothing is run."""
        if not row.method or self.runs.is_alone(row.method):
            return self.command() if row.method else ""
        commands = []
        for changes in map(self.runs.changes, row.runs):
            kept = [flag for flag in self.given if not any(flag.startswith(f"--config.{f}=") for f in changes)]
            changed = [f"--config.{field}={value}" for field, value in changes.items()]
            workdir = f"--workdir={self.runs.folder(changes)}"
            commands.append(shlex.join(["python", "-m", "mlfsic_jax.main", *kept, *changed, workdir]))
        return "\n".join(commands)


def entries(made: Made) -> Iterator[dict[str, Any]]:
    """What the CSV file holds: one entry for each row, shot count and metric, in percent."""
    lines = {line.row.name: line for line in made.lines}
    for line in made.lines:
        command, reference = made.row_command(line.row), lines.get(line.row.against)
        for n_shot in made.runs.config.shots:
            for metric in METRICS:
                names = {"table": made.name, "row": line.row.name, "n_shot": n_shot, "metric": metric}
                numbers = _numbers(made.runs.config.data, line, reference, n_shot, metric)
                yield dict.fromkeys(_COLUMNS) | names | numbers | {"reason": line.reason, "command": command}


def as_csv(entries: Sequence[Mapping]) -> str:
    """Entries as a CSV file with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(entries[0]), lineterminator="\n")
    writer.writeheader()
    for entry in entries:
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in entry.items()})
    return out.getvalue()


def _numbers(data, line: Line, reference: Line | None, n_shot: int, metric: str) -> dict[str, Any]:
    found, paper = {}, published(line.row.published, n_shot) or {}
    if metric in paper:
        where = f"table {paper['table']}" if isinstance(paper["table"], int) else paper["table"]
        found = {"published": paper[metric], "published_in": f"{paper['paper']}, {where}"}
        found["published_sd"] = paper.get("sd") if metric == "macro_ap" else None
        of_reference = reference and published(reference.row.published, n_shot)
        if of_reference and metric in of_reference:
            found["published_paired"] = paper[metric] - of_reference[metric]
    if not line.values:
        return found
    of_runs = [100 * run[metric].astype(np.float64) for run in line.values[n_shot]]
    found |= _ours(of_runs)
    if metric in paper and _is_same_setting(data, paper):
        found["difference"] = found["ours"] - paper[metric]
    if reference is not None and reference.values:
        others = [100 * run[metric].astype(np.float64) for run in reference.values[n_shot]]
        differences = [ours - other for ours, other in zip(of_runs, others, strict=True)]
        found |= {"against": line.row.against} | _paired(differences)
    return found


def _ours(of_runs: list[np.ndarray]) -> dict[str, Any]:
    if len(of_runs) == 1:
        of_episodes = mean_and_ci95(of_runs[0])
        return {"ours": of_episodes["mean"], "interval": of_episodes["ci95"], "interval_of": "95 % over episodes"}
    means = np.array([of_run.mean() for of_run in of_runs])
    return {"ours": means.mean(), "interval": means.std(ddof=1), "interval_of": "sd over seeds"}


def _paired(differences: list[np.ndarray]) -> dict[str, Any]:
    # Several runs give one difference each: the question is whether another run would agree.
    units = np.array([d.mean() for d in differences]) if len(differences) > 1 else differences[0]
    paired = bootstrap_ci95(units)
    low, high = paired["low"], paired["high"]
    return {"paired": paired["mean"], "low": low, "high": high, "distinguishable": not low <= 0 <= high}


def _is_same_setting(data, paper: Mapping) -> bool:
    """Whether the data section of a config is that of a published row: only then a difference means something."""
    usual = usual_policy(data.name)
    ours = (data.name, data.policy or usual, data.split)
    return ours == (paper["dataset"], paper.get("policy", usual), paper.get("split", ""))
