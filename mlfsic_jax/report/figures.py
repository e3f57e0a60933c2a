"""The pictures of a report: overlays as RGBA arrays, charts as matplotlib figures without pyplot's state, as HTML.

Maps over the positions of a photo, [h, w], cover the whole photo, since photos are resized without a crop.
"""

import base64
import collections
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import markupsafe
import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

from mlfsic_jax.run.explain import Match

INK, MUTED, GRID = "#1d2125", "#68707c", "#dfe3e8"
SERIES = ("#1668c4", "#c2570c", "#0f8a63", "#8a45c9", "#a8324a")  # one per shot count
MATCHES = ("#2f9bff", "#ff8a1f", "#21c17a", "#d86bff", "#ffd21f", "#ff5a6e")  # one per matched label, on any photo
ON_MATCH = "#101318"  # numbers on those
REMOVED = (206, 208, 212)  # grey of positions that LCM removed
MAX_SUPPORTS = 2  # photos beside one query

_HEAT, _GREYED = 0.62, 0.72  # weights of a map's colours and of ``REMOVED``, the rest is the photo in grey
_WIDTH = 4.2  # inches: a chart fills a phone at its own size
_DASHED = {"linestyle": (0, (4, 2))}
_RING = {"marker": "o", "markersize": 10, "fillstyle": "none"}
_COLOURS = {INK: "--ink", MUTED: "--muted", GRID: "--line"} | {
    colour: f"--series-{i}" for i, colour in enumerate(SERIES, 1)
}
_LEGEND = {"frameon": False, "labelcolor": INK, "fontsize": 9.5}


