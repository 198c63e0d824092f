# SPDX-License-Identifier: Apache-2.0
"""How pictures of pages are drawn: SVG that takes the page's colours, PNG data URIs for images.

A picture of curves is drawn twice, for a page and for a phone, and the page's style shows one of
them: text in one drawing for both would be too small on the phone.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
import torch
from markupsafe import Markup

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.figure import Figure  # noqa: E402

# these become CSS variables, so that one drawing serves light and dark pages
INK, GRID, OURS, THEIRS = "#123456", "#654321", "#d1495c", "#30638f"
AMBER, GREEN, VIOLET, TEAL = "#b8800c", "#3f8f50", "#7b4fa4", "#1b86a9"
VARIABLES = {
    INK: "ink",
    GRID: "grid",
    OURS: "ours",
    THEIRS: "theirs",
    AMBER: "amber",
    GREEN: "green",
    VIOLET: "violet",
    TEAL: "teal",
}
# inches, so that letters are of the page's size in a column of a page and on a phone
WIDE, HALF, NARROW = 8.6, 5.6, 3.7
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mikernels",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def both(draw: Callable[[float], str], wide: float = WIDE) -> Markup:
    """What `draw` makes of a width in inches, for a page and for a phone."""
    sizes = {"wide": wide, "narrow": NARROW}
    parts = (f'<div class="at-{name}">{draw(width)}</div>' for name, width in sizes.items())
    return Markup("".join(parts))


def sparse_minor(value: float, _: int) -> str:
    """Only 2 and 5 between the powers of ten of a logarithmic axis."""
    digit = f"{value:e}"[0]
    return f"{value:g}" if digit in "25" else ""


def percent(power: float, _: int) -> str:
    """`power` of ten as a share, for an axis of logarithms."""
    share = 100 * 10.0**power
    return f"{share:.0f} %" if share >= 10 else f"{share:.2g} %"


def svg(figure: Figure) -> str:
    """The drawing as an inline `<svg>` element, as wide as its column."""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.S)
    # the page's own font and width; ids are made unique by their content and need no prefix
    drawing = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", drawing, count=1)
    drawing = re.sub(r'width="[\d.]+pt"', 'width="100%"', drawing, count=1)
    drawing = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", drawing)
    for colour, name in VARIABLES.items():
        drawing = drawing.replace(colour, f"var(--{name})")
    return drawing


def image(pixels: torch.Tensor, symmetric: bool = False) -> str:
    """A data URI of `[height, width]`: white to black, or blue - white - red about 0."""
    buffer = io.BytesIO()
    bound = max(float(pixels.abs().max()), 1e-12)
    low, name = (-bound, "RdBu_r") if symmetric else (0.0, "gray_r")
    plt.imsave(buffer, pixels.numpy(), cmap=name, vmin=low, vmax=bound, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
