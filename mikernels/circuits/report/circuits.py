# SPDX-License-Identifier: Apache-2.0
"""The page about circuits: what is found, how faithful it is, how stable, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mikernels.circuits.attribution import TokenAttribution
from mikernels.circuits.circuit import Circuit
from mikernels.circuits.patterns import Patterns
from mikernels.circuits.report import page, parts
from mikernels.circuits.report.attention import patterns as attention
from mikernels.circuits.report.curves import curves as faithfulness
from mikernels.circuits.report.curves import interval
from mikernels.circuits.report.graph import bounds, graph, node_scores, strongest
from mikernels.values.intervals import Interval

NAME = "write_report"


def ranked(circuit: Circuit, k: int) -> list[tuple[str, Interval, float]]:
    """The k strongest heads and MLPs: name, score with the bootstrap's interval, and in which share
    of its samples it is among the k strongest (NaN without any)."""
    scores, replicates = node_scores(circuit)
    # without the input, of which all the others are made
    scores, replicates = scores[1:], replicates[:, 1:]
    best = strongest(scores, k)
    low, high = bounds(replicates[:, best])
    share = torch.full([len(best)], torch.nan)
    if len(replicates) and best:
        size = replicates.abs()
        least = size.kthvalue(size.shape[1] + 1 - len(best), dim=1).values
        share = (size[:, best] >= least[:, None]).double().mean(0)
    names = circuit.graph.writers[1:]
    return [
        (names[i], Interval(*map(float, (scores[i], a, b))), float(s))
        for i, a, b, s in zip(best, low, high, share, strict=True)
    ]


def head_map(circuit: Circuit, title: str) -> dict[str, Any]:
    """Heads by layer, and MLPs beside them."""
    layers = circuit.graph.layers
    scores, _ = node_scores(circuit)
    grid = torch.full([len(layers), max(layer.heads for layer in layers)], torch.nan)
    mlps = torch.full([len(layers)], torch.nan)
    for i, layer in enumerate(layers):
        first = circuit.graph.first_writer(i)
        grid[i, : layer.heads] = scores[first : first + layer.heads]
        if layer.mlp:
            mlps[i] = scores[first + layer.heads]
    return parts.heat_map(title, grid, True, mlps)


def _ranking(circuit: Circuit, k: int) -> parts.Part:
    rows = [
        (name, score, "" if share != share else f"{share:.0%}")
        for name, score, share in ranked(circuit, k)
    ]
    note = "What each adds to the number, to first order: the mean over prompts"
    if len(circuit.replicates):
        note += (
            f", with the 95 % interval of {len(circuit.replicates)} bootstrap samples of them, and "
            f"in how many it is among the {k} strongest"
        )
    return parts.ranking("Strongest components", f"{note}.", rows, f"in top {k}")


def _methods(
    circuits: Sequence[Circuit], found: Sequence[Any], stable: Sequence[Any]
) -> parts.Part:
    """Fidelity and stability of every method."""
    curves = {c.method: c for c in found}
    stabilities = {c.method: s for c, s in zip(circuits, stable, strict=False)}
    k = stable[0].k if stable else 0
    head = ["method", *(["CPR", "CMD"] if found else [])]
    head += [f"Jaccard@{k}", "Spearman", "sign flips"] if stable else []
    rows = []
    for name in dict.fromkeys([*curves, *stabilities]):
        row = [name]
        if found:
            curve = curves.get(name)
            row += [interval(curve and curve.cpr), interval(curve and curve.cmd)]
        if stable:
            s = stabilities.get(name)
            row += [interval(s and one(s), ".2f") for one in _MEASURES]
        rows.append(row)
    notes = []
    if found:
        notes.append(
            "CPR is the area under the curve of circuits that help, larger is better; CMD that "
            "between the curve of the largest |score| and 1, smaller is better."
        )
    if stable:
        notes.append(
            f"Jaccard: what two bootstrap samples of the prompts share of their {k} strongest; "
            "Spearman: of all scores; sign flips: among those."
        )
    return parts.table("Fidelity and stability", " ".join(notes), head, rows)


_MEASURES = (lambda s: s.jaccard, lambda s: s.spearman, lambda s: s.sign_flips)


def write_report(
    circuits: Sequence[Circuit],
    path: str | Path | None = None,
    *,
    title: str = "",
    k: int = 10,
    edges: int = 200,
    tokens: TokenAttribution | None = None,
    patterns: Patterns | None = None,
    curves: Sequence[Any] = (),
    stability: Sequence[Any] = (),
    known: Mapping[str, str] | None = None,
    command: str = "",
) -> str:
    """One self-contained page about a behaviour's circuits, of one or several methods.

    Args:
        circuits: of one graph, the first of which is the one told about.
        path: also written there.
        title: of the page; "": the behaviour's number.
        k: components to rank. edges: to draw.
        tokens: of `attribute`, for the text. patterns: of `attention_patterns`.
        curves: of `faithfulness_curve`, for each method. stability: of `stability`, for each
            circuit.
        known: what was done, name by name. command: that makes the page again.

    Raises:
        ModuleNotFoundError: without the `report` extra.
        ValueError: no circuits, or of different graphs.
        OSError: it cannot be written.
    """
    if not circuits:
        raise ValueError(f"{NAME}: circuits must be one at least, got none")
    first = circuits[0]
    if any(c.graph != first.graph for c in circuits):
        raise ValueError(f"{NAME}: circuits must be of one graph, got {circuits[-1].graph}")
    clean, other = first.values.double(), first.counterfactual_values.double()
    b = len(clean)
    of = f"mean of {b} prompts" if b > 1 else "1 prompt"
    lede = (
        f"{first.label[:1].upper()}{first.label[1:]}: {clean.mean():.3f} ({of}), and "
        f"{other.mean():.3f} with the counterfactual. What makes the difference, found by "
        f"{first.method} in {first.graph}."
    )
    scores = {name: f"{score.value:+.3f}" for name, score, _ in ranked(first, k)}
    drawn = [c for c in circuits if c.level == "edge"]
    shown = [
        _ranking(first, k),
        *([tokens.section()] if tokens else []),
        parts.maps([head_map(c, c.method) for c in circuits]),
        *([graph(drawn, edges)] if drawn else []),
        *([attention(patterns, scores)] if patterns else []),
        *([faithfulness(curves)] if curves else []),
        *([_methods(circuits, curves, stability)] if curves or stability else []),
        *([parts.facts(known or {}, command)] if known or command else []),
        *parts.rules(first.rules),
    ]
    return page.write(NAME, title or first.label, lede, shown, path)