def attention_overlay(photo: np.ndarray, values: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Lays a map, float [h, w], in colours over the photo in grey, uint8 [H, W, 3] -> [H, W, 4]; bright is high.

    Colours run over ``limits``, by default the map's own; between positions they are interpolated.
    """
    return _blend(photo, colours_at(_enlarge(_scaled(values, limits), photo, Image.Resampling.BICUBIC)), _HEAT)


def importance_overlay(photo: np.ndarray, importance: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Lays LCM's map, float [h, w], over the photo, uint8 [H, W, 3] -> [H, W, 4]; grey where bool ``keep`` is False."""
    cells, kept = (_enlarge(x, photo, Image.Resampling.NEAREST) for x in (_scaled(importance), keep))
    colours, grey = _blend(photo, colours_at(cells), _HEAT), _blend(photo, np.array(REMOVED), _GREYED)
    return np.where(kept[..., None] > 0.5, colours, grey)


def match_colours(matches: Sequence[Match]) -> dict[str, str]:
    """A colour for each label of a query's matches."""
    return dict(zip(dict.fromkeys(match.label for match in matches), MATCHES, strict=False))


def match_figure(
    query: np.ndarray,
    supports: Sequence[np.ndarray],
    matches: Sequence[Match],
    grid: tuple[int, int],
    width: float = 8.0,
) -> Figure:
    """Draws a query photo on the left, support photos on the right, and curves between the regions that met.

    Photos are uint8 [H, W, 3], each of its own size; more than two beside the query raise ``ValueError``. A match's
    ``support`` is an index of ``supports``, and its number stands at both ends. ``grid`` is (h, w) of a photo's
    positions. ``width`` is in inches: the narrower, the larger are lines and numbers beside the photos.
    """
    if len(supports) > MAX_SUPPORTS:
        raise ValueError(f"supports must be at most {MAX_SUPPORTS} photos, not {len(supports)}")
    boxes = _layout(query, supports)
    low, (right, high) = boxes[:, 0, 1].min(), boxes.sum(axis=1).max(axis=0)
    figure = Figure(figsize=(width, width * (high - low) / right))
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for photo, ((x, y), (w, h)) in zip((query, *supports), boxes, strict=True):
        axes.imshow(photo, extent=(x, x + w, y + h, y), aspect="auto", interpolation="bilinear")
    axes.set(xlim=(0, right), ylim=(high, low))
    points = 72 * width / right  # in one unit
    colours, seen, marks = match_colours(matches), collections.Counter(), []
    for number, match in enumerate(matches, 1):
        colour, ends = colours[match.label], []
        for at, (row, column) in ((0, match.query_cell), (1 + match.support, match.support_cell)):
            size = boxes[at, 1] / grid[::-1]
            ends.append((boxes[at, 0] + size * (column, row), size))
            marks.append((boxes[at], ends[-1], seen[at, row, column], colour, number))
            seen[at, row, column] += 1
        _join(axes, *ends, colour, *(6 * before / points for _, _, before, _, _ in marks[-2:]))
    for mark in marks:  # above all curves
        _mark(axes, *mark, points)
    return figure


def training_curves(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Plots lines of ``metrics.jsonl``: losses and validation Ma-AP over the steps, a colour for each shot count.

    Solid is the loss of the queries, dashed that of the words; a ring marks the best checkpoint.
    """
    figure, (loss, ap) = _chart(4.3, {"Loss of an episode": 1, "Ma-AP on validation labels, %": 1})
    for colour, n_shot in zip(SERIES, sorted({line["n_shot"] for line in metrics}), strict=False):
        lines = [line for line in metrics if line["n_shot"] == n_shot]
        steps, values = [line["step"] for line in lines], [100 * line["validation_macro_ap"] for line in lines]
        loss.plot(steps, [line["cm_loss"] for line in lines], color=colour, **_DASHED)
        loss.plot(steps, [line["query_loss"] for line in lines], color=colour, marker="o")
        ap.plot(steps, values, color=colour, marker="o", label=f"{n_shot}-shot")
        best = int(np.argmax(values))
        ap.plot(steps[best], values[best], color=colour, **_RING)
    loss.set_yscale("log")
    loss.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
    ap.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ap.set_xlabel("step", color=MUTED)
    ap.legend(**_LEGEND)
    return figure


def theta_sweep(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Plots ``results.json``: Ma-AP of LCM and the share of positions it keeps over its threshold.

    Solid is on validation labels, where theta is chosen (ring), dashed on novel labels.
    """
    figure, (ap, kept) = _chart(4.3, {"Ma-AP of LCM, %": 2, "Positions kept, %": 1})
    for colour, result in zip(SERIES, results, strict=False):
        points = sorted(result["theta"]["sweep"], key=lambda point: point["theta"])
        x = [point["theta"] for point in points]
        on_validation, on_novel, share = (
            [100 * point[name] for point in points] for name in ("validation_macro_ap", "novel_macro_ap", "kept")
        )
        ap.plot(x, on_validation, color=colour, marker="o", label=f"{result['n_shot']}-shot")
        ap.plot(x, on_novel, color=colour, **_DASHED)
        chosen = x.index(result["theta"]["chosen"])
        ap.plot(x[chosen], on_validation[chosen], color=colour, **_RING)
        kept.plot(x, share, color=colour, marker="o")
    kept.set_ylim(0, 100)
    kept.set_xlabel("theta", color=MUTED)
    ap.legend(**_LEGEND)
    return figure


def results_chart(result: Mapping[str, Any], published: Sequence[Mapping[str, Any]] = ()) -> Figure:
    """Plots an entry of ``results.json``: Ma-AP of every method with its 95 % interval; ``published_rows`` below."""
    ours = sorted(result["methods"].items(), key=lambda item: -item[1]["macro_ap"]["mean"])
    names = [name.replace("_", " ") for name, _ in ours]
    names += [f"{row['method']} {row['words']}".strip() + " *" for row in published]
    figure, (axes,) = _chart(0.235 * len(names) + 0.935, {f"Ma-AP, {result['n_shot']}-shot, %": 1})
    beside = {"transform": axes.get_yaxis_transform(), "va": "center"}
    for y, (_, values) in enumerate(ours):
        mean, half = 100 * values["macro_ap"]["mean"], 100 * values["macro_ap"]["ci95"]
        colour = SERIES[0] if y == 0 else INK
        axes.plot([mean - half, mean + half], [y, y], color=colour, linewidth=5, alpha=0.28, solid_capstyle="round")
        axes.plot(mean, y, "o", color=colour, markersize=6)
        axes.text(1.02, y, f"{mean:.1f}", color=colour, **beside)
    for y, row in enumerate(published, len(ours)):
        axes.plot(row["macro_ap"], y, "D", color=SERIES[1], markersize=6, fillstyle="none", markeredgewidth=1.5)
        axes.text(1.02, y, f"{row['macro_ap']:.1f}", color=SERIES[1], **beside)
    if published:
        axes.axhline(len(ours) - 0.5, color=GRID, linewidth=1)
    chance = 100 * result["chance"]["macro_ap"]["mean"]
    axes.axvline(chance, color=MUTED, linewidth=1.2, linestyle=(0, (2, 2)))
    style = {"xytext": (5, 5), "textcoords": "offset points", "color": MUTED, "fontsize": 9.5}
    axes.annotate("chance", (chance, len(names) - 0.1), **style)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.1, -0.7)
    axes.grid(axis="y", visible=False)
    return figure


def image(pixels: np.ndarray, alt: str) -> dict[str, Any]:
    """The attributes of an ``img``: uint8 [H, W, 3 or 4] inlined as WebP."""
    picture, file = Image.fromarray(pixels), io.BytesIO()
    picture.save(file, "WEBP", quality=82, method=2)
    source = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return {"src": source, "alt": alt, "width": picture.width, "height": picture.height}


def shrink(photo: np.ndarray, size: int) -> np.ndarray:
    """Scales a photo's longer side to at most ``size`` pixels; enlarges small photos to half of that."""
    scale = size / max(photo.shape[:2])
    scale = min(scale, max(1.0, scale / 2))
    shape = tuple(max(1, round(side * scale)) for side in photo.shape[1::-1])
    return np.asarray(Image.fromarray(photo).resize(shape, Image.Resampling.LANCZOS))


def rasterise(figure: Figure, width: int) -> np.ndarray:
    """Draws a figure ``width`` pixels wide: uint8 [H, W, 4]."""
    figure.set_dpi(width / figure.get_figwidth())
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def svg(figure: Figure, name: str, title: str) -> markupsafe.Markup:
    """Inlines a figure in the page's font and colours; ``name`` makes its ids unique, screen readers read ``title``."""
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", file.getvalue(), flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text[text.index("<svg") :])
    text = re.sub(r'id="|(?<=["(])#', lambda found: f"{found[0]}{name}-", text)
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, f"var({variable})")
    return markupsafe.Markup(text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1))


