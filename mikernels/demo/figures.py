# SPDX-License-Identifier: Apache-2.0
"""The report's pictures of the two runs: losses, where the time goes, how often features fire.

Each takes its width in inches; see `drawing.both`.
"""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.ticker import FuncFormatter

from mikernels.demo.compare import NAMES
from mikernels.report.drawing import (
    INK,
    OURS,
    STYLE,
    THEIRS,
    WIDE,
    percent,
    plt,
    sparse_minor,
    svg,
)

PARTS = {
    "encode": THEIRS,
    "decode": "#a5d4ea",
    "gradients": OURS,
    "optimizer": "#edae49",
    "other": "#9aa5b1",
}


def loss_curves(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], width: float = WIDE
) -> str:
    """Both losses by step, one on top of the other, and their relative difference below."""
    with plt.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(width, 4.6), sharex=True, height_ratios=(3, 1.1), layout="constrained"
        )
        top.plot(
            [r["step"] for r in ours], [r["loss"] for r in ours], color=OURS, lw=4.5, alpha=0.4
        )
        top.plot([r["step"] for r in theirs], [r["loss"] for r in theirs], color=THEIRS, lw=1.4)
        top.set_yscale("log")
        top.set_ylabel("loss (MSE)")
        top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        top.yaxis.set_minor_formatter(FuncFormatter(sparse_minor))
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


def step_parts(bars: dict[str, dict[str, float]], width: float = WIDE) -> str:
    """Stacked horizontal bars: milliseconds of a step by part, one bar a run."""
    with plt.rc_context(STYLE):
        columns = len(PARTS) if width == WIDE else 3
        height = 1.1 + 0.2 * -(-len(PARTS) // columns) + 0.52 * len(bars)
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
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
            handles,
            list(PARTS),
            loc="outside upper left",
            ncols=columns,
            frameon=False,
            handlelength=0.9,
        )
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("milliseconds a step")
        longest = max(sum(parts.values()) for parts in bars.values())
        axes.set_xlim(0, (1.15 if width == WIDE else 1.4) * longest)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        return svg(figure)


def density_histogram(
    counts: torch.Tensor, n_rows: int, unit: str = "tokens", width: float = WIDE
) -> str:
    """log10 of the share of rows on which each feature is active; features never active apart."""
    density = counts.double() / n_rows
    active = density[density > 0].log10()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(width, 2.7), layout="constrained")
        axes.hist(active.numpy(), bins=60, color=OURS, alpha=0.85)
        axes.set_xlabel(f"share of {unit} on which a feature is active")
        axes.set_ylabel("features")
        axes.xaxis.set_major_formatter(FuncFormatter(percent))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        silent = int((counts == 0).sum())
        note = f"{len(counts) - silent:,} of {len(counts):,} features are active"
        axes.set_title(note, loc="right", fontsize="medium")
        return svg(figure)
