# SPDX-License-Identifier: Apache-2.0
"""Which edges or nodes a circuit is made of, by their scores, and which of those have an effect.

Entries are the nodes of a graph, or its edges, as one list in the order of the model: writer by
writer, and of one writer reader by reader. A key is what an entry is chosen by: its score, or the
score's size. At equal keys the first in that order is chosen.

* `top`: the best n, EAP-IG's and MIB's top-n.
* `greedy`: from the logits up, always the best edge into a node that is already in the circuit
  (Hanna et al., arXiv 2403.17806).
* `milp`: the best n of which every edge lies on a path from `input` to `logits`
  (`mikernels.circuits.programme`).

**What has no effect.** In a patched run a reader's input is that of the counterfactual plus, over
the kept edges into it, what its writers now write less what they wrote there. So a node that no
kept path from `input` reaches has the inputs of the counterfactual, writes the same, and its edges
carry 0; and an edge from whose reader no kept path leads to `logits` changes nothing that is read.
Without the edges that lie on no such path the logits are the same, bit by bit where a block gives
equal outputs for equal inputs; any other edge may matter. A head is reached through its q, k or v.
This is so for counterfactual ablation alone: with others a node that nothing reaches writes
`f(mean)` or `f(0)`, which is not the mean of what it writes, nor 0.
"""

from __future__ import annotations

import heapq
import math
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch

from mikernels.models.graph import Graph

HOWS = ("top", "greedy", "milp")


class Choice(NamedTuple):
    """Some entries.

    Attributes:
        mask: bool `[W, R]` or `[W]`.
        total: the sum of their keys.
        bound: no choice of as many, under the same conditions, has a larger sum; NaN: not known.
    """

    mask: torch.Tensor
    total: float
    bound: float


def entry_name(graph: Graph, place: list[int]) -> str:
    """Of the node `[w]` its name, of the edge `[w, r]` `L3.h7 -> L5.h2.q`."""
    return " -> ".join([graph.writers[place[0]], *(graph.readers[r] for r in place[1:])])


def entries(graph: Graph, level: str) -> torch.Tensor:
    """Where they lie: bool `[W, R]` or `[W]`."""
    return graph.allowed() if level == "edge" else torch.ones(len(graph.writers), dtype=torch.bool)


def count(where: str, name: str, size: float, n: int, least: int = 0) -> int:
    """How many of n entries `size` says: an int is a number, a float the fraction `int(size n)`.

    Raises:
        TypeError, ValueError: for neither, or too few or many.
    """
    fix = f"an int {least}..{n} (how many), or a float 0..1 (a fraction of them)"
    if isinstance(size, bool) or not isinstance(size, Real):
        raise TypeError(f"{where}: {name} must be {fix}, got {size!r}")
    if isinstance(size, Integral):
        found = int(size)
    elif not 0 <= size <= 1:
        meant = f"; {int(size)} of them is an int" if size > 1 and size == int(size) else ""
        raise ValueError(f"{where}: {name} must be {fix}, got {size}{meant}")
    else:
        # rounded down, as MIB does
        found = int(size * n)
    if not least <= found <= n:
        of = "" if isinstance(size, Integral) else f" ({size} of {n})"
        raise ValueError(f"{where}: {name} must be {fix}, got {found}{of}")
    return found


def values_of(where: str, graph: Graph, level: str, scores: torch.Tensor) -> np.ndarray:
    """The scores of all entries, float64.

    Raises:
        ValueError: scores of another shape, or that are not finite, with the first's name.
    """
    there = entries(graph, level)
    if scores.shape != there.shape:
        raise ValueError(
            f"{where}: scores must be {list(there.shape)} for the {level}s of {graph}, got "
            f"{list(scores.shape)}"
        )
    found = scores.detach().cpu()
    bad = (there & ~found.isfinite()).nonzero()
    if len(bad):
        place = bad[0].tolist()
        raise ValueError(
            f"{where}: scores must be finite, got {found[tuple(place)].item()} for "
            f"{entry_name(graph, place)} ({len(bad)} of {int(there.sum())}); find the circuit in a "
            f"wider dtype"
        )
    return found[there].double().numpy()


