# SPDX-License-Identifier: Apache-2.0
"""The parts of a page about a prompt: rankings, heat maps, tokens, interactions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mikernels import _pages
from mikernels.circuits.interpret import Circuits
from mikernels.files import explained, write_atomic
from mikernels.values.intervals import Interval

Part = dict[str, Any]
# prompts whose tokens are shown
SHOWN = 8


def _shade(value: float, most: float) -> dict[str, Any]:
    """A colour and its strength, for CSS."""
    if not most or value != value:
        return {"side": "plus", "alpha": "0"}
    return {"side": "plus" if value >= 0 else "minus", "alpha": f"{abs(value) / most:.3f}"}


def ranking(rows: Sequence[tuple[str, Interval, str]], k: int, several: bool) -> Part:
    """Components by (name, score, note), with a bar and the score's interval each."""
    ends = [abs(x) for _, score, _ in rows for x in (score if several else score[:1])]
    most = max(ends, default=0.0) or 1.0

    def at(value: float) -> str:
        return f"{50 + 50 * value / most:.2f}"

    bars = [
        {
            "name": name,
            "score": f"{score.value:+.3f}",
            "interval": f"{score.low:+.3f} to {score.high:+.3f}" if several else "",
            "more": note,
            "zero": at(0.0),
            "x": at(min(0.0, score.value)),
            "width": f"{50 * abs(score.value) / most:.2f}",
            "low": at(score.low) if several else "",
            "high": at(score.high) if several else "",
            "side": "plus" if score.value >= 0 else "minus",
        }
        for name, score, note in rows
    ]
    return {"kind": "ranking", "title": "Strongest components", "rows": bars, "several": several,
            "k": k}  # fmt: skip


def heads(title: str, scores: torch.Tensor, signed: bool) -> Part:
    """A heat map, `[layers, heads]`: of both signs, or of 0..1."""
    most = float(scores.abs().nan_to_num(0).max()) if signed else 1.0
    cells = [
        {"x": h, "y": layer, "name": f"L{layer}.h{h}", "value": f"{v:.3f}", **_shade(v, most)}
        for layer, row in enumerate(scores.tolist())
        for h, v in enumerate(row)
    ]
    layers, columns = scores.shape
    return {"kind": "heads", "title": title, "cells": cells, "layers": layers, "heads": columns,
            "most": f"{most:.3g}", "signed": signed}  # fmt: skip


def text(title: str, note: str, prompts: Sequence[Sequence[tuple[str, float]]]) -> Part:
    """Tokens, shaded by their scores."""
    most = max((abs(score) for row in prompts[:SHOWN] for _, score in row), default=0.0)
    shown = [
        [{"text": token, "value": f"{score:+.3f}", **_shade(score, most)} for token, score in row]
        for row in prompts[:SHOWN]
    ]
    return {"kind": "text", "title": title, "note": note, "prompts": shown, "of": len(prompts)}


def grid(names: Sequence[str], tokens: Sequence[str], scores: torch.Tensor) -> Part:
    """Some components at each token of a prompt, scores `[tokens, names]`."""
    most = float(scores.abs().max())
    rows = [
        {"text": token, "cells": [{"value": f"{v:+.3f}", **_shade(v, most)} for v in row]}
        for token, row in zip(tokens, scores.tolist(), strict=True)
    ]
    return {"kind": "grid", "title": "Which component at which token", "rows": rows,
            "names": names}  # fmt: skip


def circuits(found: Circuits) -> Part:
    """Interactions, and the circuits that they make."""
    edges = [
        {"source": e.source, "target": e.target, "score": f"{e.score:+.3f}", "kind": e.kind,
         "circuit": e.circuit or "-", **_shade(e.score, 1.0)}
        for e in found
    ]  # fmt: skip
    return {"kind": "circuits", "title": "Which of them act together", "edges": edges,
            "groups": [", ".join(names) for names in found.groups]}  # fmt: skip


def write(
    where: str, title: str, lede: str, parts: list[Part], facts: str, path: str | Path | None
) -> str:
    """The page; also in a file where there is a path.

    Raises:
        ModuleNotFoundError: without the `report` extra. OSError: it cannot be written.
    """
    values = {"title": title, "lede": lede, "parts": parts, "facts": facts}
    made = _pages.render(where, "mikernels.circuits", "page.html.j2", values)
    if path is not None:
        path = Path(path)
        with explained(where, "the page", path, "free space or choose another folder"):
            write_atomic(path, made)
    return made
