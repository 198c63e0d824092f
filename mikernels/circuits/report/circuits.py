# SPDX-License-Identifier: Apache-2.0
"""The page about circuits: what is found, how faithful it is, how stable, and how it was made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mikernels.circuits.attribution import TokenAttribution
from mikernels.circuits.circuit import Circuit
from mikernels.circuits.faithfulness import Curve
from mikernels.circuits.patterns import Patterns
from mikernels.circuits.report import attention, page, parts
from mikernels.circuits.report.curves import curves as faithfulness
from mikernels.circuits.report.curves import interval
from mikernels.circuits.report.graph import components, graph, nodes_of
from mikernels.circuits.stability import Stability, stability

NAME = "write_report"
# of the behaviour, that a circuit is to keep
ENOUGH = 0.85


def head_map(circuit: Circuit) -> dict[str, Any]:
    """Heads by layer, and MLPs beside them."""
    layers, own = circuit.graph.layers, nodes_of(circuit)
    last = [circuit.graph.first_writer(i + 1) - 1 for i in range(len(layers))]
    mlps = [
        own.scores[i].item() if layer.mlp else math.nan
        for i, layer in zip(last, layers, strict=True)
    ]
    return parts.heat_map(circuit.method, own.head_matrix(), True, torch.tensor(mlps))


def _ranking(circuit: Circuit, k: int) -> parts.Part:
    rows = [
        (name, score, "" if share != share else f"{share:.0%}")
        for name, score, share in components(circuit, k)
    ]
    note = "What each adds to the number, to first order: the mean over prompts"
    if len(circuit.replicates):
        note += (
            f", with the 95 % interval of {len(circuit.replicates)} bootstrap samples of them, and "
            f"in how many it is among the {k} strongest"
        )
    return parts.ranking("Strongest components", f"{note}.", rows, f"in top {k}")


def _again(found: Stability) -> list[str]:
    """Cells of how stable it is."""
    measures = (found.jaccard, found.spearman, found.sign_flips)
    often = int((found.inclusion >= 0.9).sum())
    return [*(interval(one, ".2f") for one in measures), str(often)]


def _areas(by_score: Curve, by_size: Curve | None) -> list[str]:
    """Cells of how faithful it is."""
    enough = by_score.smallest(ENOUGH)
    least = "–" if enough is None else f"{enough:,}"
    return [interval(by_score.cpr), "–" if by_size is None else interval(by_size.cmd), least]


def _methods(
    circuits: Sequence[Circuit], found: Sequence[Curve], by_size: Sequence[Curve], k: int
) -> list[parts.Part]:
    """Fidelity and stability of every method, as far as there are numbers."""
    curves, sizes = ({c.method: c for c in some} for some in (found, by_size))
    stable = {c.method: stability(c, k) for c in circuits if len(c.replicates) > 1}
    rows: list[list[str]] = []
    notes = []
    for name in dict.fromkeys([*curves, *stable]):
        row = [name]
        if curves:
            row += _areas(curves[name], sizes.get(name)) if name in curves else [""] * 3
        if stable:
            row += _again(stable[name]) if name in stable else [""] * 4
        rows.append(row)
    head = ["method"]
    if curves:
        head += ["CPR", "CMD", f"for {ENOUGH:.0%}"]
        notes.append(
            "CPR is the area under the curve of what is chosen by score, larger is better; CMD "
            "that between the curve by size of score and 1, smaller is better (both as in MIB); "
            f"for {ENOUGH:.0%}: the size from which on a circuit by score keeps that much."
        )
    if stable:
        head += [f"Jaccard@{k}", "Spearman", "sign flips", "in 90 %"]
        what = f"{circuits[0].level}s"
        notes.append(
            f"Jaccard: what a bootstrap sample of the prompts has in common with all of them, of "
            f"the {k} strongest {what}; Spearman: of the order of all; sign flips: among the {k}; "
            f"in 90 %: how many {what} are among the {k} in nine of ten samples. Brackets hold "
            f"95 % of the samples."
        )
    title = "Fidelity and stability" if curves else "Stability"
    return [parts.table(title, " ".join(notes), head, rows)] if rows else []


def write_report(
    circuits: Sequence[Circuit],
    path: str | Path | None = None,
    *,
    title: str = "",
    k: int = 10,
    edges: int = 200,
    tokens: TokenAttribution | None = None,
    patterns: Patterns | None = None,
    curves: Sequence[Curve] = (),
    curves_by_size: Sequence[Curve] = (),
    known: Mapping[str, str] | None = None,
    command: str = "",
) -> str:
    """One self-contained page about a behaviour's circuits, of one or several methods.

    Args:
        circuits: of one graph and level, the first of which is the one told about.
        path: also written there.
        title: of the page; "": the behaviour's number.
        k: components to rank. edges: to draw, and to measure stability by.
        tokens: of `attribute`, for the text. patterns: of `attention_patterns`.
        curves: of `faithfulness_curve`, for each method. curves_by_size: those of absolute=True.
        known: what was done, name by name. command: that makes the page again.

    Returns:
        The page, as text.

    Raises:
        ModuleNotFoundError: without the `report` extra.
        ValueError: no circuits, or of different graphs or levels.
        OSError: it cannot be written.

    Example:
        >>> task = circuits.tasks.ioi(tokenizer, 4)
        >>> question = task.inputs, task.counterfactual_inputs, task.target
        >>> found = [circuits.find_circuit(model, *question, method) for method in ("gim", "eap")]
        >>> page = circuits.write_report(found, "circuits.html")
    """
    if not circuits:
        raise ValueError(f"{NAME}: circuits must be one at least, got none")
    first = circuits[0]
    for c in circuits:
        if (c.graph, c.level) != (first.graph, first.level):
            raise ValueError(
                f"{NAME}: circuits must be of one graph and level, got {c.level}s of {c.graph} "
                f"beside {first.level}s of {first.graph}"
            )
    clean, other = first.values.double(), first.counterfactual_values.double()
    b = len(clean)
    of = f"mean of {b} prompts" if b > 1 else "1 prompt"
    lede = (
        f"{first.label[:1].upper()}{first.label[1:]}: {clean.mean():.3f} ({of}), and "
        f"{other.mean():.3f} with the counterfactual. What makes the difference, found by "
        f"{first.method} in {first.graph}."
    )
    nodes = nodes_of(first).scores.tolist()
    scores = {name: f"{x:+.3f}" for name, x in zip(first.graph.writers, nodes, strict=True)}
    there = first.graph.n_edges if first.level == "edge" else len(first.graph.writers)
    size = min(edges if first.level == "edge" else k, there)
    both = {"by score": curves, "by size of score": curves_by_size}
    chosen = {name: some for name, some in both.items() if some}
    shown = [
        _ranking(first, k),
        *([tokens.section()] if tokens else []),
        parts.maps([head_map(c) for c in circuits]),
        *([graph(circuits, edges)] if first.level == "edge" else []),
        *([attention.patterns(patterns, scores)] if patterns else []),
        *([faithfulness(chosen)] if chosen else []),
        *_methods(circuits, curves, curves_by_size, size),
        *([parts.facts(known or {}, command)] if known or command else []),
        *parts.rules(first.rules),
    ]
    return page.write(NAME, title or first.label, lede, shown, path)
