# SPDX-License-Identifier: Apache-2.0
"""What a comparison found, as tables."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from .figures import BETTER, interval

STYLES = {"better": "green", "not worse": "green", "worse": "red", "open": "yellow"}


def show(whole: dict[str, Any], console: Console) -> None:
    """Every contender's figures, then ours against each of the others."""
    task = whole["task"]
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in whole["runs"]:
        runs.setdefault(run["contender"], []).append(run)
    names = [n for n in BETTER if any(n in r["figures"] for r in whole["runs"])]
    title = (
        f"{task['name']}: {task['note']}; F {task['f']:,}, k {task['k']}, "
        f"{task['steps']:,} steps of {task['batch']:,}"
    )
    table = Table(title=title, caption=f"mean ± half of the 95 % interval; dead: {task['dead']}")
    table.add_column("contender")
    for column in ("seeds", "tokens", "lr", *names, "CPU s"):
        table.add_column(column, justify="right")
    for name, mine in runs.items():
        cells = [_cell([r["figures"][n] for r in mine]) for n in names if n in mine[0]["figures"]]
        table.add_row(
            name,
            str(len(mine)),
            f"{mine[0]['figures']['tokens']:,}",
            f"{mine[0]['settings']['lr']:.2g}",
            *cells,
            _cell([r["figures"]["cpu_s"] for r in mine]),
        )
    console.print(table)
    table = Table(
        title="ours against theirs, seed by seed",
        caption="worse or better: the whole 95 % interval; not worse: by 1 % at most. "
        "Last column: CPU time after which our curve has their final FVU, of theirs",
    )
    for column in ("ours", "theirs", *(n for n in names if n != "cpu_ms"), "CPU", "to their FVU"):
        table.add_column(column)
    for pair in whole["comparisons"]:
        words = [pair["figures"].get(n, {}).get("verdict", "") for n in names if n != "cpu_ms"]
        reached = pair["share_to_their_fvu"]
        table.add_row(
            pair["ours"],
            pair["theirs"],
            *(f"[{STYLES[w]}]{w}[/]" if w else "" for w in words),
            f"1/{1 / pair['cpu_share'][0]:.1f}",
            "never" if reached is None else f"1/{1 / reached[0]:.1f}",
        )
    console.print(table)


def _cell(values: list[float]) -> str:
    mean, _, high = interval(values)
    half = high - mean
    return f"{mean:.4g}" if math.isinf(half) else f"{mean:.4g} ± {half:.2g}"
