"""The picture of a table."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

_INK, _MUTED, _GRID, _OURS, _PUBLISHED = "#1d2125", "#68707c", "#dfe3e8", "#1668c4", "#c2570c"


def figure(title: str, entries: Sequence[Mapping]) -> Figure:
    """Ma-AP of every row with its interval, dots for ours and diamonds for published, a panel for each shot count.

    Args:
      title: of the table.
      entries: what the CSV file holds.
    """
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
