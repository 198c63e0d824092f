# SPDX-License-Identifier: Apache-2.0
"""A case as a table: times, ratio, memory, rates against the ceilings, errors, targets."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import load
from ..gpu import gpu, predicted
from . import stats
from .machine import screen_gflops
from .spec import DTYPES, sizes_of

COLUMNS = ("ms", "p20 - p80", "rounds", "ratio", "95 % CI", "extra MB", "GB/s", "GFLOP/s")
GATE = {
    "ok": "ok",
    "wrong": "[bold red]FAIL[/]",
    "failed": "[red]error[/]",
    "absent": "[dim]absent[/]",
}


def provider(case: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The record of one provider, None where the case has no times for it."""
    found = next((p for p in case["providers"] if p["name"] == name), None)
    return found if found and found["times_ms"] else None


def ratio(case: dict[str, Any], name: str, baseline: str | None = None) -> dict[str, float] | None:
    """Speed-up of a provider against the baseline, None unless both passed the gate and ran."""
    ours, theirs = provider(case, name), provider(case, baseline or case["baseline"])
    return stats.ratio(theirs["times_ms"], ours["times_ms"]) if ours and theirs else None


def rates(case: dict[str, Any], record: dict[str, Any]) -> dict[str, float]:
    """GB/s and GFLOP/s at the median, and their fractions of the ceilings of as many threads."""
    if case.get("device", "cpu") == "cuda":
        return gpu.rates(case, record)
    seconds = record["ms"]["p50"] / 1e3
    ceilings = case["peaks"]["one" if case["facts"]["torch_threads"] == 1 else "all"]
    compute = screen_gflops(ceilings, record["level"]) if record["screens"] else None
    compute = compute or ceilings["fma_gflops"]
    result = {
        "gbs": case["bytes"] / seconds / 1e9,
        "gflops": case["flops"] / seconds / 1e9,
    }
    result["gbs_fraction"] = result["gbs"] / ceilings["copy_gbs"]
    result["gflops_fraction"] = result["gflops"] / compute
    return result


def targets(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The speeds to reach of this case, and what was measured (None: not measured)."""
    rows: list[dict[str, Any]] = []
    for target in load(case["op"]).targets:
        here = (target.shape, target.mode) == (case["shape"]["name"], case["mode"])
        if here and (not target.dtype or str(DTYPES[target.dtype]) == f"torch.{case['dtype']}"):
            reached = ratio(case, "ours", target.baseline)
            ours = provider(case, "ours")
            floors = gpu.floors(case, ours) if ours and target.floor else None
            rows.append(
                ({"wanted_floor": target.floor, "floor": floors} if target.floor else {})
                | {
                    "baseline": target.baseline,
                    "wanted": target.ratio,
                    "ratio": reached["ratio"] if reached else None,
                    "wanted_extra_mb": target.extra_mb,
                    "extra_mb": _megabytes(ours) if ours and target.extra_mb else None,
                }
            )
    return rows


def derive(case: dict[str, Any]) -> None:
    """Writes what follows from the times into the case, for readers of the JSON."""
    for record in case["providers"]:
        if record["times_ms"]:
            record["ratio"] = ratio(case, record["name"])
            record["rates"] = rates(case, record)
    case["targets"] = targets(case)


def show(case: dict[str, Any], console: Console) -> None:
    """Prints the case; below the table, why a provider has no times, and the speeds to reach."""
    shape = case["shape"]
    where = f"{case['facts']['torch_threads']} threads"
    if case.get("device", "cpu") != "cpu":
        where = case["device"]
    sizes = sizes_of(shape)
    console.print(
        f"\n[bold]{case['op']} {case['mode']} {shape['name']}[/]  {sizes}, {case['dtype']}, "
        f"{where}; ratio to {case['baseline']}",
        highlight=False,
    )
    table = Table(box=SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("provider", no_wrap=True)
    for column in () if case["check"] else COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("gate", no_wrap=True)
    for record in case["providers"]:
        cells = [] if case["check"] else _timing_cells(case, record)
        error = f"{record['error']:.1e}" if "error" in record else ""
        table.add_row(record["name"], *cells, error, GATE[record["status"]])
    console.print(table)
    for line in _notes(case):
        console.print("  " + line, highlight=False)


def _timing_cells(case: dict[str, Any], record: dict[str, Any]) -> list[str]:
    if not record["times_ms"]:
        return [""] * len(COLUMNS)
    spread, speed = record["ms"], rates(case, record)
    times, extra = ratio(case, record["name"]), _megabytes(record)
    return [
        f"{spread['p50']:.4g}",
        f"{spread['p20']:.4g} - {spread['p80']:.4g}",
        str(len(record["times_ms"])),
        f"{times['ratio']:.2f}x" if times else "",
        f"{times['low']:.2f} - {times['high']:.2f}" if times else "",
        "" if extra is None else f"{extra:.1f}",
        f"{speed['gbs']:.1f} ({speed['gbs_fraction']:.0%})",
        f"{speed['gflops']:.0f} ({speed['gflops_fraction']:.0%})",
    ]


def _megabytes(record: dict[str, Any]) -> float | None:
    extra = record.get("extra_bytes")
    return None if extra is None else extra / 1e6


def _notes(case: dict[str, Any]) -> list[str]:
    lines = []
    if case["facts"]["level"] is None and case.get("device", "cpu") == "cpu":
        lines.append("ours ran the reference: the extension is not built (`mikernels info`)")
    for record in case["providers"]:
        if record["reason"]:
            lines.append(f"{record['name']}: {GATE[record['status']]}: {escape(record['reason'])}")
        if record.get("host_ms", 0) > 1.2 * record.get("ms", {}).get("p50", 0):
            host = record["host_ms"]
            lines.append(f"{record['name']}: its launches take the host {host:.3g} ms")
        if record.get("extra_reason"):
            lines.append(f"{record['name']}: no memory figure: {escape(record['extra_reason'])}")
    if case["check"]:
        return lines
    return lines + predicted.lines(case) + [_target_line(row) for row in targets(case)]


def _target_line(row: dict[str, Any]) -> str:
    if row["ratio"] is None:
        return f"target {row['wanted']:g}x {row['baseline']}: not measured"
    word = "reached" if row["ratio"] >= row["wanted"] else "missed"
    line = f"target {row['wanted']:g}x {row['baseline']}: {word}, {row['ratio']:.2f}x"
    if row["wanted_extra_mb"] is not None and row["extra_mb"] is not None:
        word = "reached" if row["extra_mb"] <= row["wanted_extra_mb"] else "missed"
        line += f"; extra memory at most {row['wanted_extra_mb']:g} MB: {word}, "
        line += f"{row['extra_mb']:.1f} MB"
    if row.get("floor") is not None:
        word = "reached" if row["floor"] <= row["wanted_floor"] else "missed"
        line += f"; at most {row['wanted_floor']:.3g}x one pass over the memory: {word}, "
        line += f"{row['floor']:.2f}x"
    return line
