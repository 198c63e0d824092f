# SPDX-License-Identifier: Apache-2.0
"""How much of a circuit is found again: in other samples of its prompts, or in other prompts.

A circuit is a statistic, so it has a variance, and for EAP-IG a large one (Méloux et al., arXiv
2510.00845): over bootstrap samples of the prompts, over paraphrases, over settings. Of n finds f,
beside the whole (the scores of all prompts, or the mean of the finds'), with T the k strongest:

| measure | of a find f | |
|---|---|---|
| Jaccard | `|T_f and T| / |T_f or T|` | and of all pairs of finds, `T_f` with `T_g` |
| Spearman | correlation of ranks, the mean of theirs for equal keys | of all, and of `T_f or T` |
| sign flips | the part of T whose score has the other sign in f | a score of 0 has neither |
| inclusion | of an edge: the part of finds with it in `T_f` | (CIRCUS, arXiv 2603.00523) |

The value of each is the mean over finds; its interval the 2.5 and 97.5 percentiles of theirs: what
one more find would give, not how sure the mean is. A few finds make most of the mean of their
scores, so that they lie nearer to it than to each other: there read the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table

from mikernels.circuits.circuit import Circuit, Selection
from mikernels.circuits.selection import best, count, entries, values_of
from mikernels.circuits.tables import Columns
from mikernels.models.graph import Graph
from mikernels.values.intervals import Interval

NAME = "stability"
# entries of T_f side by side while pairs are counted: float32 counts them exactly up to 2^24
CHUNK = 1 << 23


@dataclass(frozen=True, eq=False)
class Stability:
    """How much of a circuit is found again. Prints as a table.

    Attributes:
        graph, level: of the circuits. k: strongest edges, or nodes. absolute: by size.
        finds: how many there were. over: of what, in words.
        jaccard: with the k strongest of the whole. pairwise: of all pairs of finds.
        spearman: with the whole, over all edges. spearman_top: over the k strongest of either.
        sign_flips: among the k strongest of the whole.
        counts: int64 `[W, R]` or `[W]`: in how many finds it is among the k strongest.
    """

    graph: Graph
    level: str
    k: int
    absolute: bool
    finds: int
    over: str
    jaccard: Interval
    pairwise: Interval
    spearman: Interval
    spearman_top: Interval
    sign_flips: Interval
    counts: torch.Tensor

    @property
    def inclusion(self) -> torch.Tensor:
        """Float64 `[W, R]` or `[W]`: the part of finds in which it is among the k strongest."""
        return self.counts.double() / self.finds

    def consensus(self, at_least: float = 0.9) -> Selection:
        """What is among the k strongest in that part of the finds.

        Raises:
            ValueError: for a part that is not in (0, 1].
        """
        if not 0 < at_least <= 1:
            raise ValueError(f"consensus: at_least must be in (0, 1], got {at_least}")
        return Selection(self.graph, self.level, self.inclusion >= at_least, "consensus")

    def _table(self) -> Columns:
        total = int(entries(self.graph, self.level).sum())
        seen = self.inclusion
        top, what = f"top {self.k}", f"{self.level}s"
        measures = {
            f"Jaccard of the {top}, with the whole": self.jaccard,
            f"Jaccard of the {top}, of pairs": self.pairwise,
            f"Spearman, all {what}": self.spearman,
            f"Spearman, the {top} of either": self.spearman_top,
            f"sign flips in the {top}": self.sign_flips,
        }
        rows = [
            (name, f"{found.value:.3f}", f"[{found.low:.3f}, {found.high:.3f}]")
            for name, found in measures.items()
        ]
        rows += [
            (f"{what} in the {top} of 90 % of finds", str(int((seen >= 0.9).sum())), ""),
            (f"{what} in the {top} of any", str(int((seen > 0).sum())), ""),
        ]
        title = f"{top} of {total} {what}, found {self.finds} times ({self.over})"
        return Columns(title, ("measure", "mean", "95 % of finds"), rows)

    def __str__(self) -> str:
        return str(self._table())

    def __rich__(self) -> Table:
        return self._table().__rich__()


def stability(
    circuits: Circuit | Sequence[Circuit], k: float = 10, absolute: bool = True
) -> Stability:
    """How much of a circuit is found again.

    Args:
        circuits: one, for its bootstrap replicates; or several of one model, found on paraphrases,
            perturbed prompts (`tasks.variations`) or other seeds.
        k: an int: how many of the strongest edges, or nodes; a float: the fraction of all.
        absolute: strongest by the size of scores; ranks are of these.

    Returns:
        Stability: prints as a table; `.consensus()`, the edges that nearly all finds share.

    Raises:
        TypeError, ValueError: a circuit without replicates; circuits of several models or levels;
            another k; scores that are not finite.

    Example:
        >>> def found(task):
        ...     question = task.inputs, task.counterfactual_inputs, task.target
        ...     return circuits.find_circuit(model, *question)
        >>> alone = circuits.stability(found(circuits.tasks.ioi(tokenizer, 4)), 10)
        >>> bool(0 <= alone.jaccard.value <= 1)
        True
        >>> tasks = circuits.tasks.variations("ioi", tokenizer, 4)
        >>> core = circuits.stability([found(task) for task in tasks], 10).consensus()
    """
    if isinstance(circuits, Circuit):
        first, replicates = circuits, circuits.replicates
        if len(replicates) < 2:
            raise ValueError(
                f"{NAME}: circuit must have 2 replicates or more, got {len(replicates)}; "
                f"find_circuit(..., replicates=100), or give several circuits"
            )
        over, whole = f"bootstrap samples of {len(first.values)} prompts", first.scores
        return _compare(first.graph, first.level, whole, replicates, over, k, absolute)
    found = list(circuits)
    if len(found) < 2 or not all(isinstance(circuit, Circuit) for circuit in found):
        kinds = [type(circuit).__name__ for circuit in found]
        raise TypeError(f"{NAME}: circuits must be a Circuit, or several, got {kinds}")
    first = found[0]
    for i, circuit in enumerate(found):
        if (circuit.graph, circuit.level) != (first.graph, first.level):
            raise ValueError(
                f"{NAME}: circuits must be of one model and level, got {circuit.level}s of "
                f"{circuit.graph} for number {i}, {first.level}s of {first.graph} for number 0"
            )
    scores = [circuit.scores for circuit in found]
    mean = torch.stack([one.cpu().double() for one in scores]).mean(0)
    over = f"circuits by {', '.join(sorted({circuit.method for circuit in found}))}"
    return _compare(first.graph, first.level, mean, scores, over, k, absolute)


def _compare(
    graph: Graph,
    level: str,
    scores: torch.Tensor,
    finds: Iterable[torch.Tensor],
    over: str,
    k: float,
    absolute: bool,
) -> Stability:
    # 0.2 s of imports that nothing else here needs
    from scipy.stats import rankdata

    size = count(NAME, "k", k, int(entries(graph, level).sum()), 1)

    def read(one: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        values = values_of(NAME, graph, level, one)
        keys = abs(values) if absolute else values
        return values, keys, best(keys, size)

    whole, keys, top = read(scores)
    ranks = rankdata(keys)
    rows = []
    tops = []
    counts = np.zeros(len(keys), np.int64)
    # one at a time: of Llama-3.1-8B they are 13 MB each
    for one in finds:
        other, own, own_top = read(one)
        either = top | own_top
        rows.append(
            (
                (top & own_top).sum() / either.sum(),
                _correlation(ranks, rankdata(own)),
                _correlation(rankdata(keys[either]), rankdata(own[either])),
                (np.sign(whole[top]) * np.sign(other[top]) < 0).mean(),
            )
        )
        counts += own_top
        tops.append(np.packbits(own_top))
    jaccard, spearman, spearman_top, flips = map(_percentiles, np.array(rows).T)
    there = entries(graph, level)
    found = torch.zeros(there.shape, dtype=torch.int64)
    found[there] = torch.from_numpy(counts)
    return Stability(
        graph=graph,
        level=level,
        k=size,
        absolute=absolute,
        finds=len(rows),
        over=over,
        jaccard=jaccard,
        pairwise=_percentiles(_pairs(np.stack(tops), size)),
        spearman=spearman,
        spearman_top=spearman_top,
        sign_flips=flips,
        counts=found,
    )


def _percentiles(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of ranks; NaN where all are equal."""
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / size if size else math.nan


def _pairs(tops: np.ndarray, k: int) -> np.ndarray:
    """The Jaccard index of all pairs of rows of packed bits, each of k ones."""
    n = len(tops)
    shared = np.zeros((n, n))
    width = max(1, CHUNK // (8 * n))
    for start in range(0, tops.shape[1], width):
        bits = np.unpackbits(tops[:, start : start + width], axis=1).astype(np.float32)
        shared += bits @ bits.T
    both = shared[np.triu_indices(n, 1)]
    return both / (2 * k - both)
