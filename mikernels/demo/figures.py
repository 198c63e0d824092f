# SPDX-License-Identifier: Apache-2.0
"""The report's pictures: SVG that takes the page's colours, PNG data URIs for images."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

from mikernels.demo.compare import NAMES  # noqa: E402

# these become CSS variables, so that one drawing serves light and dark pages
INK, GRID, OURS, THEIRS = "#123456", "#654321", "#d1495c", "#30638f"
VARIABLES = {INK: "ink", GRID: "grid", OURS: "ours", THEIRS: "theirs"}
PARTS = {
    "encode": THEIRS,
    "decode": "#5fa8d3",
    "gradients": OURS,
    "optimizer": "#edae49",
    "other": "#9aa5b1",
}
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


def loss_curves(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """Both losses by step, one on top of the other, and their relative difference below."""
    with plt.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(7.6, 4.6), sharex=True, height_ratios=(3, 1.1), layout="constrained"
        )
        top.plot(
            [r["step"] for r in ours], [r["loss"] for r in ours], color=OURS, lw=4.5, alpha=0.4
        )
        top.plot([r["step"] for r in theirs], [r["loss"] for r in theirs], color=THEIRS, lw=1.4)
        top.set_yscale("log")
        top.set_ylabel("loss (MSE)")
        top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        top.yaxis.set_minor_formatter(FuncFormatter(_sparse_minor))
        top.grid(axis="y")
        last = theirs[-1]
        top.annotate(
            NAMES["dense"],
            (last["step"], last["loss"]),
            xytext=(14, 26),
            textcoords="offset points",
            color=THEIRS,
            arrowprops={"arrowstyle": "-", "color": THEIRS, "lw": 0.8},
        )
        middle = ours[3 * len(ours) // 5]
        top.annotate(
            NAMES["fused"],
            (middle["step"], middle["loss"]),
            xytext=(14, 26),
            textcoords="offset points",
            color=OURS,
            arrowprops={"arrowstyle": "-", "color": OURS, "lw": 0.8},
        )
        common = dict(zip([r["step"] for r in theirs], theirs, strict=True))
        pairs = [
            (r["step"], r["loss"], common[r["step"]]["loss"]) for r in ours if r["step"] in common
        ]
        floor = 1e-8
        gaps = [max(abs(a - b) / abs(b), floor) for _, a, b in pairs]
        bottom.plot([step for step, _, _ in pairs], gaps, color=INK, lw=1.2)
        bottom.set_yscale("log")
        bottom.set_ylabel("relative\ndifference")
        bottom.set_xlabel("step")
        bottom.grid(axis="y")
        figure.align_ylabels()
        return svg(figure)


def _sparse_minor(value: float, _: int) -> str:
    digit = f"{value:e}"[0]
    return f"{value:g}" if digit in "25" else ""


def step_parts(bars: dict[str, dict[str, float]]) -> str:
    """Stacked horizontal bars: milliseconds of a step by part, one bar a run."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.6, 1.3 + 0.52 * len(bars)), layout="constrained")
        for row, (_, parts) in enumerate(bars.items()):
            left = 0.0
            for part, colour in PARTS.items():
                axes.barh(row, parts.get(part, 0.0), left=left, color=colour, height=0.62)
                left += parts.get(part, 0.0)
            axes.annotate(
                f"{left:,.0f} ms",
                (left, row),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontweight="bold",
            )
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in PARTS.values()]
        figure.legend(
            handles, list(PARTS), loc="outside upper left", ncols=5, frameon=False, handlelength=0.9
        )
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("milliseconds a step")
        longest = max(sum(parts.values()) for parts in bars.values())
        axes.set_xlim(0, 1.15 * longest)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        return svg(figure)


def density_histogram(counts: torch.Tensor, n_rows: int, unit: str = "tokens") -> str:
    """log10 of the share of rows on which each feature is active; features never active apart."""
    density = counts.double() / n_rows
    active = density[density > 0].log10()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.6, 2.7), layout="constrained")
        axes.hist(active.numpy(), bins=60, color=OURS, alpha=0.85)
        axes.set_xlabel(f"share of {unit} on which a feature is active")
        axes.set_ylabel("features")
        axes.xaxis.set_major_formatter(FuncFormatter(_percent))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        silent = int((counts == 0).sum())
        note = f"{len(counts) - silent:,} of {len(counts):,} features are active"
        axes.set_title(note, loc="right", fontsize="medium")
        return svg(figure)


def _percent(power: float, _: int) -> str:
    return f"{100 * 10**power:.2g} %"


def image(pixels: torch.Tensor, symmetric: bool = False) -> str:
    """A data URI of `[height, width]`: white to black, or blue - white - red about 0."""
    buffer = io.BytesIO()
    bound = max(float(pixels.abs().max()), 1e-12)
    low, name = (-bound, "RdBu_r") if symmetric else (0.0, "gray_r")
    plt.imsave(buffer, pixels.numpy(), cmap=name, vmin=low, vmax=bound, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
