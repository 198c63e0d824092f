# SPDX-License-Identifier: Apache-2.0
"""Do the two runs agree, and what did each cost."""

from __future__ import annotations

from statistics import median
from typing import Any

from rich.table import Table

# Both runs compute one function in fp32 and round differently; a rounding may move a selection, and
# Adam amplifies the smallest gradients, so they drift apart slowly. The first step has no history
# to drift in: it tells a wrong formula from rounding. Measured: 1e-7 and below 1e-3.
FIRST_STEP_LIMIT = 1e-5
ANY_STEP_LIMIT = 1e-2
NAMES = {"dense": "plain PyTorch", "fused": "mikernels, fused"}


def compare(dense: list[dict[str, Any]], fused: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest relative difference of the losses over the common steps, and the verdict.

    Returns agree, steps, first (difference at step 1), largest and message.
    """
    by_step = {row["step"]: row["loss"] for row in fused}
    gaps = [
        abs(by_step[row["step"]] - row["loss"]) / abs(row["loss"])
        for row in dense
        if row["step"] in by_step
    ]
    first, largest = gaps[0], max(gaps)
    # a NaN compares false and disagrees
    agree = first <= FIRST_STEP_LIMIT and all(gap <= ANY_STEP_LIMIT for gap in gaps)
    message = (
        f"losses {'agree' if agree else 'DISAGREE'} over {len(gaps)} common steps: relative "
        f"difference {_short(first)} at the first step (limit {_short(FIRST_STEP_LIMIT)}), at most "
        f"{_short(largest)} (limit {_short(ANY_STEP_LIMIT)})"
    )
    return {
        "agree": agree,
        "steps": len(gaps),
        "first": first,
        "largest": largest,
        "message": message,
    }


def _short(gap: float) -> str:
    return f"{gap:.0e}".replace("e-0", "e-") if gap else "0"


def summarise(
    results: dict[str, dict[str, Any]], batch_size: int
) -> list[tuple[str, str, str, str]]:
    """Rows of (what, plain PyTorch, fused, ratio) as text."""
    dense, fused = results["dense"], results["fused"]
    # the first steps allocate
    ms = [
        median(row["step_ms"] for row in run["rows"][3:] or run["rows"]) for run in (dense, fused)
    ]
    faster = f"{ms[0] / ms[1]:.1f}x"
    peaks = [run["peak_extra_bytes"] for run in (dense, fused)]
    shown = ["not measured" if peak is None else f"{peak / 2**20:,.0f} MB" for peak in peaks]
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
        ("FVU", "fvu", "{:.4f}"),
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
