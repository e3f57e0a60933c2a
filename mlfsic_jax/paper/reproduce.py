"""The papers' tables from our own runs: python -m mlfsic_jax.reproduce --table=NAME [--config=FILE] [--workdir=DIR].

Runs what is missing, or goes on where it was stopped, then writes NAME.md, NAME.csv and NAME.png to the workdir
(runs/reproduce/<config> by default): our mean and interval, the published number, the difference, the exact command.
Each run is kept in a folder of the workdir, which all tables of one config share. Without --config the table's own is
taken; configs/voc.py:cpu does for all of them, and fields are set as --config.FIELD=VALUE. Tables:

  voc coco nus_wide imaterialist demo  all methods; demo on generated scenes
  laso_protocol                        the same under LaSO's protocol (table 4)
  components attention selection       ablations (tables 5, 14 and 15)
  heads theta backbones embeddings     (figure 3, tables 7 and 8)
  zero_shot seeds                      (table 9, section 5.4.3)
  wga                                  ablations of WGA, the predecessor (its tables 3 and 6)
  reading                              our reading of what the paper leaves open
"""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from mlfsic_jax.paper.tables import DEFAULT_CONFIGS, FINE_TUNED, Row, Table, published, tables
from mlfsic_jax.run.config import validate
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import read_arrays, write_arrays
from mlfsic_jax.system.flags import parse, run_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mlfsic_jax.data.features import View
    from mlfsic_jax.run.inputs import Inputs

METRICS = {"macro_ap": "Ma-AP", "micro_ap": "Mi-AP", "macro_f1": "Ma-F1", "micro_f1": "Mi-F1"}  # those of the papers
# Changes of these sections need no other training, unless LCM takes part in it.
_EVALUATION = ("lcm.", "ridge.", "eval.")
# Where things lie, and for which shots there is a file each: not what is in the file.
_NOT_COMPARED = ("workdir", "cache_dir", "data_dir", "shots", "data.source", "data.prepared_dir")

Values = dict[str, np.ndarray]  # metric -> float32 [E], one for each novel episode


class Line(NamedTuple):
    """A row with its numbers.

    Attributes:
      row: the row.
      values: n_shot -> for each run its values; empty where it was not run.
      reason: why it was not run, else "".
    """

    row: Row
    values: dict[int, list[Values]]
    reason: str = ""


