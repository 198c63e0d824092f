# SPDX-License-Identifier: Apache-2.0
"""How much of a behaviour a circuit keeps, at every size: MIB's curve.

With m the mean over prompts of the behaviour's number, N the whole model, and C_k the model in
which all but the k best edges (or nodes) are cut (`mikernels.circuits.patching`),

    f(k) = (m(C_k) - m(C_0)) / (m(N) - m(C_0))

    CPR  = integral of f(x n) dx,    CMD = integral of |1 - f(x n)| dx

over the fraction x of the n edges, by the trapezoid rule between MIB's fractions (Mueller et al.,
arXiv 2504.13151), which give k = int(x n). A circuit that does what the model does has CMD 0; one
that does more, for edges that work against the behaviour are cut, has a large CPR. Edges are taken
by score for CPR, and by absolute score for CMD.

f is a ratio of means: its interval is that of resampled prompts (bootstrap), all three means anew.
One run of the counterfactuals, one of the prompts and one for each of nine fractions, 11 in all;
9 for each further circuit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, overload

import numpy as np
import torch
from rich.table import Table

from mikernels.circuits.circuit import LEVELS, Circuit
from mikernels.circuits.patching import Patcher
from mikernels.circuits.prompts import Inputs
from mikernels.circuits.tables import Columns
from mikernels.circuits.targets import Target
from mikernels.models.graph import Graph
from mikernels.values.intervals import Interval, bootstrap

NAME = "faithfulness_curve"
MIB = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def faithfulness(units: np.ndarray) -> np.ndarray:
    """f `[..., n]` of units `[..., B, 2 + n]`: of each prompt the numbers of the whole model, of
    that with everything cut, and of n circuits."""
    clean, empty, *_ = means = np.moveaxis(units.mean(-2), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # a resample of prompts without any effect: the interval is then not known
        # + 0: no -0
        return np.moveaxis((means[2:] - empty) / (clean - empty) + 0.0, 0, -1)


@dataclass(frozen=True, eq=False)
class Curve:
    """The behaviour that the k best edges or nodes keep. Prints as a table.

    Attributes:
        method, level: of the circuit. label: of the behaviour's number, in words.
        fractions: of the edges or nodes. sizes: k of each.
        clean, empty: `[B]` float64: the number of each prompt in the whole model, and with
            everything cut. values: `[len(fractions), B]`.
    """

    method: str
    level: str
    label: str
    fractions: tuple[float, ...]
    sizes: tuple[int, ...]
    clean: torch.Tensor
    empty: torch.Tensor
    values: torch.Tensor

    @property
    def _units(self) -> np.ndarray:
        return torch.cat([torch.stack([self.clean, self.empty]), self.values]).T.numpy()

    def _interval(self, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval:
        return bootstrap(lambda units: statistic(faithfulness(units)), self._units)

    def _area(self, f: np.ndarray) -> np.ndarray:
        """By the trapezoid rule; 0 of a single fraction."""
        return (f[..., 1:] + f[..., :-1]) / 2 @ np.diff(self.fractions)

    @cached_property
    def faithfulness(self) -> list[Interval]:
        """f of each fraction, with its 95 % interval over prompts."""
        return [self._interval(itemgetter((..., i))) for i in range(len(self.sizes))]

    @cached_property
    def cpr(self) -> Interval:
        """The area under f: larger is better."""
        return self._interval(self._area)

    @cached_property
    def cmd(self) -> Interval:
        """The area between f and 1: smaller is better."""
        return self._interval(lambda f: self._area(abs(1 - f)))

    def smallest(self, tau: float) -> int | None:
        """The least of the sizes at which, and at all larger ones, f is at least tau; None if the
        largest is below it. Sizes between these are not looked at: `minimal_circuit` does."""
        found = None
        for size, f in sorted(zip(self.sizes, self.faithfulness, strict=True), reverse=True):
            if f.value < tau:
                break
            found = size
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "method": self.method,
            "level": self.level,
            "label": self.label,
            "prompts": len(self.clean),
            "clean": self.clean.mean().item(),
            "empty": self.empty.mean().item(),
            "fractions": list(self.fractions),
            "sizes": list(self.sizes),
            "faithfulness": [f.to_dict() for f in self.faithfulness],
            "cpr": self.cpr.to_dict(),
            "cmd": self.cmd.to_dict(),
        }

    def _table(self) -> Columns:
        rows = [
            (f"{100 * x:.4g} %", f"{size:,}", f"{f.value:.3f}", f"[{f.low:.3f}, {f.high:.3f}]")
            for x, size, f in zip(self.fractions, self.sizes, self.faithfulness, strict=True)
        ]
        title = (
            f"{self.method}: CPR {self.cpr}, CMD {self.cmd}\n"
            f"{self.label}: {self.clean.mean():.3f}, {self.empty.mean():.3f} with everything cut "
            f"(mean of {len(self.clean)} prompts)"
        )
        return Columns(title, ("kept", f"{self.level}s", "faithfulness", "95 % interval"), rows, ())

    def __str__(self) -> str:
        return str(self._table())

    def __rich__(self) -> Table:
        return self._table().__rich__()


def random_circuit(graph: Graph, level: str = "edge", seed: int = 0) -> Circuit:
    """A circuit whose scores are drawn: what any other must be better than.

    Raises:
        ValueError: for another level.

    Example:
        >>> task = circuits.tasks.ioi(tokenizer, 4)
        >>> found = circuits.find_circuit(
        ...     model, task.inputs, task.counterfactual_inputs, task.target
        ... )
        >>> chance = circuits.random_circuit(found.graph, found.level)
        >>> chance.scores.shape == found.scores.shape
        True
    """
    if level not in LEVELS:
        raise ValueError(f"random_circuit: level must be one of {LEVELS}, got {level!r}")
    w, r = len(graph.writers), len(graph.readers)
    shape = (w, r) if level == "edge" else (w,)
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if level == "edge":
        scores = scores.where(graph.allowed(), 0)
    none = torch.zeros(0)
    return Circuit(
        graph, level, "random", "nothing", none, none, scores, scores.new_zeros(0, *shape), None,
        None,
    )  # fmt: skip


def read_circuits(where: str, circuits: Any) -> list[Circuit]:
    """One or several of one model and level.

    Raises:
        TypeError, ValueError: something else.
    """
    found = [circuits] if isinstance(circuits, Circuit) else list(circuits)
    if not found or not all(isinstance(one, Circuit) for one in found):
        kinds = ", ".join(sorted({type(one).__name__ for one in found})) or "none"
        raise TypeError(
            f"{where}: circuits must be Circuits, got {kinds}; find_circuit finds one, "
            f"random_circuit draws one"
        )
    if len(levels := {one.level for one in found}) > 1:
        raise ValueError(
            f"{where}: circuits must be of one level, got {' and '.join(sorted(levels))}; call "
            f"once for each"
        )
    if len(graphs := {str(one.graph) for one in found if one.graph != found[0].graph}) > 0:
        raise ValueError(
            f"{where}: circuits must be of one model, got {found[0].graph} and {graphs.pop()}"
        )
    return found


def check_model(where: str, circuit: Circuit, patcher: Patcher) -> None:
    """Raises ValueError for a circuit of another model."""
    if circuit.graph != patcher.graph:
        raise ValueError(
            f"{where}: circuits must be of this model, {patcher.graph}, got one of "
            f"{circuit.graph}; find it in this model"
        )


def size_of(circuit: Circuit) -> int:
    """Of how many edges or nodes it is."""
    return circuit.graph.n_edges if circuit.level == "edge" else len(circuit.graph.writers)


@overload
def faithfulness_curve(
    model: torch.nn.Module, clean: Inputs, corrupted: Inputs | None, metric: Target | None,
    circuits: Circuit, *, tokenizer: Any = ..., fractions: Sequence[float] = ..., how: str = ...,
    absolute: bool = ..., ablation: str = ..., batch: int | None = ...,
) -> Curve: ...  # fmt: skip


@overload
def faithfulness_curve(
    model: torch.nn.Module, clean: Inputs, corrupted: Inputs | None, metric: Target | None,
    circuits: Sequence[Circuit], *, tokenizer: Any = ..., fractions: Sequence[float] = ...,
    how: str = ..., absolute: bool = ..., ablation: str = ..., batch: int | None = ...,
) -> list[Curve]: ...  # fmt: skip


def faithfulness_curve(
    model: torch.nn.Module,
    clean: Inputs,
    corrupted: Inputs | None,
    metric: Target | None,
    circuits: Circuit | Sequence[Circuit],
    *,
    tokenizer: Any = None,
    fractions: Sequence[float] = MIB,
    how: str = "top",
    absolute: bool = False,
    ablation: str = "counterfactual",
    batch: int | None = None,
) -> Curve | list[Curve]:
    """How much of a behaviour circuits keep, at every size (see above).

    Args:
        model: a Hugging Face causal language model, or a HookedTransformer, in eval mode.
        clean: prompts, in any form of `gim_probe`'s.
        corrupted: of each prompt a counterfactual, token by token; for a mean the prompts that it
            is taken of; None for zero.
        metric: the behaviour's number, of `mikernels.circuits.targets`: a token, a pair (a, b),
            ...; None: the logit of the token that the model predicts on the clean prompt. A
            callable is given all prompts at once.
        circuits: one, or several of one level, in one call: they share the runs of the model.
        tokenizer: for prompts and metrics that are texts.
        fractions: of the edges or nodes, ascending.
        how, absolute: of `Circuit.select`.
        ablation: what takes the place of what is cut: "counterfactual" (what it is on the
            counterfactual prompt), "zero", "mean" (over prompts and tokens of corrupted), or
            "mean-positional" (at each position, of prompts of as many tokens).
        batch: rows (prompts times circuits) of a run; None: as many as keep what it holds below
            512 MB, and at least one.

    Returns:
        Curve, or a list of them for a sequence of circuits: prints as a table.

    Raises:
        TypeError, ValueError: before the model runs on the prompts, for other arguments; prompts
            and counterfactuals that are not aligned; circuits of another model, or of both levels.
            For a metric that is the same whether all is kept or nothing; for a model whose
            arithmetic is another, with the place and the numbers.

    Example:
        >>> task = circuits.tasks.ioi(tokenizer, 4)
        >>> question = task.inputs, task.counterfactual_inputs, task.target
        >>> found = circuits.find_circuit(model, *question)
        >>> both = [found, circuits.random_circuit(found.graph)]
        >>> ours, chance = circuits.faithfulness_curve(model, *question, both, fractions=[0.1, 0.5])
        >>> print(ours)
        gim: CPR ... [...], CMD ... [...]
        logit difference of a pair per prompt: ... with everything cut (mean of 4 prompts)
        kept  edges  faithfulness      95 % interval
        10 %     19 ...
        50 %     95 ...
        >>> ours.cpr.told_apart(chance.cpr)
        False
    """
    some = read_circuits(NAME, circuits)
    fractions = tuple(float(x) for x in fractions)
    if not fractions or sorted(set(fractions)) != list(fractions) or not all(
        0 <= x <= 1 for x in fractions
    ):  # fmt: skip
        raise ValueError(f"{NAME}: fractions must be ascending, of 0..1, got {fractions}")
    patcher = Patcher(
        NAME, model, clean, corrupted, metric, some[0].level,
        tokenizer=tokenizer, ablation=ablation, batch=batch,
    )  # fmt: skip
    check_model(NAME, some[0], patcher)
    sizes = tuple(int(x * size_of(some[0])) for x in fractions)
    masks = [one.select(size, how=how, absolute=absolute).mask for one in some for size in sizes]
    found = patcher.measure(masks)
    values = found.values.unflatten(0, (len(some), len(sizes)))
    curves = [
        Curve(one.method, one.level, patcher.label, fractions, sizes, found.clean, found.empty, v)
        for one, v in zip(some, values, strict=True)
    ]
    return curves[0] if isinstance(circuits, Circuit) else curves
