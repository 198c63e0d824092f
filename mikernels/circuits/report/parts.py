# SPDX-License-Identifier: Apache-2.0
"""The parts of a page that are text and tables: rankings, heat maps, tokens, interactions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mikernels.circuits.interpret import Circuits
from mikernels.models.rules import RuleReport
from mikernels.values.intervals import Interval

Part = dict[str, Any]
# prompts whose tokens are shown
SHOWN = 8


def _shade(value: float, most: float) -> dict[str, Any]:
    """A colour and its strength, for CSS."""
    if not most or value != value:
        return {"side": "plus", "alpha": "0"}
    return {"side": "plus" if value >= 0 else "minus", "alpha": f"{abs(value) / most:.3f}"}


def part(kind: str, title: str, note: str = "", **values: Any) -> Part:
    """A section of the page: the template of its kind, its heading, a line below it, and what that
    template fills in."""
    return {"kind": kind, "title": title, "note": note, **values}


def ranking(
    title: str, note: str, rows: Sequence[tuple[str, Interval, str]], last: str
) -> Part:  # fmt: skip
    """Names with scores, a bar and the score's interval each.

    Args:
        rows: (name, score, what the last column says).
        last: the name of that column.
    """
    several = any(score.low == score.low for _, score, _ in rows)
    ends = [abs(x) for _, score, _ in rows for x in (score if several else score[:1]) if x == x]
    most = max(ends, default=0.0) or 1.0

    def at(value: float) -> str:
        return f"{50 + 50 * value / most:.2f}"

    bars = [
        {
            "name": name,
            "score": f"{score.value:+.3f}",
            "interval": f"{score.low:+.3f} to {score.high:+.3f}" if several else "",
            "more": more,
            "zero": at(0.0),
            "x": at(min(0.0, score.value)),
            "width": f"{50 * abs(score.value) / most:.2f}",
            "low": at(score.low) if several else "",
            "high": at(score.high) if several else "",
            "side": "plus" if score.value >= 0 else "minus",
        }
        for name, score, more in rows
    ]
    return part("ranking", title, note, rows=bars, several=several, last=last)


def heat_map(
    title: str, scores: torch.Tensor, signed: bool, mlps: torch.Tensor | None = None
) -> dict[str, Any]:
    """Of a part `maps`: `[layers, heads]`, of both signs, or of 0..1; NaN where there is no head.

    Args:
        mlps: `[layers]`, a column beside them.
    """
    grid = scores if mlps is None else torch.cat([scores, mlps[:, None]], 1)
    most = float(grid.abs().nan_to_num(0).max()) if signed else 1.0
    layers, heads = scores.shape
    # a gap sets MLPs apart
    columns: list[tuple[float, str, str]] = [(h, str(h), f"h{h}") for h in range(heads)]
    columns += [] if mlps is None else [(heads + 0.4, "MLP", "mlp")]
    cells = [
        {"x": x, "y": layer, "name": f"L{layer}.{name}", "value": f"{v:.3f}", **_shade(v, most)}
        for layer, row in enumerate(grid.tolist())
        for (x, _, name), v in zip(columns, row, strict=True)
        if v == v
    ]
    every = 1 if heads <= 16 else 4
    labels = [
        (x + 0.5, text) for x, text, _ in columns if not text.isdigit() or int(text) % every == 0
    ]
    return {"title": title, "cells": cells, "layers": layers, "heads": heads, "labels": labels,
            "width": columns[-1][0] + 1, "most": f"{most:.3g}", "signed": signed}  # fmt: skip


def maps(found: Sequence[dict[str, Any]]) -> Part:
    """Heat maps side by side."""
    return part("maps", "Layer by layer", maps=found)


def text(title: str, note: str, prompts: Sequence[Sequence[tuple[str, float]]]) -> Part:
    """Tokens, shaded by their scores."""
    most = max((abs(score) for row in prompts[:SHOWN] for _, score in row), default=0.0)
    shown = [
        [{"text": token, "value": f"{score:+.3f}", **_shade(score, most)} for token, score in row]
        for row in prompts[:SHOWN]
    ]
    if len(prompts) > SHOWN:
        note += f" The first {SHOWN} of {len(prompts)} prompts."
    return part("text", title, note, prompts=shown)


def grid(names: Sequence[str], tokens: Sequence[str], scores: torch.Tensor) -> Part:
    """Some components at each token of a prompt, scores `[tokens, names]`."""
    most = float(scores.abs().max())
    rows = [
        {"text": token, "cells": [{"value": f"{v:+.3f}", **_shade(v, most)} for v in row]}
        for token, row in zip(tokens, scores.tolist(), strict=True)
    ]
    title = "Which component at which token"
    return part("grid", title, "Of the first prompt.", rows=rows, names=names)


def circuits(found: Circuits) -> Part:
    """Interactions, which have no direction, and the groups that they connect."""
    pairs = [
        {"first": e.first, "second": e.second, "score": f"{e.score:+.3f}", "kind": e.kind,
         "circuit": e.circuit or "-", **_shade(e.score, 1.0)}
        for e in found
    ]  # fmt: skip
    groups = [", ".join(names) for names in found.groups]
    note = (
        "Cosines of activation times gradient, over prompts, positions and coordinates: + where "
        "both add to the answer at the same ones, - where one takes away what the other adds. A "
        "pair has no direction: whether one reads what the other writes is another question."
    )
    return part("circuits", "Which of them act together", note, pairs=pairs, groups=groups)


def table(title: str, note: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Part:
    """The first column is of names, the others of numbers."""
    return part("table", title, note, head=head, rows=rows)


def facts(known: Mapping[str, str], command: str = "") -> Part:
    """What was done.

    Args:
        command: that writes the page again.
    """
    return part("facts", "How this was made", known=known, command=command)


def rules(report: RuleReport | str | None) -> list[Part]:
    """What backward rules acted on, where there were any."""
    return [] if report is None else [part("rules", "Backward rules", said=str(report))]