class Runs:
    """The runs of one config and its changes, each in a folder of its own; what is there is not done again."""

    def __init__(self, config: ConfigDict, root: Path):
        """``config`` is what changes start from, ``root`` the folder of the folders."""
        self._config, self.root = config, root
        self._done: dict[tuple, dict[int, Values] | InputError] = {}
        self._inputs: dict[Path, Inputs] = {}
        self._features: dict[tuple[Path, int], dict[str, View]] = {}

    def changes(self, changes: Mapping) -> dict:
        """The changes without those that change nothing."""
        flat = _flat(self._config.to_dict())
        return {field: value for field, value in changes.items() if flat[field] != value}

    def folder(self, changes: Mapping) -> Path:
        """Where a run is kept."""
        name = ",".join(f"{field}={value}" for field, value in self.changes(changes).items()) or "base"
        return self.root / re.sub(r"[^\w.,=-]", "_", name)

    def values(self, changes: Mapping, method: str) -> dict[int, Values]:
        """Metrics of every novel episode, from the files of the run, which is run before if it has to be.

        Args:
          changes: fields of the config to change.
          method: see ``Row``.

        Raises:
          InputError: something that the run needs is missing or does not fit.
        """
        from mlfsic_jax.methods import PEERS

        changes = self.changes(changes)
        peer = method if method in (*PEERS, FINE_TUNED) else ""
        key = (self.folder(changes), peer)
        if key not in self._done:  # another row of the table may want the same, or fail for the same reason
            try:
                self._done[key] = self._peer(changes, peer) if peer else self._run(changes)
            except InputError as error:
                self._done[key] = error
        done = self._done[key]
        if isinstance(done, InputError):
            raise done
        return {k: {m: values[f"{method}.{m}"] for m in METRICS} for k, values in done.items()}

    def _run(self, changes: dict) -> dict[int, Values]:
        from mlfsic_jax.run import train

        config, folder = self._changed(changes), self.folder(changes)

        def read():
            return {k: _read_values(train.episodes_file(folder, k), config) for k in config.shots}

        found = read()
        if None in found.values():
            workdir = self.folder(self._of_training(changes))
            train.train_and_evaluate(config, workdir, None if folder == workdir else folder)
            found = read()
        return found

    def _peer(self, changes: dict, name: str) -> dict[int, Values]:
        from mlfsic_jax.core.metrics import multilabel_metrics
        from mlfsic_jax.methods import PEERS, wga
        from mlfsic_jax.run import evaluate
        from mlfsic_jax.run.train import novel_key
        from mlfsic_jax.system import parallel

        config, folder, found = self._changed(changes), self.folder(changes), {}
        for n_shot in config.shots:
            path = folder / f"peer_{name}_{n_shot}shot.safetensors"
            found[n_shot] = _read_values(path, config)
            if found[n_shot] is not None:
                continue
            trains_model = config.train_backbone or name == FINE_TUNED
            run, variables, splits = self._inputs_of(changes, n_shot, trains_model)
            key = novel_key(config.seed, n_shot)
            if name == FINE_TUNED:
                trained = variables

                def score(trained, _, *episode, model=run.model):
                    return wga.score(model, trained, *episode)
            else:
                peer_key = jax.random.fold_in(key, 1)
                train_n_query = config.train.n_query
                trained = PEERS[name].train(peer_key, splits["train"], n_shot=n_shot, n_query=train_n_query)
                score = PEERS[name].score
            scores, truth = evaluate.score_peer(
                *(score, trained, splits["novel"]),
                key=key,
                n_episodes=config.eval.episodes,
                n_shot=n_shot,
                n_query=config.eval.n_query,
                name=name.replace("_", " "),
            )
            found[n_shot] = evaluate.episode_values({name: multilabel_metrics(scores, truth)})
            if parallel.is_first():
                folder.mkdir(parents=True, exist_ok=True)
                write_arrays(path, found[n_shot], {"config": json.dumps(config.to_dict())})
        return found

    def _inputs_of(self, changes: dict, n_shot: int, with_model: bool):
        """Data, the trained variables where they are asked for, and the splits with local features for inputs."""
        from mlfsic_jax.run import evaluate, inputs, train

        config, folder = self._changed(changes), self.folder(changes)
        if with_model:
            self.values(changes, "base")
        if folder not in self._inputs:
            self._inputs[folder] = inputs.load(config)
        run = self._inputs[folder]
        if not with_model:
            return run, None, run.splits
        variables = train.restore_best(config, run, n_shot, self.folder(self._of_training(changes)))
        if (folder, n_shot) not in self._features:
            self._features[folder, n_shot] = {
                name: evaluate.with_features(run.model, variables, run.splits[name]) for name in ("train", "novel")
            }
        return run, variables, self._features[folder, n_shot]

    def _changed(self, changes: Mapping) -> ConfigDict:
        config = self._config.copy_and_resolve_references()
        config.update_from_flattened_dict(dict(changes))
        config.train.episodes_per_step = config.train.episodes_per_step or jax.device_count()
        validate(config)
        return config

    def _of_training(self, changes: dict) -> dict:
        """Those of the changes that make another training."""
        if self._changed(changes).lcm.during_training:
            return changes
        return {field: value for field, value in changes.items() if not field.startswith(_EVALUATION)}


def _read_values(path: Path, config: ConfigDict) -> Values | None:
    """What a file of episodes holds, or None where there is none of these settings."""
    try:
        arrays, metadata = read_arrays(path)
        made_with = json.loads(metadata["config"])
    except (InputError, KeyError):  # one that is missing or damaged is made again
        return None
    return arrays if _compared(made_with) == _compared(json.loads(json.dumps(config.to_dict()))) else None


def _compared(fields: dict) -> dict:
    return {name: value for name, value in _flat(fields).items() if name not in _NOT_COMPARED}


