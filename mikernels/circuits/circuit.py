# SPDX-License-Identifier: Apache-2.0
"""A circuit: what every edge or node of a model's graph does for a behaviour, and the best of
them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from mikernels.circuits import saved
from mikernels.circuits.ranking import Ranked, rank
from mikernels.circuits.selection import choose, entries, entry_name, on_paths
from mikernels.circuits.tables import Columns
from mikernels.models.graph import Graph
from mikernels.models.rules import RuleReport

LEVELS = ("edge", "node")


@dataclass(frozen=True, eq=False)
class Selection:
    """Some edges, or nodes, of a graph: the rest is ablated.

    Attributes:
        graph: of the model. level: "edge" or "node".
        mask: bool `[W, R]` for edges, `[W]` for nodes: those that are kept.
        how: they were chosen.
        total: the sum of their scores, or of the sizes of these; NaN where they were not chosen by
            them.
        bound: no choice of as many under the same conditions has a larger total; NaN: not known.
    """

    graph: Graph
    level: str
    mask: torch.Tensor
    how: str = "given"
    total: float = math.nan
    bound: float = math.nan

    @property
    def names(self) -> tuple[str, ...]:
        """Of nodes `L3.h7`, of edges `L3.h7 -> L5.h2.q`, in the order of the model."""
        return tuple(entry_name(self.graph, place) for place in self.mask.nonzero().tolist())

    @property
    def edges(self) -> torch.Tensor:
        """Bool `[W, R]`: the edges that are kept; of a node all that leave it."""
        if self.level == "edge":
            return self.mask
        return self.mask[:, None] & self.graph.allowed().to(self.mask.device)

    @property
    def gap(self) -> float:
        """By what part a better choice may have more: 0 is proved to be the best, NaN not known."""
        if self.bound == self.total:
            return 0.0
        return (self.bound - self.total) / max(abs(self.bound), abs(self.total))

    def pruned(self) -> Selection:
        """Without what lies on no path from `input` to `logits`.

        With counterfactual ablation the model computes the same with it and without (see
        `mikernels.circuits.selection`). Of nodes that is all, or, without `input`, none.
        """
        kept = on_paths(self.graph, self.edges)
        mask = kept if self.level == "edge" else kept.any(1)
        return Selection(self.graph, self.level, mask, self.how)

    def __len__(self) -> int:
        return int(self.mask.sum())

    def __str__(self) -> str:
        of = int(entries(self.graph, self.level).sum())
        text = f"{self.how}: {len(self)} of {of} {self.level}s, {len(self.pruned())} of them on a "
        text += "path from input to logits"
        if not math.isnan(self.total):
            text += f"; scores of {self.total:.6g}"
        return text + (f", at most {self.bound:.6g} ({self.gap:.2%} more)" if self.gap > 0 else "")


@dataclass(frozen=True, eq=False)
class Circuit:
    """What every edge (or node) does for a behaviour, to first order. Prints as a table.

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
        rules: what the backward rules acted on (as text, of a circuit that was loaded), None
            without any.
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
    rules: RuleReport | str | None

    def select(
        self, size: float, how: str = "top", absolute: bool = True, *, time_limit: float = 60.0
    ) -> Selection:
        """The best edges, or nodes, by their scores.

        Args:
            size: an int: how many; a float: the fraction of all, rounded down, so that 1 is one of
                them and 1.0 all.
            how: "top": the best; equal ones in the order of the model. "greedy": from the logits
                up, always the best edge into a node that is already in the circuit (Hanna et al.,
                arXiv 2403.17806), so that all lead to the logits. "milp": the best of which each
                lies on a path from `input` to `logits`, by an integer programme. Nodes are all
                connected: "top" alone.
            absolute: by the sizes of scores, as for a circuit that behaves as the model (MIB's
                CMD); False: what helps most (its CPR).
            time_limit: seconds for "milp".

        Returns:
            Selection: of `size` edges. Those of "top" and "greedy" that no path from `input`
            reaches, or that lead nowhere, are counted, as in MIB's curves, which prune afterwards;
            `.pruned()` is without them and computes the same.

        Warns:
            UserWarning: "milp" did not finish, with what is left to prove; also in `.bound`.

        Raises:
            TypeError, ValueError: another size or `how`; scores that are not finite.
            TimeoutError: "milp" found nothing in time.

        Example:
            >>> task = circuits.tasks.ioi(tokenizer, 4)
            >>> question = task.inputs, task.counterfactual_inputs, task.target
            >>> found = circuits.find_circuit(model, *question, replicates=0)
            >>> print(found.select(20, "milp"))
            milp: 20 of 190 edges, 20 of them on a path from input to logits; scores of ...
        """
        where, graph = "Circuit.select", self.graph
        found = choose(where, graph, self.level, self.scores, size, how, absolute, time_limit)
        return Selection(graph, self.level, found.mask, how, found.total, found.bound)

    def ranking(self, k: float = 10, absolute: bool = True) -> list[Ranked]:
        """The k strongest (a float: that fraction), each with the interval of its score.

        Raises:
            TypeError, ValueError: another k; scores that are not finite.
        """
        where, graph = "Circuit.ranking", self.graph
        return rank(where, graph, self.level, self.scores, self.replicates, k, absolute)

    def head_matrix(self) -> torch.Tensor:
        """`[layers, heads]`: the scores of heads, NaN where a layer has fewer.

        Of edges the sum of all that leave a head. That is the score of its node: a head's output
        is added to the residual stream, so that its gradient is the sum of those of its readers.
        """
        scores = self.scores if self.level == "node" else self.scores.sum(1)
        layers = self.graph.layers
        found = scores.new_full((len(layers), max(layer.heads for layer in layers)), math.nan)
        for i, layer in enumerate(layers):
            first = self.graph.first_writer(i)
            found[i, : layer.heads] = scores[first : first + layer.heads]
        return found

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {
            "values": self.values,
            "counterfactual_values": self.counterfactual_values,
            "scores": self.scores,
            "replicates": self.replicates,
        }
        if self.positions is not None:
            tensors["positions"] = self.positions
        facts = {"level": self.level, "method": self.method, "label": self.label}
        rules = None if self.rules is None else str(self.rules)
        saved.write(Path(path), self.graph, {**facts, "rules": rules}, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """What `save` wrote, on the CPU.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is another, or damaged, with its path.
        """
        return cls(**{"positions": None, **saved.read(Path(path))})

    def _table(self, k: int = 10) -> Columns:
        total = int(entries(self.graph, self.level).sum())
        rows = self.ranking(min(k, total))
        title = (
            f"{self.label}: {self.values.mean().item():.3f}, of counterfactuals "
            f"{self.counterfactual_values.mean().item():.3f} (mean of {len(self.values)} prompts)\n"
            f"{self.method}, {self.graph}: the {len(rows)} strongest {self.level}s"
        )
        head: tuple[str, ...] = ("", self.level, "score")
        cells = [(str(i), row.name, f"{row.score.value:+.4g}") for i, row in enumerate(rows, 1)]
        if not len(self.replicates):
            return Columns(title, head, cells, (1,), 2)
        sure = (
            (f"[{row.score.low:+.3g}, {row.score.high:+.3g}]", f"{row.inclusion:.0%}")
            for row in rows
        )
        head += ("95 % interval", f"in top {len(rows)}")
        return Columns(title, head, [a + b for a, b in zip(cells, sure, strict=True)], (1,), 2)

    def __str__(self) -> str:
        return str(self._table())

    def __rich__(self) -> Table:
        return self._table().__rich__()
