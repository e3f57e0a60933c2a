"""A finished run as one self-contained page: python -m mlfsic_jax.report --workdir=RUN [--out=FILE] [--episodes=2].

Results beside published ones, training curves, the sweep of theta, and episodes of the test: what attention and LCM see
in the support photos, what was predicted for query photos, and which regions decided. No script, no network.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import html
import importlib.resources
import io
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from mlfsic_jax import __version__
from mlfsic_jax.core import word_ridge
from mlfsic_jax.core.functional import unit
from mlfsic_jax.core.lcm import select_positions
from mlfsic_jax.core.model import BaseModel, attention_values
from mlfsic_jax.data.dataset import ImageDataset
from mlfsic_jax.report import figures
from mlfsic_jax.run import evaluate, inputs, train
from mlfsic_jax.run import saved as export
from mlfsic_jax.system.command import Parser, cli_errors
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import expand, read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_METHODS = ("region_word_ridge", "lcm")  # whose predictions stand below a query
SHOWN_LABELS = 6  # of an episode
SHOWN_PAIRS = {1: 3, 2: 2}  # of regions, by the number of labels to explain; 1 for more labels
MAX_EXPLAINED = 4
THRESHOLD = 0.5  # of a probability, above which a label is predicted
_FIRST = 20  # episodes are picked among the first ones of the test: those before one have to be drawn too
_TITLES = {
    "voc": "PASCAL VOC",
    "coco": "COCO",
    "nus_wide": "NUS-WIDE",
    "imaterialist": "iMaterialist",
    "folder": "Own photos",
    "scenes": "Generated scenes",
}
_METRICS = (("Ma-AP", "macro_ap"), ("Mi-AP", "micro_ap"), ("Ma-F1", "macro_f1"), ("Mi-F1", "micro_f1"))
_RENDERED_SIZE = 256  # pixels, of generated scenes in the report; the model sees them smaller
_QUERIES = 24  # of an episode: the picture at the top is of one of them
_THUMBNAIL, _FIGURE, _HERO = 232, 760, 1280  # pixels
_COLOURS = {figures.INK: "--ink", figures.MUTED: "--muted", figures.GRID: "--line"} | {
    colour: f"--series-{i}" for i, colour in enumerate(figures.SERIES, 1)
}


class Look(NamedTuple):
    """One test episode from within.

    Attributes:
      n_shot: K.
      number: which of the test episodes.
      support: int [S], rows of the novel split.
      support_labels: bool [S, C].
      attention: float [S, C, h, w], see ``models.attention_values``.
      importance: float [S, h, w], LCM's score, which is what theta is compared with.
      keep: bool [S, h, w], the positions that LCM keeps.
      query: int [Q], rows of some of its queries, those first that have each of the labels that are shown.
      query_labels: bool [Q, C].
      probabilities: method of ``SHOWN_METHODS`` -> float [Q, C].
      prior: float [Q, C], what the words alone add to the score of region_word_ridge.
      pairs: float [Q, S, L, L], see ``word_ridge.region_pairs``.
      dual: float [S, C], see ``word_ridge.Adapted``; the score is prior + sum of pairs * dual.
    """

    n_shot: int
    number: int
    support: np.ndarray
    support_labels: np.ndarray
    attention: np.ndarray
    importance: np.ndarray
    keep: np.ndarray
    query: np.ndarray
    query_labels: np.ndarray
    probabilities: dict[str, np.ndarray]
    prior: np.ndarray
    pairs: np.ndarray
    dual: np.ndarray


def write_report(workdir: str | Path, out: str | Path | None = None, *, episodes: int = 2, seed: int = 0) -> Path:
    """Writes the page.

    Args:
      workdir: of a finished run.
      out: the page; ``<workdir>/report.html`` by default.
      episodes: how many test episodes to show, shot counts taking turns; 0 needs no photos.
      seed: picks the episodes among those that the results are the mean of.

    Returns:
      The page's path.

    Raises:
      InputError: the run is missing, unfinished or damaged, its data are gone, or the page cannot be written.
    """
    import jinja2

    workdir = expand(workdir)
    out = expand(out) if out else workdir / "report.html"
    results = read_results(workdir)
    if episodes < 0:
        raise InputError(f"--episodes={episodes}: must be 0 or more")
    shown: list[dict] = []
    if episodes:
        shown = _episodes(workdir, episodes, seed)
    page = _page(results, read_metrics(workdir), shown, seed)
    template = importlib.resources.files("mlfsic_jax.report").joinpath("report.html.jinja").read_text()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    content = environment.from_string(template).render(page)
    part = out.with_name(out.name + ".part")
    try:
        part.write_text(content, encoding="utf-8")
        os.replace(part, out)
    except OSError as error:
        raise InputError(f"cannot write {out} ({error.strerror}): choose another place with --out") from None
    return out


def read_results(workdir: Path) -> list[dict]:
    """``results.json`` of a finished run.

    Raises:
      InputError: there is none, or it is damaged or incomplete.
    """
    path = workdir / "results.json"
    again = "run its training command (mlfsic_jax.main --workdir=...) to the end"
    try:
        results = read_json(path)
        done, wanted = [entry["n_shot"] for entry in results], list(results[0]["config"]["shots"])
        for entry in results:  # what else an older version may lack
            entry["config"]["data"]["policy"], entry["calibration_error"], entry["theta"]["sweep"]
    except OSError:
        raise InputError(f"{path} is missing, {workdir} holds no finished run: {again}") from None
    except (ValueError, KeyError, TypeError, IndexError):
        raise InputError(f"{path} is damaged or of an older version: {again}") from None
    if done != wanted:
        missing = ", ".join(f"{k}-shot" for k in wanted if k not in done)
        raise InputError(f"{path} has no results for {missing} yet: {again}")
    return results


def read_metrics(workdir: Path) -> list[dict]:
    """The lines of ``metrics.jsonl`` that are of training by episodes; none where a run kept none."""
    path = workdir / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return [line for line in lines if isinstance(line, dict) and "n_shot" in line]
    except (ValueError, RecursionError):
        raise InputError(f"{path} is damaged: run the training command again, which mends it") from None


def published(result: Mapping[str, Any]) -> list[dict]:
    """The rows of ``published.json`` that stand beside an entry of ``results.json``: percent, as the paper has them."""
    table = json.loads(importlib.resources.files("mlfsic_jax.paper").joinpath("published.json").read_text())
    other_protocol = result["config"]["data"]["policy"] == "laso" or result["config"]["data"]["split"]
    return [
        row | {"paper": table["paper"], "url": table["url"], "photos": table["photos"][row["dataset"]]}
        for row in table["rows"]
        if not other_protocol and (row["dataset"], row["n_shot"]) == (result["dataset"], result["n_shot"])
    ]


def look_at(
    config: ml_collections.ConfigDict, run: inputs.Inputs, trained: export.Trained, grid: tuple[int, int], number: int
) -> Look:
    """Goes through one test episode as the evaluation did, and keeps what was seen on the way.

    Args:
      config: of the run.
      run: its data and model.
      trained: of one shot count.
      grid: (h, w) of the local features.
      number: which of the ``config.eval.episodes`` episodes.
    """
    split = run.splits["novel"]
    episode_key, _ = jax.random.split(train.novel_key(config.seed, trained.n_shot))
    supports, queries = evaluate.draw(episode_key, split, number + 1, trained.n_shot, config.eval.n_query)
    support, query = supports[number], _varied(queries[number], split.labels, number)
    embedded = evaluate.embed(
        run.model, trained.variables, split.inputs, np.concatenate([support, query]), trained.fitted
    )
    s, q = (
        evaluate.Embedded(*(x[part] for x in embedded)) for part in (slice(len(support)), slice(len(support), None))
    )
    labels = split.labels[support]
    importance = evaluate.lcm_scores(  # the program that the evaluation has compiled
        run.model, trained.variables, s.regions, labels, split.word_vectors, train.lcm_options(config)
    )
    slope, intercept = trained.calibration["region_word_ridge"]
    seen = _look(
        *(run.model, config.lcm.score_scaling, train.ridge_options(config)),
        *(trained.variables, trained.fitted, trained.theta, slope, intercept),
        *(split.word_vectors, s, labels, importance, q),
    )
    seen = jax.device_get(seen) | {"importance": importance}
    for name in ("attention", "importance", "keep"):
        seen[name] = seen[name].reshape(*seen[name].shape[:-1], *grid)
    return Look(
        n_shot=trained.n_shot,
        number=number,
        support=support,
        support_labels=labels,
        query=query,
        query_labels=split.labels[query],
        **seen,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _look(
    model: BaseModel, score_scaling: str, ridge: evaluate.RidgeOptions, variables, fitted, theta, slope, intercept,
    word_vectors, support: evaluate.Embedded, labels, importance, query: evaluate.Embedded,
) -> dict[str, Any]:  # fmt: skip
    words = model.apply(variables, word_vectors, method="words")
    regions = support.regions
    keep = select_positions(importance, theta, scale=model.scale, score_scaling=score_scaling)
    prototypes = model.apply(variables, regions, labels, words, keep, method="prototypes")
    by_lcm = jax.nn.sigmoid(model.query_logits(query.regions, prototypes))

    adapted = word_ridge.adapt(
        *(fitted, support.pooled, support.regions, labels, word_vectors),
        beta=ridge.beta,
        regulariser=ridge.region_regulariser,
    )
    pairs = word_ridge.region_pairs(query.regions, support.regions)
    prior = word_ridge.word_prior(fitted, unit(query.pooled - fitted.mean), word_vectors, ridge.beta)
    scores = prior + jnp.einsum("qslm,sc->qc", pairs, adapted.dual)
    prediction = word_ridge.Prediction(scores, adapted.left_out)
    by_regions = word_ridge.probabilities(prediction, labels, slope, intercept)
    return {
        "attention": attention_values(model, variables, regions, words),
        "keep": keep,
        "probabilities": {"region_word_ridge": by_regions, "lcm": by_lcm},
        "prior": prior,
        "pairs": pairs,
        "dual": adapted.dual,
    }


def _varied(query: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Up to ``_QUERIES`` of the queries, int [Q]; first, for each of the labels that are shown, one that has it."""
    chosen: list[int] = []
    for label in _shown_labels(labels.shape[1], seed):
        chosen += [row for row in query if labels[row, label] and row not in chosen][:1]
    return np.array([*chosen, *(row for row in query if row not in chosen)][:_QUERIES])


