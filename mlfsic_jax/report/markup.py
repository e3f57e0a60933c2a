"""Arrays and figures as HTML."""

from __future__ import annotations

import base64
import html
import io
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mlfsic_jax.report import figures

if TYPE_CHECKING:
    import markupsafe
    from matplotlib.figure import Figure

_COLOURS = {figures.INK: "--ink", figures.MUTED: "--muted", figures.GRID: "--line"} | {
    colour: f"--series-{i}" for i, colour in enumerate(figures.SERIES, 1)
}


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(width / figure.get_figwidth())
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def svg(figure: Figure, name: str, title: str) -> markupsafe.Markup:
    """Inlines a figure in the page's font and colours, so that it follows light and dark.

    ``name`` makes its ids unique in the page, ``title`` is for screen readers.
    """
    import markupsafe
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", file.getvalue(), flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text[text.index("<svg") :])
    text = re.sub(r'id="|(?<=["(])#', lambda found: f"{found[0]}{name}-", text)
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, f"var({variable})")
    return markupsafe.Markup(text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1))
