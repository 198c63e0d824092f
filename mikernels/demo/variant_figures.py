# SPDX-License-Identifier: Apache-2.0
"""The report's pictures of the variants: all learning curves in one, a density for each."""

from __future__ import annotations

import math

import torch
from matplotlib.ticker import FixedLocator, FuncFormatter

from mikernels.demo.judge import Outcome
from mikernels.report.drawing import (
    AMBER,
    GREEN,
    OURS,
    STYLE,
    TEAL,
    VIOLET,
    WIDE,
    percent,
    plt,
    sparse_minor,
    svg,
)

COLOURS = {
    "topk": OURS,
    "batch_topk": AMBER,
    "matryoshka": GREEN,
    "jumprelu": VIOLET,
    "lista_matryoshka": TEAL,
}
# points between the labels of two curves
GAP = 14.0
BINS = 36
# of the FVU; 1 is the mean alone, and what starts far above it would press all else together
TOP = 1.2


def learning_curves(outcomes: list[Outcome], width: float = WIDE) -> str:
    """The FVU of every training batch by step, each curve labelled at its end."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(width, 4.2), layout="constrained")
        for outcome in outcomes:
            steps = [row["step"] for row in outcome.rows]
            fvu = [row["fvu"] for row in outcome.rows]
            axes.plot(steps, fvu, color=COLOURS[outcome.variant.architecture], lw=1.4)
        axes.set_yscale("log")
        axes.set_ylim(top=min(TOP, axes.get_ylim()[1]))
        axes.set_ylabel("FVU of the batch")
        axes.set_xlabel("step")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(sparse_minor))
        axes.grid(axis="y", which="both")
        # where the ends are is known once the figure is laid out
        figure.canvas.draw()
        ends = [(outcome.rows[-1]["step"], outcome.rows[-1]["fvu"]) for outcome in outcomes]
        at = [float(axes.transData.transform(end)[1]) * 72 / figure.dpi for end in ends]
        for outcome, end, here, there in zip(outcomes, ends, at, apart(at, GAP), strict=True):
            colour = COLOURS[outcome.variant.architecture]
            axes.annotate(
                outcome.variant.title,
                end,
                xytext=(16, there - here),
                textcoords="offset points",
                va="center",
                color=colour,
                fontsize="medium" if width == WIDE else "small",
                annotation_clip=False,
                arrowprops={
                    "arrowstyle": "-",
                    "color": colour,
                    "lw": 0.8,
                    "shrinkA": 1,
                    "shrinkB": 1,
                    "relpos": (0, 0.5),
                },
            )
        return svg(figure)


def apart(places: list[float], gap: float) -> list[float]:
    """The places nearest to these, in their order, that are `gap` or more apart."""
    order = sorted(range(len(places)), key=places.__getitem__)
    # runs of labels that touch, each at the mean of what its labels want: [first, wanted, count]
    runs: list[tuple[int, float, int]] = []
    for rank, i in enumerate(order):
        run = (rank, places[i] - gap * rank, 1)
        while runs and runs[-1][1] > run[1]:
            first, wanted, count = runs.pop()
            total = count + run[2]
            run = (first, (wanted * count + run[1] * run[2]) / total, total)
        runs.append(run)
    found = list(places)
    for first, wanted, count in runs:
        for rank in range(first, first + count):
            found[order[rank]] = wanted + gap * rank
    return found


def density_multiples(outcomes: list[Outcome], n_rows: int, unit: str) -> list[str]:
    """For every variant, how many features are active on which share of the rows; same axes."""
    lowest = math.floor(-math.log10(n_rows))
    edges = torch.linspace(lowest, 0, BINS + 1, dtype=torch.float64)
    counts = [
        torch.histogram(outcome.density[outcome.density > 0].log10(), edges).hist.numpy()
        for outcome in outcomes
    ]
    tallest = max(1.0, *(float(count.max()) for count in counts))
    drawings = []
    with plt.rc_context({**STYLE, "font.size": 9.5}):
        for outcome, count in zip(outcomes, counts, strict=True):
            figure, axes = plt.subplots(figsize=(3.3, 1.9), layout="constrained")
            colour = COLOURS[outcome.variant.architecture]
            axes.stairs(count, edges.numpy(), fill=True, color=colour, alpha=0.85)
            axes.set_xlim(lowest, 0)
            axes.set_ylim(0, 1.05 * tallest)
            axes.xaxis.set_major_locator(FixedLocator(range(lowest, 1)))
            axes.xaxis.set_major_formatter(FuncFormatter(percent))
            axes.set_xlabel(f"share of {unit} (log)")
            axes.set_ylabel("features")
            axes.grid(axis="y")
            axes.set_axisbelow(True)
            drawings.append(svg(figure))
    return drawings