def _shown_labels(n_labels: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).permutation(n_labels)[:SHOWN_LABELS])


def strongest_matches(look: Look, query: int, label_names: Sequence[str]) -> list[figures.Match]:
    """The pairs of regions that add most to the scores of a query's predicted labels, or of its likeliest one.

    Args:
      look: the episode.
      query: which of its queries.
      label_names: C names.

    Returns:
      Matches whose ``support`` is a position in ``look.support``. Each region of the query, and each of a support
      photo, occurs once for a label; all of them lie in two support photos at most.
    """
    probability = look.probabilities["region_word_ridge"][query]
    order = np.argsort(-probability, kind="stable")
    explained = [c for c in order if probability[c] > THRESHOLD][:MAX_EXPLAINED] or [order[0]]
    width = look.keep.shape[-1]
    matches, photos = [], set()
    for colour, c in zip(figures.MATCHES, explained, strict=False):
        contributions = look.pairs[query] * look.dual[:, c, None, None]  # [S, L, L]
        used: set = set()
        for flat in np.argsort(-contributions, axis=None, kind="stable"):
            s, here, there = (int(i) for i in np.unravel_index(flat, contributions.shape))
            if len(used) == 2 * SHOWN_PAIRS.get(len(explained), 1) or contributions[s, here, there] <= 0:
                break
            if here in used or (s, there) in used or (len(photos) == figures.MAX_SUPPORTS and s not in photos):
                continue
            used |= {here, (s, there)}
            photos.add(s)
            cells = (divmod(here, width), divmod(there, width))
            matches.append(figures.Match(label_names[c], colour, s, *cells, float(contributions[s, here, there])))
    return matches