def best(keys: np.ndarray, n: int) -> np.ndarray:
    """Bool: the n largest, of equal ones the first."""
    if n == 0:
        return np.zeros(len(keys), bool)
    least = np.partition(keys, len(keys) - n)[len(keys) - n]
    mask = keys > least
    mask[np.flatnonzero(keys == least)[: n - mask.sum()]] = True
    return mask


def grow(graph: Graph, keys: np.ndarray, n: int) -> np.ndarray:
    """Bool: the n edges of the greedy choice. 0.1 s for SmolLM2-135M's 70,651 edges."""
    order = np.argsort(-keys, kind="stable")
    places = graph.allowed().numpy().nonzero()
    rank = np.empty(len(keys), np.int64)
    rank[order] = np.arange(len(keys))
    ranks = np.full((len(graph.readers), len(graph.writers)), -1)
    ranks[places[1], places[0]] = rank
    readers: list[list[int]] = [[] for _ in graph.writers]
    for reader, made in enumerate(graph.feeds):
        for writer in made:
            readers[writer].append(reader)
    writer_of, reader_of = (place[order].tolist() for place in places)
    # of each reader of a node in the circuit the edges left, best last; its best is in the heap
    left: dict[int, list[int]] = {}
    heap: list[int] = []

    def reach(reader: int) -> None:
        if reader not in left:
            left[reader] = np.sort(ranks[reader, : graph.prefix[reader]])[::-1].tolist()
            heapq.heappush(heap, left[reader].pop())

    reach(len(graph.readers) - 1)
    inside = {0}
    chosen: list[int] = []
    while len(chosen) < n:
        edge = heap[0]
        chosen.append(edge)
        if left[reader_of[edge]]:
            heapq.heapreplace(heap, left[reader_of[edge]].pop())
        else:
            heapq.heappop(heap)
        if writer_of[edge] not in inside:
            inside.add(writer_of[edge])
            for reader in readers[writer_of[edge]]:
                reach(reader)
    mask = np.zeros(len(keys), bool)
    mask[order[chosen]] = True
    return mask


def on_paths(graph: Graph, edges: torch.Tensor) -> torch.Tensor:
    """Of edges `[W, R]` bool those that lie on a path of them from `input` to `logits`."""
    into = np.ascontiguousarray(edges.cpu().numpy().T)
    reached, used = (np.zeros(len(graph.writers), bool) for _ in range(2))
    read = np.zeros(len(graph.readers), bool)
    reached[0] = read[-1] = True
    # readers lie in the order of the model: what is before one is known when it is come to
    for reader, made in enumerate(graph.feeds):
        if (into[reader] & reached).any():
            reached[list(made)] = True
    for reader in reversed(range(len(graph.readers))):
        read[reader] |= used[list(graph.feeds[reader])].any()
        if read[reader]:
            used |= into[reader]
    kept = into & reached & read[:, None]
    return torch.from_numpy(np.ascontiguousarray(kept.T)).to(edges.device)


def choose(
    where: str,
    graph: Graph,
    level: str,
    scores: torch.Tensor,
    size: float,
    how: str,
    absolute: bool,
    time_limit: float,
) -> Choice:
    """`size` entries by their scores. See `Circuit.select`."""
    if how not in HOWS:
        raise ValueError(f"{where}: how must be one of {', '.join(HOWS)}, got {how!r}")
    if level == "node" and how != "top":
        raise ValueError(
            f"{where}: how must be 'top' for nodes, got {how!r}; every node reads the input and "
            f"writes to the logits, so that all choices are connected"
        )
    if not isinstance(time_limit, Real) or not time_limit > 0 or math.isinf(time_limit):
        raise ValueError(f"{where}: time_limit must be seconds > 0, got {time_limit!r}")
    values = values_of(where, graph, level, scores)
    keys = abs(values) if absolute else values
    n = count(where, "size", size, len(keys))
    mask, bound = best(keys, n), math.nan
    if how == "greedy":
        mask = grow(graph, keys, n)
    elif how == "milp" and 0 < n < len(keys):
        # 0.2 s of imports that nothing else here needs
        from mikernels.circuits.programme import solve

        mask, bound = solve(where, graph, keys, n, time_limit)
    else:
        bound = float(keys[mask].sum())
    there = entries(graph, level)
    found = torch.zeros_like(there)
    found[there] = torch.from_numpy(mask)
    total = float(keys[mask].sum())
    return Choice(found.to(scores.device), total, max(bound, total) if bound == bound else bound)
