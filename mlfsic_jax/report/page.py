"""A finished run as one self-contained page, without scripts or network: results, training, test episodes."""

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from mlfsic_jax import __version__
from mlfsic_jax.data.published import published_rows
from mlfsic_jax.report import figures
from mlfsic_jax.report.episodes import show_episodes
from mlfsic_jax.run.explain import THRESHOLD
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import atomic
from mlfsic_jax.system.untrusted import expand, read_json, reported

_METRICS = {"Ma-AP": "macro_ap", "Mi-AP": "micro_ap", "Ma-F1": "macro_f1", "Mi-F1": "micro_f1"}


def write_report(workdir: str | Path, out: str | Path | None = None, *, episodes: int = 2, seed: int = 0) -> Path:
    """Writes the page of a finished run, by default to ``<workdir>/report.html``, and returns its path.

    It shows ``episodes`` test episodes, shot counts taking turns, which ``seed`` picks among those that the results are
    means of; 0 needs no photos. ``InputError`` when the run is missing, unfinished or damaged, when its data are gone,
    or the page cannot be written.
    """
    workdir = expand(workdir)
    out = expand(out) if out else workdir / "report.html"
    results = read_results(workdir)
    if episodes < 0:
        raise InputError(f"--episodes={episodes}: must be 0 or more")
    shown = show_episodes(workdir, episodes, seed) if episodes else []
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    template = importlib.resources.files("mlfsic_jax.report").joinpath("report.html.jinja").read_text()
    page = _page(results, read_metrics(workdir), shown) | {"seed": seed}
    content = jinja2.Environment(**options).from_string(template).render(page)
    with reported(f"cannot write {out}", "choose another place with --out", OSError), atomic(out) as part:
        part.write_text(content, encoding="utf-8")
    return out


def read_results(workdir: Path) -> list[dict]:
    """Reads ``results.json`` of a finished run; ``InputError`` when it is missing, damaged or incomplete."""
    path = workdir / "results.json"
    again = "run its training command (mlfsic_jax.main --workdir=...) to the end"
    missing = reported(f"{path} is missing, {workdir} holds no finished run", again, OSError)
    with missing, reported(f"{path} is damaged or of an older version", again, (ValueError, LookupError, TypeError)):
        results = read_json(path)
        done, wanted = [entry["n_shot"] for entry in results], list(results[0]["config"]["shots"])
        for entry in results:  # what an older version may lack
            entry["config"]["data"]["policy"], entry["calibration_error"], entry["tuned"]
            entry.get("theta", {"sweep": ()})["sweep"]
    if done != wanted:
        missing = ", ".join(f"{k}-shot" for k in wanted if k not in done)
        raise InputError(f"{path} has no results for {missing} yet: {again}")
    return results


def read_metrics(workdir: Path) -> list[dict]:
    """Reads what training by episodes wrote to ``metrics.jsonl``, if it did; ``InputError`` when that is damaged."""
    path = workdir / "metrics.jsonl"
    with reported(f"{path} is damaged", "run the training command again, which mends it", (ValueError, RecursionError)):
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [line for line in lines if isinstance(line, dict) and "n_shot" in line]


def published(result: Mapping[str, Any]) -> list[dict]:
    """The rows of ``published_rows`` to show beside an entry of ``results.json``."""
    data, setting = result["config"]["data"], (result["dataset"], result["n_shot"])
    if data["policy"] == "laso" or data["split"]:
        return []
    return [row for row in published_rows() if "photos" in row and (row["dataset"], row["n_shot"]) == setting]


def _page(results: list[dict], metrics: list[dict], episodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All that the template fills in."""
    swept, sweep = [result for result in results if "theta" in result], "Ma-AP and share of kept positions over theta"
    ramp = figures.colours_at(np.linspace(0, 1, 9)).round().astype(int)
    return {
        "version": __version__,
        "first": results[0],
        "columns": _METRICS,
        "threshold": THRESHOLD,
        "tables": [_table(result) for result in results],
        "curves": figures.svg(figures.training_curves(metrics), "curves", "Training curves") if metrics else "",
        "sweep": figures.svg(figures.theta_sweep(swept), "sweep", sweep) if swept else "",
        "thetas": {result["n_shot"]: result["theta"]["chosen"] for result in swept},
        "episodes": episodes,
        "gradient": ", ".join("rgb({} {} {})".format(*colour) for colour in ramp),
        "removed": figures.REMOVED,
    }


def _table(result: dict) -> dict[str, Any]:
    """An entry of ``results.json``, the best method by each metric, and what stands beside them."""
    methods, rows = result["methods"], published(result)
    best = {metric: max(methods, key=lambda name: methods[name][metric]["mean"]) for metric in _METRICS.values()}
    # The chart has room for the best four that are of our backbone and words.
    drawn = [row for row in rows if row["backbone"] == "ResNet-50" and row["words"] in ("", "GloVe")]
    drawn = sorted(drawn, key=lambda row: -row["macro_ap"])[:4]
    name, title = f"chart-{result['n_shot']}", f"Ma-AP of all methods, {result['n_shot']}-shot"
    chart = figures.svg(figures.results_chart(result, drawn), name, title)
    return result | {"best": best, "published": rows, "starred": bool(drawn), "chart": chart}
