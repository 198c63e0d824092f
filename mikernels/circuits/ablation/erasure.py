# SPDX-License-Identifier: Apache-2.0
"""Comprehensiveness and sufficiency of a ranking of components.

Of n components ranked best first, m(b | S) being the number of prompt b with S ablated and k a
fraction of n (rounded, at least one):

    comprehensiveness(k) = m(b) - m(b | the best k)         large: they are all that matters
    sufficiency(k)       = m(b) - m(b | all but the best k)  small: they are enough

and the score is the mean over the fractions (DeYoung et al., arXiv 1911.03429, of the words of a
text; Edin et al., arXiv 2505.17630, of the parts of a model). The fractions are theirs: 1, 5, 10,
20 and 50 %. Components that are not in the ranking are never ablated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from mikernels.circuits.ablation.effect import asked
from mikernels.circuits.ablation.scope import Positions
from mikernels.circuits.ablation.subsets import bounds, means, values_without
from mikernels.circuits.prompts import Inputs
from mikernels.circuits.tables import Columns
from mikernels.circuits.targets import Target
from mikernels.nn.sae import SAE
from mikernels.values.intervals import Interval

FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True, eq=False)
class Erasure:
    """How much of a behaviour is lost by fraction. Prints as a table.

    Attributes:
        measure: "comprehensiveness" or "sufficiency". label: of the number, in words. kind: of
            ablation.
        fractions: of the components. sizes: how many that is.
        clean: `[B]` float64, the number for each prompt in the whole model.
        values: `[K, B]`, without the best (or but the best) of each size.
    """

    measure: str
    label: str
    kind: str
    fractions: tuple[float, ...]
    sizes: tuple[int, ...]
    clean: torch.Tensor
    values: torch.Tensor

    @property
    def score(self) -> Interval:
        """The mean over fractions and prompts, with Student's 95 % interval over prompts."""
        return means((self.clean - self.values).mean(0, keepdim=True))[0]

    @property
    def curve(self) -> tuple[Interval, ...]:
        """The mean over prompts for each fraction."""
        return tuple(means(self.clean - self.values))

    def _columns(self) -> Columns:
        rows = [
            (f"{fraction:.3g}", str(size), f"{value:+.4f}", f"{one.value:+.4f}", bounds(one))
            for fraction, size, value, one in zip(
                self.fractions, self.sizes, self.values.mean(-1).tolist(), self.curve, strict=True
            )
        ]
        what = "ablated" if self.measure == "comprehensiveness" else "kept"
        mean = self.clean.mean().item()
        return Columns(
            f"{self.measure} of {self.label}: {mean:.3f} at first; {self.kind} ablation",
            ("fraction", what, "number", "lost", "95 % interval"),
            [*rows, ("mean", "", "", f"{self.score.value:+.4f}", bounds(self.score))],
            signs=3,
        )

    def __str__(self) -> str:
        return str(self._columns())

    def __rich__(self) -> Table:
        return self._columns().__rich__()


def _measured(
    where: str,
    model: torch.nn.Module,
    prompts: Inputs,
    metric: Target | None,
    ranking: Sequence[str],
    kind: str,
    fractions: Sequence[float],
    options: Mapping[str, Any],
) -> Erasure:
    steps = tuple(fractions)
    if not steps or not all(0 < f <= 1 for f in steps) or list(steps) != sorted(set(steps)):
        raise ValueError(
            f"{where}: fractions must ascend, above 0 and at most 1, got {list(steps)}"
        )
    if isinstance(ranking, str) or any(set(str(name)) & set("*?[") for name in ranking):
        raise TypeError(f"{where}: ranking must be names, best first, got {ranking!r}")
    ablation, read, behavior = asked(where, model, prompts, metric, ranking, kind, **options)
    n = len(ablation.names)
    sizes = tuple(max(1, round(f * n)) for f in steps)
    best = torch.arange(n) < torch.tensor(sizes)[:, None]
    which = best if where == "comprehensiveness" else ~best
    which = torch.cat([torch.zeros(1, n, dtype=torch.bool), which])
    found = values_without(ablation, read, behavior, which, options["batch"])
    return Erasure(where, behavior.label, kind, steps, sizes, found[0], found[1:])


def comprehensiveness(
    model: torch.nn.Module,
    prompts: Inputs,
    metric: Target | None,
    ranking: Sequence[str],
    kind: str = "mean",
    *,
    fractions: Sequence[float] = FRACTIONS,
    reference: Inputs | None = None,
    counterfactual: Inputs | None = None,
    positions: Positions | None = None,
    per_position: bool = False,
    saes: Mapping[Any, SAE] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    batch: int = 64,
) -> Erasure:
    """How much a behaviour loses without the best components of a ranking.

    `m(b) - m(b | the best k)`, for each fraction k and their mean; large means that the ranking
    finds what matters.

    Args:
        model, prompts, metric, kind: as for `ablation_effect`.
        ranking: names of components, best first, as `[c.name for c in probe.ranking]`.
        fractions: of their number, ascending.
        reference, counterfactual, positions, per_position, saes: as for `ablation_effect`.
        tokenizer, seed, batch: likewise.

    Raises:
        TypeError, ValueError, RuntimeError: as `ablation_effect`; other fractions.

    Source: DeYoung et al., arXiv 1911.03429.

    Example:
        >>> task = circuits.tasks.ioi(tokenizer, 4)
        >>> probe = circuits.gim_probe(model, task.inputs, task.target)
        >>> names = [component.name for component in probe.ranking]
        >>> print(circuits.comprehensiveness(model, task.inputs, task.target, names, "zero"))
        comprehensiveness of logit difference of a pair per prompt: ... at first; zero ablation
        fraction  ablated   number     lost       95 % interval
        0.01            1  ...
        mean      ...
    """
    options = {
        "reference": reference, "counterfactual": counterfactual, "positions": positions,
        "per_position": per_position, "saes": saes, "tokenizer": tokenizer, "seed": seed,
        "batch": batch,
    }  # fmt: skip
    return _measured("comprehensiveness", model, prompts, metric, ranking, kind, fractions, options)


def sufficiency(
    model: torch.nn.Module,
    prompts: Inputs,
    metric: Target | None,
    ranking: Sequence[str],
    kind: str = "mean",
    *,
    fractions: Sequence[float] = FRACTIONS,
    reference: Inputs | None = None,
    counterfactual: Inputs | None = None,
    positions: Positions | None = None,
    per_position: bool = False,
    saes: Mapping[Any, SAE] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    batch: int = 64,
) -> Erasure:
    """How much a behaviour loses with nothing left of a ranking but its best components.

    `m(b) - m(b | all but the best k)`, for each fraction k and their mean; small means that the
    best are enough.

    Args, errors, source: as for `comprehensiveness`.

    Example:
        >>> task = circuits.tasks.ioi(tokenizer, 4)
        >>> names = ["L0.mlp", "L1.h2", "L2.h0"]
        >>> found = circuits.sufficiency(
        ...     model, task.inputs, task.target, names, "mean", reference=task.counterfactual_inputs
        ... )
        >>> found.score.low < found.score.value < found.score.high
        True
    """
    options = {
        "reference": reference, "counterfactual": counterfactual, "positions": positions,
        "per_position": per_position, "saes": saes, "tokenizer": tokenizer, "seed": seed,
        "batch": batch,
    }  # fmt: skip
    return _measured("sufficiency", model, prompts, metric, ranking, kind, fractions, options)
