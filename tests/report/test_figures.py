"""Overlays pixel by pixel, charts by what they draw."""

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyBboxPatch, PathPatch

from mlfsic_jax.report import figures
from mlfsic_jax.run.explain import Match

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
GREY = (0.299 * PHOTO[..., 0] + 0.587 * PHOTO[..., 1] + 0.114 * PHOTO[..., 2])[..., None]


def mixed(value):
    """float [..., 3]: the colour of ``value`` over the photo, by matplotlib's own table."""
    return 0.62 * 255 * np.array(matplotlib.colormaps["inferno"](value))[:3] + 0.38 * GREY


@pytest.mark.parametrize(("limits", "expected"), [((0.0, 4.0), 0.25), ((-1.0, 1.0), 1.0), (None, 0.0)])
def test_attention_has_the_colour_of_its_value(limits, expected):
    got = figures.attention_overlay(PHOTO, np.full((2, 3), 1.0), limits)
    assert got.shape == (40, 60, 4) and got.dtype == np.uint8 and (got[..., 3] == 255).all()
    np.testing.assert_allclose(got[..., :3], mixed(expected), atol=0.51)  # rounding to whole numbers


def test_attention_is_brightest_in_its_own_cell():
    values = np.zeros((4, 5))
    values[1, 3] = 1.0
    got = figures.attention_overlay(np.zeros_like(PHOTO), values).astype(int).sum(axis=-1)
    row, column = np.unravel_index(got.argmax(), got.shape)
    assert (row // 10, column // 12) == (1, 3)  # 40 x 60 pixels over 4 x 5 positions


def test_importance_is_grey_where_removed():
    importance = np.array([[0.0, 1.0, 2.0], [3.0, 4.0, 8.0]])
    keep = np.array([[True, False, True], [False, False, True]])
    got = figures.importance_overlay(PHOTO, importance, keep)
    assert got.shape == (40, 60, 4) and (got[..., 3] == 255).all()
    for row in range(2):
        for column in range(3):
            cell = np.s_[20 * row : 20 * row + 20, 20 * column : 20 * column + 20]
            removed = 0.28 * GREY + 0.72 * np.array(figures.REMOVED)
            expected = mixed(importance[row, column] / 8) if keep[row, column] else removed
            np.testing.assert_allclose(got[cell][..., :3], np.broadcast_to(expected, PHOTO.shape)[cell], atol=0.51)


def match(label, support, query_cell, support_cell):
    return Match(label, support, query_cell, support_cell, 0.1)


def frames(figure):
    """(x, y, w, h) of the coloured frames, in the order of drawing."""
    (axes,) = figure.axes
    boxes = [p for p in axes.patches if isinstance(p, FancyBboxPatch) and p.get_edgecolor()[:3] != (1, 1, 1)]
    return [(b.get_x(), b.get_y(), b.get_width(), b.get_height()) for b in boxes]


def test_matches_stand_on_their_regions():
    supports = [PHOTO[:, :30], PHOTO]
    matches = [match("a", 0, (0, 2), (3, 1)), match("b", 1, (2, 0), (0, 0))]
    figure = figures.match_figure(PHOTO, supports, matches, grid=(4, 5), width=6.0)
    (axes,) = figure.axes
    extents = [image.get_extent() for image in axes.images]  # x0, x1, bottom, top
    for (x0, x1, y1, y0), photo in zip(extents, [PHOTO, *supports], strict=True):
        np.testing.assert_allclose((x1 - x0) / (y1 - y0), photo.shape[1] / photo.shape[0])
    expected = []
    for m in matches:
        for at, (row, column) in ((0, m.query_cell), (1 + m.support, m.support_cell)):
            x0, x1, y1, y0 = extents[at]
            w, h = (x1 - x0) / 5, (y1 - y0) / 4
            expected.append((x0 + column * w, y0 + row * h, w, h))
    np.testing.assert_allclose(frames(figure), expected)
    assert [text.get_text() for text in axes.texts] == ["1", "1", "2", "2"]
    curves = [p.get_path().vertices for p in axes.patches if isinstance(p, PathPatch)][::2]
    for curve, (start, end) in zip(curves, zip(expected[::2], expected[1::2], strict=True), strict=True):
        np.testing.assert_allclose(curve[0], (start[0] + start[2], start[1] + start[3] / 2))
        np.testing.assert_allclose(curve[-1], (end[0], end[1] + end[3] / 2))
    assert figure.get_figwidth() == 6.0


def test_two_labels_on_one_region_are_both_seen():
    figure = figures.match_figure(
        PHOTO, [PHOTO], [match("a", 0, (1, 1), (0, 0)), match("b", 0, (1, 1), (2, 2))], (4, 5)
    )
    first, second = frames(figure)[::2]
    assert second[0] > first[0] and second[1] > first[1] and second[2] < first[2] and second[3] < first[3]
    places = [text.get_position() for text in figure.axes[0].texts[::2]]
    assert places[0] != places[1]
    starts = [p.get_path().vertices[0] for p in figure.axes[0].patches if isinstance(p, PathPatch)][::2]
    assert starts[0][0] == starts[1][0] and starts[0][1] < starts[1][1]  # two curves, not one


def test_a_match_is_drawn_in_its_colour():
    black = np.zeros((70, 70, 3), np.uint8)
    figure = figures.match_figure(black, [black], [match("a", 0, (3, 3), (3, 3))], (7, 7))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    coloured = np.abs(pixels[..., :3] / 255.0 - to_rgb(figures.MATCHES[0])).max(axis=-1) < 0.02
    height, width = pixels.shape[:2]
    rows, columns = np.nonzero(coloured)
    assert coloured.sum() > 500 and abs(rows.mean() / height - 0.5) < 0.05
    assert columns.min() < 0.3 * width and columns.max() > 0.7 * width  # on both photos
    assert pixels[2, width * 55 // 100, 3] == 0  # nothing behind the curves


def test_a_query_may_stand_alone_but_not_beside_three():
    figure = figures.match_figure(PHOTO, [], [], (4, 5), width=6.0)
    assert len(figure.axes[0].images) == 1 and not figure.axes[0].patches
    np.testing.assert_allclose(figure.get_size_inches(), [6, 4])
    with pytest.raises(ValueError, match="at most 2 photos, not 3"):
        figures.match_figure(PHOTO, [PHOTO] * 3, [], (4, 5))


METRICS = [
    {"n_shot": k, "step": 10 * i, "cm_loss": 5.0 + k - i, "query_loss": 9.0 - i, "validation_macro_ap": ap}
    for k, aps in ((1, (0.3, 0.5, 0.4)), (5, (0.6, 0.7, 0.8)))
    for i, ap in enumerate(aps, 1)
]


def test_training_curves_draw_the_metrics():
    loss, ap = figures.training_curves(METRICS).axes
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [[10, 5], [20, 4], [30, 3]])  # cm_loss, 1-shot
    np.testing.assert_allclose(loss.lines[3].get_ydata(), [8, 7, 6])  # query_loss, 5-shot
    np.testing.assert_allclose(ap.lines[0].get_ydata(), [30, 50, 40])
    np.testing.assert_allclose([line.get_xydata()[0] for line in ap.lines[1::2]], [[20, 50], [30, 80]])  # rings
    assert [text.get_text() for text in ap.get_legend().get_texts()] == ["1-shot", "5-shot"]


def values(mean, half):
    return {"macro_ap": {"mean": mean, "ci95": half}}


RESULTS = [
    {
        "n_shot": k,
        "methods": {"base": values(0.5, 0.02), "lcm": values(0.6, 0.01), "ridge": values(0.55, 0.03)},
        "chance": values(0.2, 0.01),
        "theta": {
            "chosen": 0.53,
            "sweep": [
                {"theta": 0.55, "kept": 0.4, "validation_macro_ap": 0.61, "novel_macro_ap": 0.51},
                {"theta": 0.53, "kept": 0.7, "validation_macro_ap": 0.64, "novel_macro_ap": 0.53},
            ],
        },
    }
    for k in (1, 5)
]


def test_theta_sweep_draws_the_sweep_in_order():
    ap, kept = figures.theta_sweep(RESULTS).axes
    validation, novel, ring = ap.lines[:3]
    np.testing.assert_allclose(validation.get_xydata(), [[0.53, 64], [0.55, 61]])
    np.testing.assert_allclose(novel.get_ydata(), [53, 51])
    np.testing.assert_allclose(ring.get_xydata(), [[0.53, 64]])
    np.testing.assert_allclose(kept.lines[1].get_ydata(), [70, 40])


def test_results_chart_sorts_and_puts_published_numbers_below():
    rows = [{"n_shot": k, "method": "LCM", "words": "GloVe", "macro_ap": 58.0 + k} for k in (1, 5)]
    for result, row in zip(RESULTS, rows, strict=True):
        (axes,) = figures.results_chart(result, [row]).axes
        assert [t.get_text() for t in axes.get_yticklabels()] == ["lcm", "ridge", "base", "LCM GloVe *"]
        intervals, dots = axes.lines[0:6:2], axes.lines[1:6:2]
        np.testing.assert_allclose([line.get_xydata()[0] for line in dots], [[60, 0], [55, 1], [50, 2]])
        np.testing.assert_allclose([line.get_xdata() for line in intervals], [[59, 61], [52, 58], [48, 52]])
        np.testing.assert_allclose(axes.lines[6].get_xydata(), [[row["macro_ap"], 3]])
        assert {"60.0", f"{row['macro_ap']:.1f}", "chance"} <= {t.get_text() for t in axes.texts}
    (alone,) = figures.results_chart(RESULTS[0]).axes
    assert len(alone.get_yticklabels()) == 3


def test_labels_have_colours_in_the_order_of_their_matches():
    matches = [match("dog", 0, (0, 0), (0, 0)), match("dog", 0, (0, 1), (0, 1)), match("cat", 1, (0, 0), (0, 0))]
    assert figures.match_colours(matches) == {"dog": figures.MATCHES[0], "cat": figures.MATCHES[1]}


def test_matplotlibs_settings_stay_as_they_are():
    before = dict(matplotlib.rcParams)
    figures.results_chart(RESULTS[0])
    figures.training_curves(METRICS)
    assert dict(matplotlib.rcParams) == before
