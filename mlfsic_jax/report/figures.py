"""The pictures of a report as functions: overlays as RGBA arrays, charts as matplotlib figures.

Nothing here touches matplotlib's global state: a figure is drawn by ``figure.savefig``, without pyplot. Maps over the
positions of a photo, [h, w], cover the whole photo, since photos are resized without a crop.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:  # matplotlib takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1d2125", "#68707c", "#dfe3e8"
SERIES = ("#1668c4", "#c2570c", "#0f8a63", "#8a45c9", "#a8324a")  # one per shot count
MATCHES = ("#2f9bff", "#ff8a1f", "#21c17a", "#d86bff", "#ffd21f", "#ff5a6e")  # one per matched label, on any photo
ON_MATCH = "#101318"  # numbers on those
COLOURMAP = "inferno"  # perceptually uniform
REMOVED = (206, 208, 212)  # towards this grey, where LCM removed a position
MAX_SUPPORTS = 2  # photos beside one query

_HEAT = 0.62  # weight of a map's colours, the rest is the photo in grey
_WIDTH = 4.2  # inches: a chart fills a phone at its own size


class Match(NamedTuple):
    """A region of a query that met a region of a support photo.

    Attributes:
      label: for which label.
      colour: of this label in this figure.
      support: position of the support photo in the list of photos.
      query_cell: (row, column) on the query's grid.
      support_cell: (row, column) on the support photo's grid.
      contribution: what the pair adds to the label's score.
    """

    label: str
    colour: str
    support: int
    query_cell: tuple[int, int]
    support_cell: tuple[int, int]
    contribution: float


def attention_overlay(photo: np.ndarray, values: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """A map in colours over the photo in grey: bright is high.

    Args:
      photo: uint8 [H, W, 3].
      values: float [h, w], e.g. of ``models.attention_values``; in between it is interpolated.
      limits: what the darkest and the brightest colour stand for; None: the map's own extremes.

    Returns:
      uint8 [H, W, 4], opaque.
    """
    low, high = limits or (float(values.min()), float(values.max()))
    smooth = _enlarge((values - low) / (high - low or 1.0), photo, Image.Resampling.BICUBIC)
    return _opaque(_HEAT * colours_at(smooth) + (1 - _HEAT) * _grey(photo))


def importance_overlay(photo: np.ndarray, importance: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """LCM's map over the photo, position by position: colours where it is kept, grey where it was removed.

    Args:
      photo: uint8 [H, W, 3].
      importance: float [h, w]; the colours run from its lowest to its highest value.
      keep: bool [h, w].

    Returns:
      uint8 [H, W, 4], opaque.
    """
    low, high = float(importance.min()), float(importance.max())
    cells = _enlarge((importance - low) / (high - low or 1.0), photo, Image.Resampling.NEAREST)
    kept = _enlarge(keep.astype(np.float32), photo, Image.Resampling.NEAREST)[..., None] > 0.5
    removed = 0.28 * _grey(photo) + 0.72 * np.array(REMOVED)
    return _opaque(np.where(kept, _HEAT * colours_at(cells) + (1 - _HEAT) * _grey(photo), removed))


def match_figure(
    query: np.ndarray,
    supports: Sequence[np.ndarray],
    matches: Sequence[Match],
    grid: tuple[int, int],
    width: float = 8.0,
) -> Figure:
    """A query photo on the left, support photos on the right, and curves between the regions that met.

    Args:
      query: uint8 [H, W, 3].
      supports: up to two photos, uint8 [H, W, 3] each of its own size.
      matches: what to join; the same number stands at both ends.
      grid: (h, w) of the positions of a photo.
      width: of the figure in inches; the narrower, the larger are lines and numbers beside the photos.

    Returns:
      A figure without background.

    Raises:
      ValueError: more than two support photos.
    """
    from matplotlib.figure import Figure

    if len(supports) > MAX_SUPPORTS:
        raise ValueError(f"supports must be at most {MAX_SUPPORTS} photos, not {len(supports)}")
    gap, between = 0.13, 0.025  # in units of the query's larger side
    scale = 1 / max(query.shape[:2])
    height = query.shape[0] * scale
    each = (max(height, 0.72) - between * (len(supports) - 1)) / max(len(supports), 1)
    boxes = [(0.0, 0.0, query.shape[1] * scale, height)]
    sizes = []
    for photo in supports:
        scale = min(0.85 / photo.shape[1], each / photo.shape[0])
        sizes.append((scale * photo.shape[1], scale * photo.shape[0]))
    left = boxes[0][2] + gap
    top = (height - sum(h for _, h in sizes) - between * (len(sizes) - 1)) / 2
    for w, h in sizes:
        boxes.append((left, top, w, h))
        top += h + between
    right = max(x + w for x, _, w, _ in boxes)
    low, high = min(box[1] for box in boxes), max(box[1] + box[3] for box in boxes)

    figure = Figure(figsize=(width, width * (high - low) / right))
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for photo, (x, y, w, h) in zip((query, *supports), boxes, strict=True):
        axes.imshow(photo, extent=(x, x + w, y + h, y), aspect="auto", interpolation="bilinear")
    axes.set(xlim=(0, right), ylim=(high, low))
    points = 72 * width / right  # in one unit
    seen: collections.Counter = collections.Counter()
    ends = []
    for match in matches:
        for at, cell in ((0, match.query_cell), (1 + match.support, match.support_cell)):
            ends.append((boxes[at], _region(boxes[at], cell, grid), seen[at, cell], match.colour))
            seen[at, cell] += 1
    for (_, start, before, colour), (_, end, before_there, _) in zip(ends[::2], ends[1::2], strict=True):
        _join(axes, start, end, colour, 6 * before / points, 6 * before_there / points)
    for number, (box, region, before, colour) in enumerate(ends):
        _mark(axes, box, region, before, colour, number // 2 + 1, points)
    return figure


def training_curves(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Losses and validation Ma-AP over the steps, a colour for each shot count.

    Solid is the loss of the queries, dashed that of the words; a ring marks the best checkpoint.

    Args:
      metrics: lines of ``metrics.jsonl``.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    figure, (loss, ap) = _chart(4.3, 2, height_ratios=(1, 1))
    for colour, (n_shot, lines) in zip(SERIES, _by_shot(metrics), strict=False):
        steps = [line["step"] for line in lines]
        loss.plot(steps, [line["cm_loss"] for line in lines], color=colour, linestyle=(0, (4, 2)))
        loss.plot(steps, [line["query_loss"] for line in lines], color=colour, marker="o")
        values = [100 * line["validation_macro_ap"] for line in lines]
        ap.plot(steps, values, color=colour, marker="o", label=f"{n_shot}-shot")
        best = int(np.argmax(values))
        ap.plot(steps[best], values[best], "o", color=colour, markersize=10, fillstyle="none")
    loss.set_yscale("log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_locator(NullLocator())
    loss.tick_params(labelbottom=False)
    ap.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    loss.sharex(ap)
    _title(loss, "Loss of an episode")
    _title(ap, "Ma-AP on validation labels, %")
    ap.set_xlabel("step", color=MUTED)
    _legend(ap)
    return figure


def theta_sweep(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Ma-AP of LCM and the share of positions it keeps, over its threshold.

    Solid is on validation labels, where theta is chosen (ring), dashed on novel labels.

    Args:
      results: what ``results.json`` holds.
    """
    figure, (ap, kept) = _chart(4.3, 2, height_ratios=(2, 1))
    for colour, result in zip(SERIES, results, strict=False):
        theta = result["theta"]
        sweep = sorted(theta["sweep"], key=lambda point: point["theta"])
        x = [point["theta"] for point in sweep]
        on_validation = [100 * point["validation_macro_ap"] for point in sweep]
        ap.plot(x, on_validation, color=colour, marker="o", label=f"{result['n_shot']}-shot")
        ap.plot(x, [100 * point["novel_macro_ap"] for point in sweep], color=colour, linestyle=(0, (4, 2)))
        chosen = x.index(theta["chosen"])
        ap.plot(x[chosen], on_validation[chosen], "o", color=colour, markersize=10, fillstyle="none")
        kept.plot(x, [100 * point["kept"] for point in sweep], color=colour, marker="o")
    _title(ap, "Ma-AP of LCM, %")
    ap.tick_params(labelbottom=False)
    kept.sharex(ap)
    _title(kept, "Positions kept, %")
    kept.set_ylim(0, 100)
    kept.set_xlabel("theta", color=MUTED)
    _legend(ap)
    return figure


