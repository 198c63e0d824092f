# SPDX-License-Identifier: Apache-2.0
"""What the report says of the variants side by side."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from mikernels.demo.judge import COLUMNS, Outcome
from mikernels.demo.options import DemoOptions
from mikernels.demo.variant_figures import COLOURS, TOP, density_multiples, learning_curves
from mikernels.report.drawing import VARIABLES, both

COUNTS = ("No", "One", "Two", "Three", "Four", "Five", "Six")


def side_by_side(
    outcomes: list[Outcome], options: DemoOptions, n_rows: int, unit: str
) -> dict[str, Any]:
    """The template's values: title, note, table, curves, densities and sources."""
    drawings = density_multiples(outcomes, n_rows, unit)
    tokens = options.steps * options.batch_size
    many = COUNTS[len(outcomes)]
    return {
        "title": f"{many} variants on the same {unit}",
        "notes": (
            f"Every variant has as many features, starts from the same decoder, sees the same "
            f"{tokens:,} {unit} ({options.steps} steps) in the same order with the same learning "
            f"rates, aims at {options.k} active features at a time, and is trained with the fused "
            f"step.",
            f"Read FVU together with L0: more active features explain more. Only TopK meets "
            f"{options.k} by construction; where a threshold decides, L0 is what comes out. "
            f"Matryoshka gives up some FVU so that its first features can stand alone, and no "
            f"column here shows what that is good for. So short a run from one seed says how fast "
            f"a variant learns with these settings, not which is the best.",
        ),
        "columns": COLUMNS,
        "rows": [(outcome.variant.title, *outcome.cells()) for outcome in outcomes],
        "table_note": (
            f"FVU and L0 of held-out {unit}, each encoded as in use. A feature is dead that did "
            f"not fire in the last sixth of training. Times are of the median step, memory as in "
            f"the first table."
        ),
        "curves": both(lambda width: learning_curves(outcomes, width)),
        "curves_note": (
            f"Fraction of variance unexplained of each training batch, of all features; lower is "
            f"better, and 1 is what the mean alone leaves{_cut(outcomes)}. Curves drop where the "
            f"same {unit} come round again; the held-out FVU is free of that."
        ),
        "densities": [
            {
                "title": outcome.variant.title,
                "dead": f"{outcome.dead_fraction:.1%} dead",
                "l0": f"L0 {outcome.l0:.1f}",
                "figure": Markup(drawing),
            }
            for outcome, drawing in zip(outcomes, drawings, strict=True)
        ],
        "sources": [
            {
                "title": outcome.variant.title,
                "idea": outcome.variant.idea,
                "paper": outcome.variant.source,
                "colour": VARIABLES[COLOURS[outcome.variant.architecture]],
            }
            for outcome in outcomes
        ],
    }


def _cut(outcomes: list[Outcome]) -> str:
    """Which curves the figure does not show from their start."""
    high = [outcome.variant.title for outcome in outcomes if outcome.rows[0]["fvu"] > TOP]
    return f" ({' and '.join(high)} starts further above than the figure shows)" if high else ""
