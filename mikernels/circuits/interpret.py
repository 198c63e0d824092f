# SPDX-License-Identifier: Apache-2.0
"""Selected pairs by name, and the groups that they connect.

Pairs of `select_top_k` have no direction: their score is an inner product, S[i, j] = S[j, i]. Of
gradients a positive one says that the same move raises the answer at both components; of activation
times gradient, that both add to the answer at the same positions and coordinates, and a negative
one that one takes away what the other adds. Whether one reads what the other writes it does not
say: that is what the edges of `find_circuit` are, from a writer to a reader.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from mikernels.circuits.interactions import NamedInteractions
from mikernels.circuits.tables import Columns
from mikernels.values.interactions import Interactions

# L3.h7 and L3H7; a3.h7 and m3; model.layers.3.mlp, blocks.3.attn, transformer.h.3.attn
LAYER = re.compile(r"^L(\d+)(?:\D|$)|^a(\d+)\.h\d+|^m(\d+)$|(?:^|\.)(?:layers?|blocks?|h)\.(\d+)")


@dataclass(frozen=True)
class CircuitEdge:
    """One selected pair.

    Attributes:
        first, second: names, that in the earlier layer first if both tell theirs, which says no
            more than where they are; of directed pairs the source and the target.
        score: as selected.
        kind: "reinforcing" (score > 0), "opposing" (< 0), "neutral" (0) or "undefined" (NaN).
        first_layer, second_layer: as the names tell them, else None.
        circuit: number of the circuit, 1 for that of the strongest pair; None for neutral and
            undefined pairs, which connect nothing.
    """

    first: str
    second: str
    score: float
    kind: str
    first_layer: int | None
    second_layer: int | None
    circuit: int | None


class Circuits(list[CircuitEdge]):
    """A list of pairs, strongest first, that prints as a table (plain, and with `rich.print`).

    Attributes:
        groups: the names of each circuit, a connected component of the graph of the pairs, in the
            order of the model; circuit c is `groups[c - 1]`.
        directed: whether a pair leads from its first to its second, as `col_names` make it.
    """

    def __init__(
        self,
        edges: Sequence[CircuitEdge] = (),
        groups: Sequence[tuple[str, ...]] = (),
        directed: bool = False,
    ):
        super().__init__(edges)
        self.groups = list(groups)
        self.directed = directed

    def _table(self) -> Columns:
        if self.directed:
            title, ends = "edges from source to target", ("source", "target")
        else:
            title, ends = "pairs, alike (+) or opposed (-), without direction", ("first", "second")
        rows = [(e.first, e.second, f"{e.score:+.4g}", e.kind, str(e.circuit or "-")) for e in self]
        return Columns(title, (*ends, "score", "kind", "circuit"), rows, (0, 1, 3, 4), 2)

    def _lines(self) -> list[str]:
        groups = enumerate(self.groups, 1)
        return [f"circuit {number}: {', '.join(names)}" for number, names in groups]

    def __str__(self) -> str:
        return "\n".join([str(self._table()), *self._lines()])

    def __rich__(self) -> RenderableType:
        return Group(self._table().__rich__(), *map(Text, self._lines()))


def _layer(name: str) -> int | None:
    found = LAYER.search(name)
    return int(next(digits for digits in found.groups() if digits)) if found else None


def _kind(score: float) -> str:
    if score != score:
        return "undefined"
    return "reinforcing" if score > 0 else "opposing" if score < 0 else "neutral"


def _connected(pairs: list[tuple[str, str]]) -> dict[str, int]:
    """Name -> number of its connected component, from 1 in the order of the pairs."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        leader.setdefault(name, name)
        while leader[name] != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    for a, b in pairs:
        leader[find(a)] = find(b)
    numbers: dict[str, int] = {}
    for pair in pairs:
        for name in pair:
            numbers.setdefault(find(name), len(numbers) + 1)
    return {name: numbers[find(name)] for name in leader}


def interpret_circuits(
    top: Interactions,
    names: Sequence[str] | None = None,
    col_names: Sequence[str] | None = None,
) -> Circuits:
    """Names the components of selected pairs and groups those that are connected.

    Args:
        top: of select_top_k, which has names; or any Interactions, with names given here.
        names: of the rows; and of the columns without col_names.
        col_names: of the columns, for pairs with a direction (a writer's row, a reader's column):
            the first of a pair is then the row, whatever the layers.

    Returns:
        Circuits: a list of CircuitEdge, strongest first, with `groups`; `directed` with col_names.

    Raises:
        TypeError, ValueError: without names, or with too few or too many.
    """
    if not isinstance(top, Interactions):
        raise TypeError(
            f"interpret_circuits: top must be Interactions, got {type(top).__name__}; pass what "
            f"select_top_k returned"
        )
    if names is None and isinstance(top, NamedInteractions):
        names = top.names
    if names is None:
        raise ValueError("interpret_circuits: names must be given for Interactions without names")
    directed = col_names is not None
    columns = names if col_names is None else col_names
    for what, given, size in (("names", names, 0), ("col_names", columns, 1)):
        if len(given) != top.shape[size]:
            raise ValueError(
                f"interpret_circuits: {what} must be {top.shape[size]} for pairs of "
                f"{list(top.shape)}, got {len(given)}"
            )
    found: list[tuple[str, str, float]] = []
    for row, col, score in zip(
        top.rows.tolist(), top.cols.tolist(), top.values.tolist(), strict=True
    ):
        first, second = names[row], columns[col]
        layers = _layer(first), _layer(second)
        if not directed and None not in layers and layers[1] < layers[0]:  # type: ignore[operator]
            first, second = second, first
        found.append((first, second, score))
    circuit = _connected([(a, b) for a, b, score in found if score > 0 or score < 0])
    edges = [
        CircuitEdge(
            a, b, score, _kind(score), _layer(a), _layer(b),
            circuit.get(a) if score > 0 or score < 0 else None,
        )
        for a, b, score in found
    ]  # fmt: skip
    order = dict.fromkeys([*names, *columns])
    groups: list[list[str]] = [[] for _ in set(circuit.values())]
    for name in order:
        if name in circuit:
            groups[circuit[name] - 1].append(name)
    return Circuits(edges, [tuple(group) for group in groups], directed)
