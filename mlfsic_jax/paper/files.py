"""The files of a table: its numbers as CSV, a page of Markdown, a picture."""

import csv
import io
import itertools
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
_INK, _MUTED, _GRID, _OURS, _PUBLISHED = "#1d2125", "#68707c", "#dfe3e8", "#1668c4", "#c2570c"


class Line(NamedTuple):
    """A row that was run."""

    row: Row
    values: dict[int, list[Values]]  # n_shot -> the values of each of its runs; empty where it was not run
    reason: str = ""  # why it was not run


class Made(NamedTuple):
    """A table that was run."""

    name: str  # of TABLES
    table: Table
    runs: Runs
    given: Sequence[str]  # the flags that the config comes from
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
        for n_shot, metric in itertools.product(made.runs.config.shots, METRICS):
            names = {"table": made.name, "row": line.row.name, "n_shot": n_shot, "metric": metric}
            numbers = _numbers(made, line, reference, n_shot, metric)
            yield dict.fromkeys(_COLUMNS) | names | numbers | {"reason": line.reason, "command": command}


def as_csv(entries: Sequence[Mapping]) -> str:
    """Entries as a CSV file with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in entry.items()} for entry in entries)
    return out.getvalue()


def _numbers(made: Made, line: Line, reference: Line | None, n_shot: int, metric: str) -> dict[str, Any]:
    data, found, paper = made.runs.config.data, {}, published(line.row.published, n_shot) or {}
    if metric in paper:
        where = f"table {paper['table']}" if isinstance(paper["table"], int) else paper["table"]
        found = {"published": paper[metric], "published_in": f"{paper['paper']}, {where}"}
        found["published_sd"] = paper.get("sd") if metric == "macro_ap" else None
        of_reference = reference and published(reference.row.published, n_shot)
        if of_reference and metric in of_reference:
            found["published_paired"] = paper[metric] - of_reference[metric]
    if not line.values:
        return found

    def percent(line: Line) -> list[np.ndarray]:
        return [100 * run[metric].astype(np.float64) for run in line.values[n_shot]]

    ours = percent(line)
    if len(ours) == 1:
        of_episodes = mean_and_ci95(ours[0])
        found |= {"ours": of_episodes["mean"], "interval": of_episodes["ci95"], "interval_of": "95 % over episodes"}
    else:
        means = np.array([run.mean() for run in ours])
        found |= {"ours": means.mean(), "interval": means.std(ddof=1), "interval_of": f"sd over {made.table.over}"}
    usual = usual_policy(data.name)
    setting = (paper.get("dataset"), paper.get("policy", usual), paper.get("split", ""))
    if metric in paper and setting == (data.name, data.policy or usual, data.split):  # else it would mean nothing
        found["difference"] = found["ours"] - paper[metric]
    if reference is not None and reference.values:
        differences = [own - other for own, other in zip(ours, percent(reference), strict=True)]
        # Several runs give one difference each: the question is whether another run would agree.
        units = np.array([d.mean() for d in differences]) if len(differences) > 1 else differences[0]
        paired = bootstrap_ci95(units)
        low, high = paired["low"], paired["high"]
        found |= {"against": line.row.against, "paired": paired["mean"], "low": low, "high": high}
        found["distinguishable"] = not low <= 0 <= high
    return found


def markdown(made: Made, entries: Sequence[Mapping]) -> str:
    """The text of a table that was run; ``entries`` are those of its CSV file."""
    shown = {(e["row"], e["n_shot"]): e for e in entries if e["metric"] == "macro_ap"}
    shown = [(line, [shown[line.row.name, n_shot] for n_shot in made.runs.config.shots]) for line in made.lines]
    several = any(len(line.row.runs) > 1 for line in made.lines)
    spread = f"standard deviation over {made.table.over}"
    interval = spread if several else "95 % interval over the episodes of one trained model"
    parts = [f"# {made.table.title}", "", f"Ma-AP in %, mean ± {interval}.", ""]
    head = ["method", *(cell for k in made.runs.config.shots for cell in (f"{k}-shot", "published", "difference"))]
    parts += _grid([head, *([line.row.name, *(cell for e in of for cell in _cells(line, e))] for line, of in shown)])
    parts += _differences(made, shown, made.table.over if several else "episodes")
    parts += ["", *_sources(made, entries)]
    parts += [made.table.note] if made.table.note else []
    parts += ["", "## Commands", "", "The table, with all that is missing:", "", "```sh", made.command(), "```"]
    for line in made.lines:
        command = made.row_command(line.row)
        if "mlfsic_jax.main" in command:
            parts += ["", f"{line.row.name}:", "", "```sh", command, "```"]
    return "\n".join(parts) + "\n"


def _cells(line: Line, entry: Mapping) -> tuple[str, str, str]:
    """Ours, published, difference."""
    paper = "" if entry["published"] is None else f"{entry['published']:.1f}"
    if paper and entry["published_sd"] is not None and len(line.row.runs) > 1:
        paper += f" ± {entry['published_sd']:.2f}"
    if entry["ours"] is not None:
        difference = "" if entry["difference"] is None else f"{entry['difference']:+.1f}"
        return f"{entry['ours']:.1f} ± {entry['interval']:.1f}", paper, difference
    if line.reason:
        return "not run", paper, ""
    return "published, not rerun" if paper else f"published in {line.row.lost}, not rerun", paper, ""


def _differences(made: Made, shown: Sequence[tuple[Line, list[Mapping]]], over: str) -> list[str]:
    rows = []
    for line, of_shots in shown:
        if of_shots[0]["paired"] is not None:
            rows.append([line.row.name, line.row.against])
            for e in of_shots:
                mark = " *" if e["distinguishable"] else ""
                paper = "" if e["published_paired"] is None else f"{e['published_paired']:+.1f}"
                rows[-1] += [f"{e['paired']:+.1f} [{e['low']:+.1f}, {e['high']:+.1f}]{mark}", paper]
    if not rows:
        return []
    head = ["method", "against", *(cell for k in made.runs.config.shots for cell in (f"{k}-shot", "published"))]
    meaning = f"Ma-AP, with 95 % bootstrap intervals over {over}; * where the interval leaves out 0."
    return ["", "## Differences on the same episodes", "", meaning, "", *_grid([head, *rows])]


def _sources(made: Made, entries: Sequence[Mapping]) -> list[str]:
    config = made.runs.config
    parts = [f"- not run: {line.row.name}: {line.reason}" for line in made.lines if line.reason]
    parts += [""] if parts else []
    trained = "trained" if config.train_backbone else "frozen"
    setting = f"{config.data.name}, {config.backbone}, {trained}, {config.labels.embedding} words"
    parts.append(f"Ours: {setting}, {config.eval.episodes} episodes of novel labels.")
    sources = sorted({e["published_in"] for e in entries if e["published_in"]})
    if sources:
        rows = (published(line.row.published, k) for line in made.lines for k in config.shots)
        settings = {f"{row['dataset']} with {row['backbone']}" for row in rows if row}
        parts.append(
            f"Published: {'; '.join(sources)}; on {', '.join(sorted(settings))}. A difference is shown where the "
            "dataset is the same; photos and backbone may still be others."
        )
    return parts


def _grid(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, its head first, that is aligned on a terminal too."""
    rows = [[cell.replace("|", "\\|") for cell in cells] for cells in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)) + " |" for cells in rows]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def figure(title: str, entries: Sequence[Mapping]):
    """Ma-AP of the rows with intervals, dots for ours and diamonds for published, a panel for each shot count."""
    from matplotlib.figure import Figure  # takes a second to import

    entries = [e for e in entries if e["metric"] == "macro_ap"]
    shots, rows = (list(dict.fromkeys(e[key] for e in entries)) for key in ("n_shot", "row"))
    drawing = Figure(figsize=(3.2 + 3.2 * len(shots), 1.4 + 0.28 * len(rows)), layout="constrained")
    for panel, n_shot in zip(drawing.subplots(1, len(shots), squeeze=False, sharey=True)[0], shots, strict=True):
        handles = {}
        for y, e in enumerate(e for e in entries if e["n_shot"] == n_shot):
            if e["ours"] is not None:
                ends = [e["ours"] - e["interval"], e["ours"] + e["interval"]]
                panel.plot(ends, [y, y], color=_OURS, linewidth=4, alpha=0.3, solid_capstyle="round")
                (handles["ours"],) = panel.plot(e["ours"], y, "o", color=_OURS, markersize=5.5, linestyle="")
            if e["published"] is not None:
                diamond = {"markersize": 6, "fillstyle": "none", "markeredgewidth": 1.4, "linestyle": ""}
                (handles["published"],) = panel.plot(e["published"], y, "D", color=_PUBLISHED, **diamond)
        panel.set_yticks(range(len(rows)), rows)
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.spines["bottom"].set_color(_GRID)
        panel.tick_params(length=0, labelcolor=_INK, labelsize=9)
        panel.grid(color=_GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.set_title(f"{n_shot}-shot", loc="left", color=_INK, fontsize=10)
        panel.set_xlabel("Ma-AP, %", color=_MUTED)
        if n_shot == shots[-1]:
            panel.legend(handles.values(), handles.keys(), frameon=False, fontsize=9, labelcolor=_INK)
    drawing.suptitle(title, x=0.01, ha="left", color=_INK, fontsize=11)
    return drawing