def _flat(fields: Mapping, prefix: str = "") -> dict:
    flat = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def reproduce(name: str, config: ConfigDict, root: str | Path, given: Sequence[str] = ()) -> str:
    """Makes a table, running what is missing.

    Args:
      name: of ``tables``.
      config: what the table's rows change.
      root: folder of the runs and of the table.
      given: the flags that the config comes from, for the commands in the table.

    Returns:
      The table as Markdown; ``<root>/<name>.md``, ``.csv`` and ``.png`` hold it too.

    Raises:
      InputError: a mistake in the config, or not one row could be run.
    """
    from mlfsic_jax.system import parallel
    from mlfsic_jax.system.progress import track

    validate(config)
    root = Path(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to the workdir {root}: {error.strerror}") from None
    table, runs = tables(config)[name](), Runs(config, root)
    lines, errors = [], []
    for row in track(table.rows, total=len(table.rows), description=f"table {name}", unit="rows"):
        values, reason = {}, ""
        if row.method:
            try:
                of_runs = [runs.values(changes, row.method) for changes in row.runs]
                values = {k: [run[k] for run in of_runs] for k in config.shots}
            except InputError as error:
                errors.append(error)
                reason = textwrap.shorten(str(error).splitlines()[0], 240, placeholder=" ...")
                print(f"{row.name}: not run: {error}", flush=True)
        lines.append(Line(row, values, reason))
    if not any(line.values for line in lines):
        raise errors[0]
    entries = [entry for line in lines for entry in _entries(config, runs, given, name, line, lines)]
    text = _markdown(name, table, config, runs, given, lines, entries)
    if parallel.is_first():
        (root / f"{name}.md").write_text(text)
        (root / f"{name}.csv").write_text(_csv(entries))
        figure(table, entries).savefig(root / f"{name}.png", dpi=200, facecolor="white")
    return text


def _entries(config, runs: Runs, given, name: str, line: Line, lines: list[Line]) -> list[dict]:
    """What the CSV file holds of a row: one entry for each shot count and metric, in percent."""
    from mlfsic_jax.core.metrics import bootstrap_ci95, mean_and_ci95

    row = line.row
    reference = next((other for other in lines if other.row.name == row.against), None)
    entries = []
    for n_shot in config.shots:
        paper = published(row.published, n_shot)
        same = paper is not None and (paper["dataset"], paper.get("policy", ""), paper.get("split", "")) == (
            *(config.data.name, config.data.policy, config.data.split),
        )
        paper_reference = published(reference.row.published, n_shot) if reference else None
        for metric in METRICS:
            entry = {
                **{"table": name, "row": row.name, "n_shot": n_shot, "metric": metric},
                **dict.fromkeys(("ours", "interval", "interval_of", "published", "published_sd", "published_in")),
                **dict.fromkeys(("difference", "against", "paired", "low", "high", "distinguishable")),
                **{"published_paired": None, "reason": line.reason, "command": _commands(runs, given, name, row)},
            }
            if paper is not None and metric in paper:
                entry |= {"published": paper[metric], "published_in": f"{paper['paper']}, {_where(paper)}"}
                entry["published_sd"] = paper.get("sd") if metric == "macro_ap" else None
            if paper_reference is not None and entry["published"] is not None and metric in paper_reference:
                entry["published_paired"] = paper[metric] - paper_reference[metric]
            if line.values:
                of_runs = [100 * run[metric].astype(np.float64) for run in line.values[n_shot]]
                means = np.array([of_run.mean() for of_run in of_runs])
                if len(of_runs) > 1:
                    entry |= {"ours": means.mean(), "interval": means.std(ddof=1), "interval_of": "sd over seeds"}
                else:
                    of_episodes = mean_and_ci95(of_runs[0])
                    entry |= {"ours": of_episodes["mean"], "interval": of_episodes["ci95"]}
                    entry["interval_of"] = "95 % over episodes"
                if same and entry["published"] is not None:
                    entry["difference"] = entry["ours"] - entry["published"]
            if line.values and reference is not None and reference.values:
                pairs = zip(line.values[n_shot], reference.values[n_shot], strict=True)
                differences = [100 * (a[metric].astype(np.float64) - b[metric]) for a, b in pairs]
                # Of several runs each gives one difference: what is asked is whether another would agree.
                units = np.array([d.mean() for d in differences]) if len(differences) > 1 else differences[0]
                paired = bootstrap_ci95(units)
                entry |= {
                    "against": row.against,
                    "paired": paired["mean"],
                    "low": paired["low"],
                    "high": paired["high"],
                }
                entry["distinguishable"] = not paired["low"] <= 0 <= paired["high"]
            entries.append(entry)
    return entries


def _where(row: Mapping) -> str:
    return f"table {row['table']}" if isinstance(row["table"], int) else row["table"]


def _commands(runs: Runs, given: Sequence[str], name: str, row: Row) -> str:
    """The commands that make a row's runs, one a line; what needs more than one run is made by the table's command."""
    from mlfsic_jax.methods import PEERS

    if not row.method:
        return ""
    if row.method in (*PEERS, FINE_TUNED):
        return shlex.join(["python", "-m", "mlfsic_jax.reproduce", f"--table={name}", *given, f"--workdir={runs.root}"])
    commands = []
    for changes in map(runs.changes, row.runs):
        kept = [flag for flag in given if not any(flag.startswith(f"--config.{field}=") for field in changes)]
        changed = [f"--config.{field}={value}" for field, value in changes.items()]
        workdir = f"--workdir={runs.folder(changes)}"
        commands.append(shlex.join(["python", "-m", "mlfsic_jax.main", *kept, *changed, workdir]))
    return "\n".join(commands)


def _csv(entries: Sequence[Mapping]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(entries[0]), lineterminator="\n")
    writer.writeheader()
    for entry in entries:
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in entry.items()})
    return out.getvalue()