def results_chart(results: Sequence[Mapping[str, Any]], published: Sequence[Mapping[str, Any]] = ()) -> Figure:
    """Ma-AP of every method with its 95 % interval, a panel for each shot count, and published numbers below.

    Args:
      results: what ``results.json`` holds.
      published: rows of ``published.json``, in percent; those of a panel's shot count are drawn in it.
    """
    rows = [[row for row in published if row["n_shot"] == result["n_shot"]] for result in results]
    lengths = [len(result["methods"]) + 1 + len(below) for result, below in zip(results, rows, strict=True)]
    figure, panels = _chart(0.7 * len(results) + 0.235 * sum(lengths), len(results), height_ratios=lengths)
    for axes, result, below in zip(panels, results, rows, strict=True):
        chance = 100 * result["chance"]["macro_ap"]["mean"]
        ours = sorted(result["methods"].items(), key=lambda item: -item[1]["macro_ap"]["mean"])
        names = [name.replace("_", " ") for name, _ in ours]
        for y, (_, values) in enumerate(ours):
            mean, half = 100 * values["macro_ap"]["mean"], 100 * values["macro_ap"]["ci95"]
            colour = SERIES[0] if y == 0 else INK
            axes.plot([mean - half, mean + half], [y, y], color=colour, linewidth=5, alpha=0.28, solid_capstyle="round")
            axes.plot(mean, y, "o", color=colour, markersize=6)
            axes.text(1.02, y, f"{mean:.1f}", transform=axes.get_yaxis_transform(), color=colour, va="center")
        for y, row in enumerate(below, len(ours)):
            names.append(f"{row['method']} {row['words']}".strip() + " *")
            axes.plot(row["macro_ap"], y, "D", color=SERIES[1], markersize=6, fillstyle="none", markeredgewidth=1.5)
            place = axes.get_yaxis_transform()
            axes.text(1.02, y, f"{row['macro_ap']:.1f}", transform=place, color=SERIES[1], va="center")
        if below:
            axes.axhline(len(ours) - 0.5, color=GRID, linewidth=1)
        axes.axvline(chance, color=MUTED, linewidth=1.2, linestyle=(0, (2, 2)))
        style = {"xytext": (5, 5), "textcoords": "offset points", "color": MUTED, "fontsize": 9.5}
        axes.annotate("chance", (chance, len(names) - 0.1), **style)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.1, -0.7)
        axes.grid(axis="y", visible=False)
        _title(axes, f"Ma-AP, {result['n_shot']}-shot, %")
    return figure