def photo_loader(config: ml_collections.ConfigDict, n_images: int) -> tuple[ImageDataset, Callable[[int], np.ndarray]]:
    """The dataset, and the original photo of each row of the novel split; generated scenes are rendered larger.

    Args:
      config: of the run.
      n_images: rows that the run's novel split has; fewer than the dataset's where photos cannot be read.
    """
    larger = config.copy_and_resolve_references().unlock()
    larger.data.image_size = max(_RENDERED_SIZE, inputs.image_size(config))
    with contextlib.redirect_stdout(io.StringIO()):  # the data card was printed when the run was made
        dataset = inputs.load_dataset(larger)
    images = dataset.splits["novel"].images
    if len(images) > n_images:  # the run left out those that cannot be read
        images = [i for i in images if _is_readable(dataset, i)]
    return dataset, lambda row: dataset.load_image(int(images[row]))


def _is_readable(dataset: ImageDataset, image: int) -> bool:
    try:
        dataset.load_image(int(image))
    except InputError:
        return False
    return True


def _episodes(workdir: Path, count: int, seed: int) -> list[dict]:
    """What the template shows of ``count`` episodes."""
    predictor = export.load(workdir)
    config = ml_collections.ConfigDict(predictor.config)
    with contextlib.redirect_stdout(io.StringIO()):
        run = inputs.load(config)
    if predictor.manifest["identity"] != run.identity:
        raise InputError(
            f"the data or weights are not those that {workdir} was trained with: put them back, or train again"
        )
    split = run.splits["novel"]
    dataset, photo = photo_loader(config, len(split.labels))
    display = dict(zip(dataset.label_names, dataset.display_names, strict=True))
    names = [display[name] for name in split.label_names]
    picked = np.random.default_rng(seed).permutation(min(config.eval.episodes, _FIRST))
    shown = []
    for i in range(count):
        trained = predictor.trained[i % len(predictor.trained)]
        number = int(picked[i % len(picked)])
        look = look_at(config, run, trained, predictor.grid, number)
        shown.append(_episode(look, names, photo, trained.theta))
    return shown


