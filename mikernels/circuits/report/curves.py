# SPDX-License-Identifier: Apache-2.0
"""How faithful circuits of each size are, and how stable: curves and a table of a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mikernels.circuits.report.parts import Part, part
from mikernels.values.intervals import Interval


def interval(found: Interval | None, form: str = ".3f") -> str:
    """`0.93 [0.90, 0.95]`; a dash for none."""
    if found is None or found.value != found.value:
        return "–"
    value, low, high = (f"{x:{form}}" for x in found)
    return value if found.low != found.low else f"{value} [{low}, {high}]"


def curves(found: Sequence[Any]) -> Part:
    """Faithfulness by size, a line with a band for each method.

    Args:
        found: `Curve`s of one model and behaviour, of the same fractions.
    """
    first = found[0]
    lines = [
        {"name": c.method, "values": [[None if x != x else round(x, 5) for x in one]
                                      for one in c.faithfulness]}
        for c in found
    ]  # fmt: skip
    drawn = {"fractions": first.fractions, "sizes": first.sizes, "level": first.level,
             "lines": lines}  # fmt: skip
    what = "edges" if first.level == "edge" else "nodes"
    head = [what, "of all", *(c.method for c in found)]
    rows = [
        [f"{size:,}", f"{fraction:.1%}", *(interval(c.faithfulness[i], ".2f") for c in found)]
        for i, (size, fraction) in enumerate(zip(first.sizes, first.fractions, strict=True))
    ]
    note = (
        f"How much of the behaviour is left when all {what} but the strongest are ablated: 0 is "
        "nothing, 1 is the whole model. Bands are 95 % intervals over prompts."
    )
    return part("curves", "How faithful it is", note, drawn=drawn, head=head, rows=rows)