def _markdown(name, table: Table, config, runs: Runs, given, lines: Sequence[Line], entries: Sequence[Mapping]) -> str:
    shown = {(e["row"], e["n_shot"]): e for e in entries if e["metric"] == "macro_ap"}
    shots = tuple(config.shots)
    several = any(len(line.row.runs) > 1 for line in lines)
    head = ["method"]
    for n_shot in shots:
        head += [f"{n_shot}-shot", "published", "difference"]
    body = []
    for line in lines:
        cells = [line.row.name]
        for n_shot in shots:
            cells += _cells(line, shown[line.row.name, n_shot])
        body.append(cells)
    interval = "standard deviation over seeds" if several else "95 % interval over the episodes of one trained model"
    parts = [f"# {table.title}", "", f"Ma-AP in %, mean ± {interval}.", "", *_grid(head, body)]

    compared = [line for line in lines if shown[line.row.name, shots[0]]["paired"] is not None]
    if compared:
        head, body = ["method", "against"], []
        for n_shot in shots:
            head += [f"{n_shot}-shot", "published"]
        for line in compared:
            cells = [line.row.name, line.row.against]
            for n_shot in shots:
                e = shown[line.row.name, n_shot]
                mark = " *" if e["distinguishable"] else ""
                cells.append(f"{e['paired']:+.1f} [{e['low']:+.1f}, {e['high']:+.1f}]{mark}")
                cells.append("" if e["published_paired"] is None else f"{e['published_paired']:+.1f}")
            body.append(cells)
        over = "seeds" if several else "episodes"
        parts += ["", "## Differences on the same episodes", ""]
        parts += [f"Ma-AP, with 95 % bootstrap intervals over {over}; * where the interval leaves out 0.", ""]
        parts += _grid(head, body)

    sources = sorted({e["published_in"] for e in entries if e["published_in"]})
    not_run = [f"- not run: {line.row.name}: {line.reason}" for line in lines if line.reason]
    parts += [
        "",
        *not_run,
        *([""] if not_run else []),
        f"Ours: {_setting(config)}, {config.eval.episodes} episodes of novel labels.",
    ]
    if sources:
        settings = {
            f"{row['dataset']} with {row['backbone']}"
            for line in lines
            for row in (published(line.row.published, k) for k in shots)
            if row
        }
        parts += [
            f"Published: {'; '.join(sources)}; on {', '.join(sorted(settings))}. A difference is shown where the "
            "dataset is the same; photos and backbone may still be others."
        ]
    parts += [table.note] if table.note else []
    parts += ["", "## Commands", "", "The table, with all that is missing:", ""]
    whole = ["python", "-m", "mlfsic_jax.reproduce", f"--table={name}", *given, f"--workdir={runs.root}"]
    parts += ["```sh", shlex.join(whole), "```"]
    for line in lines:
        command = shown[line.row.name, shots[0]]["command"]
        if "mlfsic_jax.main" in command:
            parts += ["", f"{line.row.name}:", "", "```sh", command, "```"]
    return "\n".join(parts) + "\n"


