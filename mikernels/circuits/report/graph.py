# SPDX-License-Identifier: Apache-2.0
"""A circuit as a graph of a page: writers at their layer and head, edges by their strength.

The position of a node has a meaning, so that nothing is laid out by forces: a row for each layer,
from the input below to the logits above, a column for each head and one for MLPs. A head's node
takes edges into its q, and into its k and v; heads in groups share those of their group, which are
drawn below all heads of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mikernels.circuits.circuit import Circuit
from mikernels.circuits.ranking import Ranked
from mikernels.circuits.report.parts import Part, part
from mikernels.models.graph import Graph

# edges drawn at first
SHOWN = 60


def nodes_of(circuit: Circuit) -> Circuit:
    """What writers do: what the edges of each do together, as the gradient where it writes is the
    sum of those where it is read."""
    if circuit.level == "node":
        return circuit
    scores, replicates = circuit.scores.sum(-1), circuit.replicates.sum(-1)
    return replace(circuit, level="node", scores=scores, replicates=replicates, positions=None)


def strongest(circuit: Circuit, k: int) -> list[Ranked]:
    """The k strongest that do anything."""
    there = circuit.graph.n_edges if circuit.level == "edge" else len(circuit.graph.writers)
    return [row for row in circuit.ranking(min(k, there)) if row.score.value != 0]


def components(circuit: Circuit, k: int) -> list[Ranked]:
    """The k strongest heads and MLPs: without the input, of which all the others are made."""
    nodes = nodes_of(circuit)
    scores, replicates = nodes.scores.clone(), nodes.replicates.clone()
    scores[0], replicates[:, 0] = 0, 0
    return strongest(replace(nodes, scores=scores, replicates=replicates), k)


def _writers(graph: Graph) -> list[list[Any]]:
    """Of each the layer, the column and the name: the input is at layer -1, an MLP at column -1."""
    found: list[list[Any]] = [[-1, 0, "input"]]
    for i, layer in enumerate(graph.layers):
        found += [[i, h, f"L{i}.h{h}"] for h in range(layer.heads)]
        found += [[i, -1, f"L{i}.mlp"]] * layer.mlp
    return found


def _readers(graph: Graph, used: set[int]) -> dict[int, dict[str, Any]]:
    """Of those that edges end at: name, layer, part, and the writers made of it, of which there are
    none for the logits."""
    found = {}
    for i in sorted(used):
        name = graph.readers[i]
        last = name.rpartition(".")[-1]
        layer = len(graph.layers) if name == "logits" else int(name[1:].partition(".")[0])
        found[i] = {"name": name, "layer": layer, "part": last, "feeds": graph.feeds[i]}
    return found


def _short(value: float) -> float:
    """Digits enough to be read: they are most of the page."""
    return float(f"{value:.4g}")


def graph(circuits: Sequence[Circuit], n: int) -> Part:
    """The n strongest edges of each circuit, of which one is shown at a time.

    Args:
        circuits: of one graph, found at the level of edges.
    """
    own = circuits[0].graph
    writers, readers = ({name: i for i, name in enumerate(x)} for x in (own.writers, own.readers))
    ranked = [strongest(c, n) for c in circuits]
    methods: list[dict[str, Any]] = []
    for c, found in zip(circuits, ranked, strict=True):
        edges = []
        for name, score, share in found:
            writer, _, reader = name.partition(" -> ")
            edges.append([writers[writer], readers[reader], *map(_short, (*score, share))])
        nodes = [_short(x) for x in nodes_of(c).scores.tolist()]
        methods.append({"name": c.method, "edges": edges, "nodes": nodes})
    drawn = {
        "layers": [[layer.heads, layer.groups] for layer in own.layers],
        "writers": _writers(own),
        "readers": _readers(own, {edge[1] for method in methods for edge in method["edges"]}),
        "methods": methods,
    }
    sure = len(circuits[0].replicates) > 0
    rows = [
        [name.replace("->", "→"), f"{score.value:+.4f}",
         *([f"{score.low:+.4f} to {score.high:+.4f}", f"{share:.0%}"] if sure else [])]
        for name, score, share in ranked[0]
    ]  # fmt: skip
    note = (
        "An edge is what one component adds to what another reads of it: "
        "what it changes of the number, to first order. Width is strength; dashed edges work "
        "against it. Point at a node or an edge, or choose a node with the arrow keys and Enter."
    )
    head = ["edge", "score", *(["95 % interval", f"in top {len(rows)}"] if sure else [])]
    return part(
        "graph", "The circuit", note, drawn=drawn, head=head, rows=rows, most=len(rows),
        shown=min(SHOWN, len(rows)), layers=len(own.layers), methods=[c.method for c in circuits],
        of=own.n_edges,
    )  # fmt: skip