def _episode(look: Look, names: list[str], photo: Callable[[int], np.ndarray], theta: float) -> dict:
    seen: dict[int, np.ndarray] = {}

    def thumbnail(row: int, size: int = _THUMBNAIL) -> np.ndarray:
        row = int(row)
        seen.setdefault(row, photo(row))
        return _shrink(seen[row], size)

    cards, used = [], set()
    per_label = 1 if look.n_shot == 1 else 2
    for c in _shown_labels(len(names), look.number):
        have = np.flatnonzero(look.support_labels[:, c])
        values = look.attention[have, c]
        for s in [s for s in have if s not in used][:per_label] or have[:1]:
            used.add(s)
            small = thumbnail(look.support[s])
            also = [names[k] for k in np.flatnonzero(look.support_labels[s])]
            share = round(100 * float(look.keep[s].mean()))
            cards.append(
                {
                    "label": names[c],
                    "labels": also,
                    "kept": share,
                    "photo": _image(small, f"Support photo with {_and(also)}"),
                    "attention": _image(
                        figures.attention_overlay(small, look.attention[s, c], (values.min(), values.max())),
                        f"Attention for {names[c]} over the same photo, brightest where it looks most",
                    ),
                    "importance": _image(
                        figures.importance_overlay(small, look.importance[s], look.keep[s]),
                        f"LCM's importance over the same photo; {share} % of the positions are kept, the rest is grey",
                    ),
                }
            )
    queries = [_query(look, q, names, thumbnail) for q in range(len(look.query))]
    shown = [query | {"picture": query["draw"](_FIGURE, 5.2)} for query in queries[: len(_shown_labels(len(names), 0))]]
    return {
        "n_shot": look.n_shot,
        "number": look.number + 1,
        "theta": theta,
        "supports": cards,
        "queries": shown,
        "best": max(queries, key=lambda query: query["quality"]),
    }


