# SPDX-License-Identifier: Apache-2.0
"""Do the two runs agree, and what did each cost."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import torch
from rich.table import Table

# Both runs compute one function in fp32 and round differently. In the first steps nothing else
# separates them, and a wrong gradient or update shows; later a rounding flips a selection now and
# then, and Adam amplifies the smallest gradients. Measured: below 5e-6 in the first five steps,
# 2e-3 in forty, of either sign, where the loss of one batch differs from the next by 2e-2.
EARLY_STEPS = 5
EARLY_LIMIT = 1e-4
ANY_LIMIT = 2e-2
NAMES = {"dense": "plain PyTorch", "fused": "mikernels, fused"}


def compare(dense: list[dict[str, Any]], fused: list[dict[str, Any]]) -> dict[str, Any]:
    """The verdict on the losses of the common steps: agree, steps, message.

    Raises:
        ValueError: no step is common.
    """
    by_step = {row["step"]: row["loss"] for row in fused}
    gaps = torch.tensor(
        [_gap(by_step[row["step"]], row["loss"]) for row in dense if row["step"] in by_step],
        dtype=torch.float64,
    )
    if not len(gaps):
        raise ValueError("demo: the two runs must have steps in common, got none; run it again")
    # torch's max keeps a NaN, which compares false and disagrees; Python's would not
    early, every = float(gaps[:EARLY_STEPS].max()), float(gaps.max())
    agree = early <= EARLY_LIMIT and every <= ANY_LIMIT
    message = (
        f"losses {'agree' if agree else 'DISAGREE'} over {len(gaps)} common steps: relative "
        f"difference at most {_short(early)} in the first {len(gaps[:EARLY_STEPS])} (limit "
        f"{_short(EARLY_LIMIT)}), {_short(every)} in all (limit {_short(ANY_LIMIT)})"
    )
    return {"agree": agree, "steps": len(gaps), "message": message}


def _gap(loss: float, expected: float) -> float:
    difference = abs(loss - expected)
    return difference / abs(expected) if expected else math.inf if difference else 0.0


def _short(gap: float) -> str:
    return f"{gap:.0e}".replace("e-0", "e-") if gap else "0"


def step_ms(run: dict[str, Any]) -> float:
    """The time of a step of a run: the median, without the first ones, which allocate."""
    return median(row["step_ms"] for row in run["rows"][3:] or run["rows"])


def memory(peak: int | None) -> str:
    """Peak extra memory as text."""
    return "not measured" if peak is None else f"{peak / 2**20:,.0f} MB"


def summarise(
    results: dict[str, dict[str, Any]], batch_size: int, held_out_fvu: float
) -> list[tuple[str, str, str, str]]:
    """Rows of (what, plain PyTorch, fused, ratio) as text; the FVU is of the fused run's SAE."""
    dense, fused = results["dense"], results["fused"]
    ms = [step_ms(run) for run in (dense, fused)]
    faster = f"{ms[0] / ms[1]:.1f}x"
    peaks = [run["peak_extra_bytes"] for run in (dense, fused)]
    shown = [memory(peak) for peak in peaks]
    table = [
        ("ms a step (median)", f"{ms[0]:,.0f}", f"{ms[1]:,.0f}", faster),
        (
            "tokens a second",
            f"{1e3 * batch_size / ms[0]:,.0f}",
            f"{1e3 * batch_size / ms[1]:,.0f}",
            faster,
        ),
        (
            "peak extra memory",
            shown[0],
            shown[1],
            f"{peaks[0] / peaks[1]:.1f}x" if all(peaks) else "",
        ),
    ]
    common = min(len(dense["rows"]), len(fused["rows"]))
    quantities = (
        ("training FVU", "fvu", "{:.4f}"),
        ("L0", "l0", "{:.1f}"),
        ("dead features", "dead_fraction", "{:.1%}"),
    )
    for label, name, form in quantities:
        values = [form.format(run["rows"][common - 1][name]) for run in (dense, fused)]
        table.append((f"{label} after {common} steps", values[0], values[1], ""))
    if len(fused["rows"]) > common:
        for label, name, form in quantities:
            value = form.format(fused["rows"][-1][name])
            table.append((f"{label} after {len(fused['rows'])} steps", "", value, ""))
    table.append(("FVU of held-out activations", "", f"{held_out_fvu:.4f}", ""))
    return table


def results_table(summary: list[tuple[str, str, str, str]]) -> Table:
    """The summary for the console."""
    table = Table(header_style="bold")
    table.add_column("")
    for name in (NAMES["dense"], NAMES["fused"], "ratio"):
        table.add_column(name, justify="right")
    for row in summary:
        table.add_row(*row)
    return table