def colours_at(values) -> np.ndarray:
    """The colours of maps: float [...] in [0, 1] -> float [..., 3] in 0..255."""
    return 255 * np.asarray(colormaps["inferno"](values))[..., :3]


def _enlarge(values, photo, how) -> np.ndarray:
    """[h, w] -> float32 in [0, 1], of the photo's size; each position covers its share of the photo."""
    small = Image.fromarray(np.asarray(values, np.float32))
    return np.clip(np.asarray(small.resize(photo.shape[1::-1], how)), 0, 1)


def _scaled(values, limits=None) -> np.ndarray:
    low, high = limits or (float(values.min()), float(values.max()))
    return (values - low) / (high - low or 1.0)


def _blend(photo, colours, weight: float) -> np.ndarray:
    """Colours in 0..255 over the photo in grey: uint8 [H, W, 4], opaque."""
    mixed = weight * colours + (1 - weight) * (photo @ np.array([0.299, 0.587, 0.114]))[..., None]
    return np.dstack([np.clip(mixed, 0, 255), np.full(mixed.shape[:2], 255.0)]).round().astype(np.uint8)


def _layout(query, supports) -> np.ndarray:
    """Boxes [[x, y], [w, h]] of all photos, in units of the query's longer side: the supports in a column beside it."""
    gap, between = 0.13, 0.025
    size = np.array(query.shape[1::-1]) / max(query.shape[:2])
    each = (max(size[1], 0.72) + between) / max(len(supports), 1) - between
    sizes = [min(0.85 / w, each / h) * np.array([w, h]) for h, w in (photo.shape[:2] for photo in supports)]
    boxes, top = [[(0, 0), size]], (size[1] + between - sum(h + between for _, h in sizes)) / 2
    for one in sizes:
        boxes.append([(size[0] + gap, top), one])
        top += one[1] + between
    return np.array(boxes)


def _mark(axes: Axes, box, region, before, colour, number, points):
    """Frames a region and numbers its corner, inside of the frames that were there ``before``."""
    (start, size), inset, radius = region, 4.5 * before / points, 9 / points
    frame = (start + inset, *(size - 2 * inset), "round,pad=0,rounding_size=0.008")
    for width, line in ((4.5, "white"), (2.6, colour)):
        axes.add_patch(FancyBboxPatch(*frame, fill=False, linewidth=width, edgecolor=line))
    corner = np.array([before % 2, before // 2 % 2])  # each at another one
    inward = np.minimum(radius, size / 4)
    centre = np.clip(start + inward + corner * (size - 2 * inward), box[0] + radius, box[0] + box[1] - radius)
    badge = {"boxstyle": "circle,pad=0.24", "facecolor": colour, "edgecolor": "white", "linewidth": 1.2}
    style = {"color": ON_MATCH, "ha": "center", "va": "center_baseline", "fontsize": 10, "weight": "bold"}
    axes.text(*centre, str(number), bbox=badge, **style)


def _join(axes: Axes, start, end, colour, lower, lower_there):
    """Draws a curve from the right side of a region to the left side of another, so much below their middles."""
    (x0, y0), (x1, y1) = start[0] + start[1] * (1, 0.5) + (0, lower), end[0] + end[1] * (0, 0.5) + (0, lower_there)
    bend = 0.45 * (x1 - x0)
    path = Path([(x0, y0), (x0 + bend, y0), (x1 - bend, y1), (x1, y1)], [Path.MOVETO, *[Path.CURVE4] * 3])
    for width, line, alpha in ((4.2, "white", 0.5), (2.2, colour, 1.0)):
        axes.add_patch(PathPatch(path, fill=False, edgecolor=line, linewidth=width, alpha=alpha, capstyle="round"))


def _chart(height: float, panels: Mapping[str, float]):
    """A figure and its panels, one below the other, which share their x axis: title -> relative height."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=list(panels.values()))[:, 0]
    for one, title in zip(axes, panels, strict=True):
        one.set_title(title, loc="left", color=INK, fontsize=10)
        one.spines[["top", "right", "left"]].set_visible(False)
        one.spines["bottom"].set_color(GRID)
        one.tick_params(length=0, labelcolor=MUTED, labelsize=9.5)
        one.grid(color=GRID, linewidth=0.8)
        one.set_axisbelow(True)
    return figure, axes