def _query(look: Look, q: int, names: list[str], thumbnail: Callable) -> dict:
    """A query photo, what was predicted for it and why."""
    truth = look.query_labels[q]
    matches = strongest_matches(look, q, names)
    photos = sorted({match.support for match in matches})
    local = [match._replace(support=photos.index(match.support)) for match in matches]
    at = {name: c for c, name in enumerate(names)}
    rows = []
    for number, match in enumerate(matches, 1):
        labels = [names[k] for k in np.flatnonzero(look.support_labels[match.support])]
        rows.append(
            {"number": number, "colour": match.colour, "label": match.label, "adds": match.contribution, "in": labels}
        )
    evidence = []
    for label in dict.fromkeys(match.label for match in matches):
        c = at[label]
        total = float(np.sum(look.pairs[q] * look.dual[:, c, None, None]))
        evidence.append({"label": label, "regions": total, "words": float(look.prior[q, c])})
    predictions = {}
    for method in SHOWN_METHODS:
        p = look.probabilities[method][q]
        predictions[method] = [
            {
                "label": names[c],
                "percent": round(100 * float(p[c])),
                "kind": ("right" if truth[c] else "wrong") if p[c] > THRESHOLD else "missed",
            }
            for c in np.argsort(-p, kind="stable")
            if truth[c] or p[c] > THRESHOLD
        ]
    kinds = [chip["kind"] for chip in predictions["region_word_ridge"]]
    grid = look.keep.shape[1:]

    def draw(size: int, inches: float) -> dict:
        photo, *others = (thumbnail(row, size // 2) for row in (look.query[q], *look.support[photos]))
        alt = "Query photo, and joined to its regions those of the support that decided: " + "; ".join(
            f"{match.label}, from a photo of {_and(row['in'])}" for match, row in zip(local, rows, strict=True)
        )
        return _image(_rgba(figures.match_figure(photo, others, local, grid, inches), size), alt)

    return {
        "truth": [names[c] for c in np.flatnonzero(truth)],
        "draw": draw,
        "matches": rows,
        "evidence": evidence,
        "predictions": predictions,
        # for the picture at the top: right without a mistake, many labels, sure of them
        "quality": (
            kinds.count("right") - kinds.count("wrong") - kinds.count("missed"),
            sum(chip["percent"] for chip in predictions["region_word_ridge"] if chip["kind"] == "right"),
        ),
    }


def _page(results: list[dict], metrics: list[dict], episodes: list[dict], seed: int) -> dict[str, Any]:
    """All that the template fills in."""
    first = results[0]
    config = first["config"]
    tables, headlines = [], []
    for result in results:
        methods, rows = result["methods"], published(result)
        best = max(methods, key=lambda name: methods[name]["macro_ap"]["mean"])
        headlines.append(
            {
                "n_shot": result["n_shot"],
                "method": _spaced(best),
                **methods[best]["macro_ap"],
                "lcm": methods["lcm"]["macro_ap"]["mean"],
                "chance": result["chance"]["macro_ap"]["mean"],
            }
        )
        top = {m: max(values[m]["mean"] for values in methods.values()) for _, m in _METRICS}
        below = [row for row in rows if row["backbone"] == "ResNet-50" and row["words"] in ("", "GloVe")]
        below = sorted(below, key=lambda row: -row["macro_ap"])[:4]
        caption = f"Ma-AP of all methods, {result['n_shot']}-shot"
        tables.append(
            {
                "n_shot": result["n_shot"],
                "chart": _svg(figures.results_chart([result], below), f"chart-{result['n_shot']}", caption),
                "chance": result["chance"],
                "rows": [
                    {"name": _spaced(name), "values": values, "ece": result["calibration_error"][name]}
                    for name, values in methods.items()
                ],
                "top": top,
                "paired": {pair.replace("-", " − ").replace("_", " "): v for pair, v in result["paired"].items()},
                "published": rows,
                "starred": bool(below),
            }
        )
    hero = max((episode["best"] for episode in episodes), key=lambda query: query["quality"], default=None)
    samples = [
        "rgb({} {} {})".format(*colour) for colour in figures.colours_at(np.linspace(0, 1, 9)).round().astype(int)
    ]
    return {
        "version": __version__,
        "dataset": _TITLES.get(first["dataset"], first["dataset"]),
        "generated": first["dataset"] == "scenes",
        "seed": seed,
        "config": config,
        "episodes_run": first["episodes"],
        "shots": [result["n_shot"] for result in results],
        "headlines": headlines,
        "columns": _METRICS,
        "tables": tables,
        "curves": _svg(figures.training_curves(metrics), "curves", "Training curves") if metrics else "",
        "sweep": _svg(figures.theta_sweep(results), "sweep", "Ma-AP and share of kept positions over theta"),
        "thetas": {result["n_shot"]: result["theta"]["chosen"] for result in results},
        "episodes": episodes,
        "hero": hero and hero | {"picture": hero["draw"](_HERO, 7.5)},
        "gradient": ", ".join(samples),
        "removed": figures.REMOVED,
        "shown_methods": {name: _spaced(name) for name in SHOWN_METHODS},
    }


def _spaced(method: str) -> str:
    return method.replace("_", " ")


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _shrink(photo: np.ndarray, size: int) -> np.ndarray:
    """The photo with its larger side brought to at most ``size`` pixels; small ones are enlarged to half of that."""
    scale = size / max(photo.shape[:2])
    scale = min(scale, max(1.0, scale / 2))
    shape = tuple(max(1, round(side * scale)) for side in photo.shape[1::-1])
    return np.asarray(Image.fromarray(photo).resize(shape, Image.Resampling.LANCZOS))


def _image(pixels: np.ndarray, alt: str) -> dict[str, Any]:
    """An array as an ``img``: uint8 [H, W, 3 or 4]."""
    picture, file = Image.fromarray(pixels), io.BytesIO()
    picture.save(file, "WEBP", quality=82, method=2)
    source = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return {"src": source, "alt": alt, "width": picture.width, "height": picture.height}


def _rgba(figure: Figure, width: int) -> np.ndarray:
    """uint8 [H, W, 4]: a figure without its background, ``width`` pixels wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(width / figure.get_figwidth())
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def _svg(figure: Figure, name: str, title: str):
    """A figure as inline SVG in the page's font and colours, so that it follows light and dark."""
    import markupsafe
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", file.getvalue(), flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text[text.index("<svg") :])
    text = re.sub(r'id="|(?<=["(])#', lambda found: f"{found[0]}{name}-", text)  # ids are unique in the page
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, f"var({variable})")
    opening = f'<svg role="img" aria-label="{html.escape(title)}" '
    return markupsafe.Markup(text.replace("<svg ", opening, 1))


def main(argv: list[str] | None = None) -> None:
    """Reads the flags and writes the page."""
    parser = Parser("mlfsic_jax.report", "Shows a finished run on one page.")
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument("--out", help="the page, <workdir>/report.html by default")
    parser.add_argument("--episodes", type=int, default=2, help="how many test episodes to show")
    parser.add_argument("--seed", type=int, default=0, help="picks the episodes")
    flags = parser.parse_args(argv)
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)  # which devices it looked for in vain
    with cli_errors("no page was written"):
        cache_dir = read_results(expand(flags.workdir))[0]["config"]["cache_dir"]
        jax.config.update("jax_compilation_cache_dir", str(Path(cache_dir).absolute() / "compiled"))
        path = write_report(flags.workdir, flags.out, episodes=flags.episodes, seed=flags.seed)
    print(f"report: {path}")
