# SPDX-License-Identifier: Apache-2.0
"""What heads attend to in one prompt, as maps of a page: a row for each query, a column a key."""

from __future__ import annotations

from mikernels.circuits.patterns import Patterns
from mikernels.circuits.report.parts import Part, part


def patterns(found: Patterns, notes: dict[str, str]) -> Part:
    """A map for each head.

    Args:
        notes: of heads by name, to be read beside it: its score.
    """
    heads = [
        {"name": name, "note": notes.get(name, ""),
         "rows": [[round(x, 3) for x in row] for row in weights.tolist()]}
        for name, weights in zip(found.names, found.weights[0], strict=True)
    ]  # fmt: skip
    note = (
        "Of the first prompt. Each row is a token, and shows how it spreads its attention over "
        "those before it. Point at a cell, or move with the arrow keys."
    )
    drawn = {"tokens": found.tokens[0], "heads": heads}
    return part("patterns", "What the strongest heads attend to", note, drawn=drawn)