def _cells(line: Line, entry: Mapping) -> list[str]:
    """Ours, published, difference."""
    paper = "" if entry["published"] is None else f"{entry['published']:.1f}"
    if paper and entry["published_sd"] is not None and len(line.row.runs) > 1:
        paper += f" ± {entry['published_sd']:.2f}"
    if entry["ours"] is not None:
        difference = "" if entry["difference"] is None else f"{entry['difference']:+.1f}"
        return [f"{entry['ours']:.1f} ± {entry['interval']:.1f}", paper, difference]
    if line.reason:
        return ["not run", paper, ""]
    return ["published, not rerun" if paper else f"published in {line.row.lost}, not rerun", paper, ""]


def _grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table that is one on a terminal too."""
    rows = [[cell.replace("|", "\\|") for cell in cells] for cells in (head, *body)]
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)) + " |" for cells in rows]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def _setting(config) -> str:
    trained = "trained" if config.train_backbone else "frozen"
    return f"{config.data.name}, {config.backbone}, {trained}, {config.labels.embedding} words"


def figure(table: Table, entries: Sequence[Mapping]) -> Figure:
    """Ma-AP of every row with its interval, dots for ours and diamonds for published, a panel for each shot count.

    Args:
      table: for its title.
      entries: what the CSV file holds.
    """
    from matplotlib import figure as mpl

    from mlfsic_jax.report.figures import GRID, INK, MUTED, SERIES

    entries = [e for e in entries if e["metric"] == "macro_ap"]
    shots, rows = (list(dict.fromkeys(e[key] for e in entries)) for key in ("n_shot", "row"))
    drawing = mpl.Figure(figsize=(3.2 + 3.2 * len(shots), 1.4 + 0.28 * len(rows)), layout="constrained")
    for panel, n_shot in zip(drawing.subplots(1, len(shots), squeeze=False, sharey=True)[0], shots, strict=True):
        handles = {}
        for y, e in enumerate(e for e in entries if e["n_shot"] == n_shot):
            if e["ours"] is not None:
                ends = [e["ours"] - e["interval"], e["ours"] + e["interval"]]
                panel.plot(ends, [y, y], color=SERIES[0], linewidth=4, alpha=0.3, solid_capstyle="round")
                (handles["ours"],) = panel.plot(e["ours"], y, "o", color=SERIES[0], markersize=5.5, linestyle="")
            if e["published"] is not None:
                diamond = {"markersize": 6, "fillstyle": "none", "markeredgewidth": 1.4, "linestyle": ""}
                (handles["published"],) = panel.plot(e["published"], y, "D", color=SERIES[1], **diamond)
        panel.set_yticks(range(len(rows)), rows)
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.spines["bottom"].set_color(GRID)
        panel.tick_params(length=0, labelcolor=INK, labelsize=9)
        panel.grid(color=GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.set_title(f"{n_shot}-shot", loc="left", color=INK, fontsize=10)
        panel.set_xlabel("Ma-AP, %", color=MUTED)
        if n_shot == shots[-1]:
            panel.legend(handles.values(), handles.keys(), frameon=False, fontsize=9, labelcolor=INK)
    drawing.suptitle(table.title, x=0.01, ha="left", color=INK, fontsize=11)
    return drawing


_TABLE = flags.DEFINE_enum("table", None, list(DEFAULT_CONFIGS), "which table")


def _parse(argv: list[str]) -> list[str]:
    """Flags in; without --config the table's own."""
    wanted = [flag.partition("=")[2] for flag in argv if re.match("--?table=", flag)]
    if not any(re.match("--?config(=|$)", flag) for flag in argv) and wanted and wanted[-1] in DEFAULT_CONFIGS:
        argv = [argv[0], f"--config={DEFAULT_CONFIGS[wanted[-1]]}", *argv[1:]]
    return parse(argv)


def main(argv: list[str]) -> None:
    """Makes a table and prints it."""
    del argv

    def command(config: ConfigDict) -> None:
        if _TABLE.value is None:
            raise InputError(f"--table is missing: give one of {', '.join(DEFAULT_CONFIGS)}")
        flag = flags.FLAGS["config"]
        overrides = config_flags.get_override_values(flag)
        given = [f"--config={flag.config_filename}"]
        given += [f"--config.{field}={value}" for field, value in overrides.items() if field != "workdir"]
        name = re.sub(r"\W+", "_", re.sub(r"\.py(?=:|$)", "", Path(flag.config_filename).name)).strip("_")
        root = flags.FLAGS.workdir or overrides.get("workdir") or f"runs/reproduce/{name}"
        print(reproduce(_TABLE.value, config, root, given))

    run_config(command)