def colours_at(values) -> np.ndarray:
    """The colours of maps, for a legend: float [...] in [0, 1] -> float [..., 3] in 0..255."""
    from matplotlib import colormaps

    return 255 * np.asarray(colormaps[COLOURMAP](values))[..., :3]


def _by_shot(metrics):
    shots = sorted({line["n_shot"] for line in metrics})
    return [(k, [line for line in metrics if line["n_shot"] == k]) for k in shots]


def _enlarge(values, photo, how) -> np.ndarray:
    """float [h, w] -> float32 in [0, 1], of the photo's size; each position covers its share of the photo."""
    small = Image.fromarray(np.asarray(values, np.float32))
    return np.clip(np.asarray(small.resize(photo.shape[1::-1], how)), 0, 1)


def _grey(photo) -> np.ndarray:
    """float [H, W, 1] in 0..255."""
    return (photo @ np.array([0.299, 0.587, 0.114]))[..., None]


def _opaque(colours) -> np.ndarray:
    alpha = np.full((*colours.shape[:2], 1), 255.0)
    return np.concatenate([np.clip(colours, 0, 255), alpha], axis=-1).round().astype(np.uint8)


def _region(box, cell, grid):
    x, y, w, h = box
    row, column = cell
    return x + column * w / grid[1], y + row * h / grid[0], w / grid[1], h / grid[0]


def _mark(axes: Axes, box, region, before, colour, number, points):
    """A frame around the region and a number in its corner; inside of those that were there ``before``."""
    from matplotlib.patches import FancyBboxPatch

    x, y, w, h = region
    inset = 4.5 * before / points
    frame = ((x + inset, y + inset), w - 2 * inset, h - 2 * inset, "round,pad=0,rounding_size=0.008")
    for width, line in ((4.5, "white"), (2.6, colour)):
        axes.add_patch(FancyBboxPatch(*frame, fill=False, linewidth=width, edgecolor=line))
    radius = 9 / points
    right, down = before % 2, before // 2 % 2  # each at another corner
    inward = min(radius, w / 4), min(radius, h / 4)
    centre = (
        np.clip(x + inward[0] + right * (w - 2 * inward[0]), box[0] + radius, box[0] + box[2] - radius),
        np.clip(y + inward[1] + down * (h - 2 * inward[1]), box[1] + radius, box[1] + box[3] - radius),
    )
    badge = {"boxstyle": "circle,pad=0.24", "facecolor": colour, "edgecolor": "white", "linewidth": 1.2}
    axes.text(
        *centre, str(number), color=ON_MATCH, bbox=badge, ha="center", va="center_baseline", fontsize=10, weight="bold"
    )


def _join(axes: Axes, start, end, colour, lower, lower_there):
    """A curve from the right side of a region to the left side of another, so much below their middles."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    x0, y0 = start[0] + start[2], start[1] + start[3] / 2 + lower
    x1, y1 = end[0], end[1] + end[3] / 2 + lower_there
    bend = 0.45 * (x1 - x0)
    path = Path([(x0, y0), (x0 + bend, y0), (x1 - bend, y1), (x1, y1)], [Path.MOVETO, *[Path.CURVE4] * 3])
    for width, line, alpha in ((4.2, "white", 0.5), (2.2, colour, 1.0)):
        axes.add_patch(PathPatch(path, fill=False, edgecolor=line, linewidth=width, alpha=alpha, capstyle="round"))


def _chart(height: float, panels: int, height_ratios):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False, height_ratios=height_ratios)[:, 0]
    for one in axes:
        one.spines[["top", "right", "left"]].set_visible(False)
        one.spines["bottom"].set_color(GRID)
        one.tick_params(length=0, labelcolor=MUTED, labelsize=9.5)
        one.grid(color=GRID, linewidth=0.8)
        one.set_axisbelow(True)
    return figure, axes


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", color=INK, fontsize=10)


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, labelcolor=INK, fontsize=9.5)
