# SPDX-License-Identifier: Apache-2.0
"""A circuit: what every edge or node of a model's graph does for a behaviour, and the best of
them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mikernels.models.graph import Graph
from mikernels.models.rules import RuleReport

LEVELS = ("edge", "node")


@dataclass(frozen=True, eq=False)
class Selection:
    """Some edges, or nodes, of a graph: the rest is ablated.

    Attributes:
        graph: of the model. level: "edge" or "node".
        mask: bool `[W, R]` for edges, `[W]` for nodes: those that are kept.
    """

    graph: Graph
    level: str
    mask: torch.Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """Of nodes `L3.h7`, of edges `L3.h7 -> L5.h2.q`, in the order of the model."""
        if self.level == "node":
            return tuple(self.graph.writers[i] for i in self.mask.nonzero()[:, 0].tolist())
        pairs = self.mask.nonzero().tolist()
        return tuple(f"{self.graph.writers[w]} -> {self.graph.readers[r]}" for w, r in pairs)

    def __len__(self) -> int:
        return int(self.mask.sum())


@dataclass(frozen=True, eq=False)
class Circuit:
    """What every edge (or node) does for a behaviour, to first order.

    Attributes:
        graph: of the model. level: "edge" or "node". method: by which it was found.
        label: of the behaviour's number, in words.
        values, counterfactual_values: `[B]`: that number for each prompt, and for its
            counterfactual.
        scores: float32 `[W, R]` (0 where no edge is), or `[W]`: the mean over prompts of what it
            adds to the number of the prompt over that of its counterfactual.
        replicates: float32 `[Q, W, R]` or `[Q, W]`: the same of Q bootstrap samples of the prompts,
            empty (Q = 0) without.
        positions: float32 `[P, W, R]` or `[P, W]`: the scores by position, whose sum they are; None
            unless asked for.
        rules: what the backward rules acted on, None without any.
    """

    graph: Graph
    level: str
    method: str
    label: str
    values: torch.Tensor
    counterfactual_values: torch.Tensor
    scores: torch.Tensor
    replicates: torch.Tensor
    positions: torch.Tensor | None
    rules: RuleReport | None
