# SPDX-License-Identifier: Apache-2.0
"""What prints as a table, plain and with `rich.print`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text


class Columns(NamedTuple):
    """Rows of text under a title.

    Attributes:
        title: above. head: a name for each column. rows: as wide as the head.
        left: the columns that are aligned to the left. signs: the one whose numbers are coloured by
            their sign, None for none.
    """

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: tuple[int, ...] = (0,)
    signs: int | None = None

    def __str__(self) -> str:
        cells = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = (
            "  ".join(
                cell.ljust(width) if i in self.left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        )
        return "\n".join([self.title, *lines])

    def __rich__(self) -> Table:
        # as Text: a token in brackets is no markup
        table = Table(title=Text(self.title), title_justify="left")
        for i, name in enumerate(self.head):
            table.add_column(name, justify="left" if i in self.left else "right")
        for row in self.rows:
            cells = [Text(cell) for cell in row]
            if self.signs is not None:
                cells[self.signs].stylize("green" if row[self.signs].startswith("+") else "red")
            table.add_row(*cells)
        return table
