# SPDX-License-Identifier: Apache-2.0
"""How faithful circuits of each size are: curves of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mikernels.circuits.faithfulness import Curve
from mikernels.circuits.report.parts import Part, part
from mikernels.values.intervals import Interval


def interval(found: Interval, form: str = ".3f") -> str:
    """`0.93 [0.90, 0.95]`."""
    value, low, high = (f"{x:{form}}" for x in found)
    return value if found.low != found.low else f"{value} [{low}, {high}]"


def _drawn(name: str, found: Sequence[Curve]) -> dict[str, Any]:
    """Of curves of the same fractions; nothing kept has no place on a logarithmic axis."""
    first = found[0]
    at = [i for i, fraction in enumerate(first.fractions) if fraction > 0]
    lines = [
        {"name": c.method, "values": [[round(x, 5) for x in c.faithfulness[i]] for i in at]}
        for c in found
    ]
    return {
        "name": name,
        "fractions": [first.fractions[i] for i in at],
        "sizes": [first.sizes[i] for i in at],
        "level": first.level,
        "lines": lines,
    }


def curves(found: Mapping[str, Sequence[Curve]]) -> Part:
    """Faithfulness by size, a line with a band for each method.

    Args:
        found: by how the circuits were chosen, in words: one is shown at a time.
    """
    first = next(iter(found.values()))
    one = first[0]
    what = f"{one.level}s"
    head = [what, "of all", *(c.method for c in first)]
    rows = [
        [f"{size:,}", f"{fraction:.1%}", *(interval(c.faithfulness[i], ".2f") for c in first)]
        for i, (size, fraction) in enumerate(zip(one.sizes, one.fractions, strict=True))
    ]
    note = (
        f"How much of the behaviour is left when all {what} but the best are ablated: 0 is "
        f"nothing, 1 is the whole model; without {what} that work against it, there is more. Bands "
        "are 95 % intervals over prompts."
    )
    drawn = {"sets": [_drawn(name, some) for name, some in found.items()]}
    return part("curves", "How faithful it is", note, drawn=drawn, head=head, rows=rows,
                sets=list(found))  # fmt: skip
