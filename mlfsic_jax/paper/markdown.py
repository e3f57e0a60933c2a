"""A table as Markdown: numbers, differences on the same episodes, sources, commands."""

from collections.abc import Mapping, Sequence

from mlfsic_jax.paper.entries import Line, Made
from mlfsic_jax.paper.tables import published


def markdown(made: Made, entries: Sequence[Mapping]) -> str:
    """The text of a table that was run; ``entries`` are those of its CSV file."""
    shown = {(e["row"], e["n_shot"]): e for e in entries if e["metric"] == "macro_ap"}
    several = any(len(line.row.runs) > 1 for line in made.lines)
    interval = "standard deviation over seeds" if several else "95 % interval over the episodes of one trained model"
    parts = [f"# {made.table.title}", "", f"Ma-AP in %, mean ± {interval}.", ""]
    parts += _results(made, shown)
    parts += _differences(made, shown, "seeds" if several else "episodes")
    parts += ["", *_sources(made, entries)]
    parts += [made.table.note] if made.table.note else []
    parts += ["", "## Commands", "", "The table, with all that is missing:", "", "```sh", made.command(), "```"]
    for line in made.lines:
        command = made.row_command(line.row)
        if "mlfsic_jax.main" in command:
            parts += ["", f"{line.row.name}:", "", "```sh", command, "```"]
    return "\n".join(parts) + "\n"


def _results(made: Made, shown: Mapping) -> list[str]:
    shots = made.runs.config.shots
    head = ["method", *(cell for k in shots for cell in (f"{k}-shot", "published", "difference"))]
    rows = (
        [line.row.name, *(cell for k in shots for cell in _cells(line, shown[line.row.name, k]))] for line in made.lines
    )
    return _grid([head, *rows])


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


def _differences(made: Made, shown: Mapping, over: str) -> list[str]:
    shots = made.runs.config.shots
    rows = [["method", "against", *(cell for k in shots for cell in (f"{k}-shot", "published"))]]
    for line in made.lines:
        found = [shown[line.row.name, n_shot] for n_shot in shots]
        if found[0]["paired"] is None:
            continue
        cells = [line.row.name, line.row.against]
        for e in found:
            mark = " *" if e["distinguishable"] else ""
            cells.append(f"{e['paired']:+.1f} [{e['low']:+.1f}, {e['high']:+.1f}]{mark}")
            cells.append("" if e["published_paired"] is None else f"{e['published_paired']:+.1f}")
        rows.append(cells)
    if len(rows) == 1:
        return []
    meaning = f"Ma-AP, with 95 % bootstrap intervals over {over}; * where the interval leaves out 0."
    return ["", "## Differences on the same episodes", "", meaning, "", *_grid(rows)]


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
