# SPDX-License-Identifier: Apache-2.0
"""Do the two runs agree, and what did each cost."""

from __future__ import annotations

from statistics import median
from typing import Any

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
    """The verdict on the losses of the common steps: agree, steps, message."""
    by_step = {row["step"]: row["loss"] for row in fused}
    gaps = [
        abs(by_step[row["step"]] - row["loss"]) / abs(row["loss"])
        for row in dense
        if row["step"] in by_step
    ]
    early = gaps[:EARLY_STEPS]
    # a NaN compares false and disagrees
    agree = all(gap <= EARLY_LIMIT for gap in early) and all(gap <= ANY_LIMIT for gap in gaps)
    message = (
        f"losses {'agree' if agree else 'DISAGREE'} over {len(gaps)} common steps: relative "
        f"difference at most {_short(max(early))} in the first {len(early)} (limit "
        f"{_short(EARLY_LIMIT)}), {_short(max(gaps))} in all (limit {_short(ANY_LIMIT)})"
    )
    return {"agree": agree, "steps": len(gaps), "message": message}


def _short(gap: float) -> str:
    return f"{gap:.0e}".replace("e-0", "e-") if gap else "0"


def step_ms(run: dict[str, Any]) -> float:
    """The time of a step of a run: the median, without the first ones, which allocate."""
    return median(row["step_ms"] for row in run["rows"][3:] or run["rows"])


def summarise(
    results: dict[str, dict[str, Any]], batch_size: int, held_out_fvu: float
) -> list[tuple[str, str, str, str]]:
    """Rows of (what, plain PyTorch, fused, ratio) as text; the FVU is of the fused run's SAE."""
    dense, fused = results["dense"], results["fused"]
    ms = [step_ms(run) for run in (dense, fused)]
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
