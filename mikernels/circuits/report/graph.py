# SPDX-License-Identifier: Apache-2.0
"""A circuit as a graph of a page: writers at their layer and head, edges by their strength.

The position of a node has a meaning, so that nothing is laid out by forces: a row for each layer,
from the input below to the logits above, a column for each head and one for MLPs. A head's node
takes edges into its q, and into its k and v; heads in groups share those of their group, which are
drawn below all heads of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mikernels.circuits.circuit import Circuit
from mikernels.circuits.report.parts import Part, part
from mikernels.models.graph import Graph
from mikernels.values.intervals import Interval

# edges drawn at first
SHOWN = 60


def strongest(scores: torch.Tensor, n: int) -> list[int]:
    """The numbers of the n largest |score| that are not 0; ties in the order of the model."""
    size = scores.flatten().abs()
    best = size.argsort(descending=True, stable=True)[:n].tolist()
    return [i for i in best if size[i] > 0]


def node_scores(circuit: Circuit) -> tuple[torch.Tensor, torch.Tensor]:
    """`[W]` and of each replicate `[Q, W]`: what writers do.

    What a writer does is what its edges do together: the gradient where it writes is the sum of
    those where it is read.
    """
    if circuit.level == "node":
        return circuit.scores, circuit.replicates
    return circuit.scores.sum(-1), circuit.replicates.sum(-1)


def bounds(replicates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `[Q, n]` the 95 % intervals of the bootstrap, `[n]` each; NaN without replicates."""
    if not len(replicates):
        nan = torch.full(replicates.shape[1:], torch.nan)
        return nan, nan
    at = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = replicates.double().quantile(at, dim=0)
    return low, high


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


def _edges(circuit: Circuit, n: int) -> list[tuple[int, int, Interval, float]]:
    """The strongest first: writer, reader, score, in which share of the bootstrap's samples it is
    among as many (NaN without any)."""
    columns = circuit.scores.shape[1]
    best = strongest(circuit.scores, n)
    replicates = circuit.replicates.flatten(1)
    low, high = bounds(replicates[:, best])
    shares = torch.full([len(best)], torch.nan)
    if len(replicates) and best:
        size = replicates.abs()
        least = size.kthvalue(size.shape[1] + 1 - len(best), dim=1).values
        shares = (size[:, best] >= least[:, None]).double().mean(0)
    values = circuit.scores.flatten()[best]
    return [
        (i // columns, i % columns, Interval(*map(float, score)), float(share))
        for i, *score, share in zip(best, values, low, high, shares, strict=True)
    ]


def edges_of(circuit: Circuit, n: int) -> list[tuple[str, Interval, float]]:
    """The n strongest by name, with the bootstrap's interval, and in which share of its samples
    they are among as many (NaN without any)."""
    writers, readers = circuit.graph.writers, circuit.graph.readers
    return [
        (f"{writers[w]} -> {readers[r]}", score, share) for w, r, score, share in _edges(circuit, n)
    ]


def _short(value: float) -> float:
    """Digits enough to be read: they are most of the page."""
    return float(f"{value:.4g}")


def graph(circuits: Sequence[Circuit], n: int) -> Part:
    """The n strongest edges of each circuit, of which one is shown at a time.

    Args:
        circuits: of one graph, found at the level of edges.
    """
    own = circuits[0].graph
    edges = [_edges(c, n) for c in circuits]
    methods = [
        {
            "name": c.method,
            "edges": [[w, r, *map(_short, (*score, share))] for w, r, score, share in found],
            "nodes": [_short(x) for x in node_scores(c)[0].tolist()],
        }
        for c, found in zip(circuits, edges, strict=True)
    ]
    drawn = {
        "layers": [[layer.heads, layer.groups] for layer in own.layers],
        "writers": _writers(own),
        "readers": _readers(own, {edge[1] for found in edges for edge in found}),
        "methods": methods,
    }
    sure = len(circuits[0].replicates) > 0
    rows = [
        [f"{own.writers[w]} → {own.readers[r]}", f"{score.value:+.4f}",
         *([f"{score.low:+.4f} to {score.high:+.4f}", f"{share:.0%}"] if sure else [])]
        for w, r, score, share in edges[0]
    ]  # fmt: skip
    note = (
        "An edge is what one component adds to what another reads of it: "
        "what it changes of the number, to first order. Width is strength; dashed edges work "
        "against it. Point at a node or an edge, or choose a node with the arrow keys and Enter."
    )
    head = ["edge", "score", *(["95 % interval", f"in top {n}"] if sure else [])]
    return part(
        "graph", "The circuit", note, drawn=drawn, head=head, rows=rows, most=len(rows),
        shown=min(SHOWN, len(rows)), layers=len(own.layers), methods=[c.method for c in circuits],
        of=own.n_edges,
    )  # fmt: skip
