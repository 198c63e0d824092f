# SPDX-License-Identifier: Apache-2.0
"""The report's pictures of a training run, each of a width in inches; see `drawing.both`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter

from mikernels.report.drawing import (
    INK,
    OURS,
    STYLE,
    THEIRS,
    WIDE,
    plt,
    sparse_minor,
    svg,
)

# more points than a column of a page has pixels are drawn as the mean of neighbours
POINTS = 600


def _thinned(values: Sequence[float]) -> list[float]:
    every = -(-len(values) // POINTS)
    return [
        sum(part) / len(part)
        for part in (values[i : i + every] for i in range(0, len(values), every))
    ]


def learning_curves(rows: Sequence[Mapping[str, Any]], width: float = WIDE) -> str:
    """FVU, L0 and dead features by step, of the rows that have them."""
    lines = (("fvu", "FVU", OURS), ("l0", "L0", THEIRS), ("dead_fraction", "dead", INK))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            3, 1, figsize=(width, 4.6), sharex=True, height_ratios=(2.2, 1, 1), layout="constrained"
        )
        for axes, (name, label, colour) in zip(panels, lines, strict=True):
            known = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if known:
                steps, values = (_thinned(column) for column in zip(*known, strict=True))
                axes.plot(steps, values, color=colour, lw=1.4)
            axes.set_ylabel(label)
            axes.grid(axis="y")
        top, _, bottom = panels
        if all((line.get_ydata() > 0).all() for line in top.get_lines()):
            top.set_yscale("log")
            top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            top.yaxis.set_minor_formatter(FuncFormatter(sparse_minor))
        bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        bottom.set_ylim(bottom=0)
        bottom.set_xlabel("step")
        figure.align_ylabels()
        return svg(figure)
