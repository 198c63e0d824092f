# SPDX-License-Identifier: Apache-2.0
"""Numbers in columns: as text, and for rich."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.table import Table

from mikernels.values.intervals import Interval, mean_intervals


def means(values: torch.Tensor) -> list[Interval]:
    """Of `[S, B]` over prompts."""
    return mean_intervals(values.double().cpu().numpy().T)


def bounds(interval: Interval) -> str:
    return f"[{interval.low:+.4f}, {interval.high:+.4f}]"


def as_text(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]
    return "\n".join([title, *lines])


def as_rich(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table
