# SPDX-License-Identifier: Apache-2.0
"""What a behaviour loses without each of some components, and without all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from mikernels.circuits.ablation.context import FIX, Ablation, make_ablation
from mikernels.circuits.ablation.names import Names, read_names, read_saes
from mikernels.circuits.ablation.scope import Positions
from mikernels.circuits.ablation.subsets import bounds, means, values_without
from mikernels.circuits.prompts import Inputs, Prompts, check_aligned, read_prompts
from mikernels.circuits.tables import Columns
from mikernels.circuits.targets import Behavior, Target, read_target, vocabulary
from mikernels.models.decoder import find_decoder
from mikernels.models.hooks import original
from mikernels.models.parts import Decoder
from mikernels.nn.sae import SAE
from mikernels.values.intervals import Interval

NAME = "ablation_effect"


@dataclass(frozen=True, eq=False)
class AblationEffect:
    """What n components do for a behaviour. Prints as a table (plain, and with `rich.print`).

    Attributes:
        label: of the behaviour's number, in words. kind: of ablation.
        names: of the components, or of the groups of them.
        clean: `[B]` float64, the number for each prompt in the whole model.
        alone: `[n, B]`, with one of them ablated. together: `[B]`, with all of them.
    """

    label: str
    kind: str
    names: tuple[str, ...]
    clean: torch.Tensor
    alone: torch.Tensor
    together: torch.Tensor

    @property
    def lost(self) -> tuple[Interval, ...]:
        """Of each component `clean - alone`: the mean over prompts with Student's 95 % interval."""
        return tuple(means(self.clean - self.alone))

    @property
    def all_lost(self) -> Interval:
        """The same of all of them."""
        return means((self.clean - self.together)[None])[0]

    def _columns(self) -> Columns:
        values = [*self.alone.mean(-1).tolist(), self.together.mean().item()]
        lost = [*self.lost, self.all_lost]
        named = [*self.names, f"all {len(self.names)}"]
        order = sorted(range(len(self.names)), key=lambda i: -abs(lost[i].value))
        mean, b = self.clean.mean().item(), len(self.clean)
        prompts = "1 prompt" if b == 1 else f"mean of {b} prompts"
        return Columns(
            f"{self.label}: {mean:.3f} ({prompts}); {self.kind} ablation",
            ("without", "number", "lost", "95 % interval"),
            [
                (named[i], f"{values[i]:+.4f}", f"{lost[i].value:+.4f}", bounds(lost[i]))
                for i in (*order, len(self.names))
            ],
            signs=2,
        )

    def __str__(self) -> str:
        return str(self._columns())

    def __rich__(self) -> Table:
        return self._columns().__rich__()


def asked(
    where: str,
    model: torch.nn.Module,
    prompts: Inputs,
    metric: Target | None,
    names: Names,
    kind: str,
    reference: Inputs | None,
    counterfactual: Inputs | None,
    positions: Positions | None,
    per_position: bool,
    saes: Mapping[Any, SAE] | None,
    tokenizer: Any,
    seed: int,
    batch: int,
) -> tuple[Ablation, Prompts, Behavior]:
    """What the functions here are given, read and checked before the model runs on the prompts.

    Raises:
        TypeError, ValueError: as `ablate`; other prompts or metrics; prompts that the kind's
            activations do not belong to, token by token.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"{where}: batch must be at least 1, got {batch!r}")
    ablation = make_ablation(
        where, model, names, kind, reference, counterfactual, positions, per_position, saes,
        tokenizer, seed,
    )  # fmt: skip
    decoder = ablation.decoder
    read = read_prompts(decoder, "prompts", prompts, tokenizer)
    behavior = read_target(where, metric, len(read.ids), vocabulary(decoder), tokenizer)
    at = ablation.positions
    if isinstance(at, torch.Tensor) and at.shape != read.ids.shape:
        raise ValueError(
            f"{where}: positions must be those of the prompts {list(read.ids.shape)}, got "
            f"{list(at.shape)}"
        )
    if kind == "counterfactual":
        assert counterfactual is not None
        other = read_prompts(decoder, kind, counterfactual, tokenizer)
        check_aligned(where, read, other, "prompts")
    if kind == "resample":
        assert reference is not None
        other = read_prompts(decoder, "reference", reference, tokenizer)
        if other.ids.shape != read.ids.shape or not torch.equal(other.mask, read.mask):
            raise ValueError(
                f"{where}: reference must have the tokens of prompts one by one for kind="
                f"'resample', got {list(other.ids.shape)} for {list(read.ids.shape)}, or other "
                f"padding; give the prompts themselves"
            )
    return ablation, read, behavior


def ablation_effect(
    model: torch.nn.Module,
    prompts: Inputs,
    metric: Target | None,
    names: Names | Mapping[str, Names],
    kind: str = "mean",
    *,
    reference: Inputs | None = None,
    counterfactual: Inputs | None = None,
    positions: Positions | None = None,
    per_position: bool = False,
    saes: Mapping[Any, SAE] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    batch: int = 64,
) -> AblationEffect:
    """What a behaviour loses without each of some components alone, and without all of them.

    With m(b) the number of prompt b and m(b | S) that with the components S ablated: `m(b) - m(b |
    {c})` of each component c, and `m(b) - m(b | all)`.

    Args:
        model, kind, reference, counterfactual, positions, per_position, saes, tokenizer, seed: as
            for `ablate`.
        names: as for `ablate`; or a mapping, label -> names that are ablated together.
        prompts: in any form that `gim_probe` takes.
        metric: the behaviour's number, a target as for `gim_probe` (`mikernels.circuits.targets`).
        batch: rows of a forward pass, prompts times components. A callable gets all prompts at
            once.

    Returns:
        AblationEffect: prints as a table.

    Raises:
        TypeError, ValueError, RuntimeError: as `ablate`, and for prompts and metrics as
            `gim_probe`; for counterfactuals, or prompts to resample from, that are not aligned.

    Example:
        >>> task = circuits.tasks.ioi(tokenizer, 4)
        >>> names, other = ["L1.h2", "L2.mlp"], task.counterfactual_inputs
        >>> print(circuits.ablation_effect(
        ...     model, task.inputs, task.target, names, "mean", reference=other
        ... ))
        logit difference of a pair per prompt: ... (mean of 4 prompts); mean ablation
        without   number     lost       95 % interval
        L1.h2    ...
        L2.mlp   ...
        all 2    ...
    """
    decoder = find_decoder(original(model), NAME, FIX)
    at = read_saes(NAME, decoder, saes)
    if isinstance(names, Mapping):
        groups = {label: _spelt(decoder, group, at) for label, group in names.items()}
    else:
        groups = {name: [name] for name in _spelt(decoder, names, at)}
    union = list(dict.fromkeys(name for group in groups.values() for name in group))
    ablation, read, behavior = asked(
        NAME, model, prompts, metric, union, kind, reference, counterfactual, positions,
        per_position, saes, tokenizer, seed, batch,
    )  # fmt: skip
    n = len(union)
    which = torch.zeros(len(groups) + 2, n, dtype=torch.bool)
    for i, group in enumerate(groups.values(), 1):
        which[i, [union.index(name) for name in group]] = True
    which[-1] = True
    found = values_without(ablation, read, behavior, which, batch)
    return AblationEffect(behavior.label, kind, tuple(groups), found[0], found[1:-1], found[-1])


def _spelt(decoder: Decoder, names: Names, saes: Mapping[str, SAE]) -> list[str]:
    return [part.name for part in read_names(NAME, decoder, names, saes)]
