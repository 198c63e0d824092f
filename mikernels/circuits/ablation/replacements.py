# SPDX-License-Identifier: Apache-2.0
"""What stands for a component that is ablated.

| kind | for the activation at token p of prompt b stands |
|---|---|
| zero | 0 |
| mean | its mean over the tokens of the reference prompts; by position: over their p-th tokens |
| counterfactual | that at token p of the counterfactual of prompt b |
| resample | that at token p of another reference prompt of the same length |

(Zhang and Nanda, arXiv 2309.16042; resampling as in causal scrubbing, Chan et al. 2022.) Means are
summed in float64, without padding. Resampled, all components of a prompt are those of one other
prompt, and every reference prompt is used once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from mikernels.circuits.ablation.place import Place
from mikernels.circuits.passes import run
from mikernels.circuits.prompts import Inputs, Prompts, read_prompts
from mikernels.models.parts import Decoder

KINDS = ("zero", "mean", "counterfactual", "resample")
# prompts that a reference pass reads at once
BATCH = 16


@dataclass(frozen=True, eq=False)
class Values:
    """What stands for the components of every place.

    Attributes:
        tensors: of each place `[W]`; `[P, W]` by position; `[N, P, W]` by prompt and position.
        shape: (N, P) that calls must have, None for any.
        known: bool `[P]`: the positions that there is a mean for; None for all.
    """

    tensors: tuple[torch.Tensor, ...]
    shape: tuple[int | None, int | None] = (None, None)
    known: torch.Tensor | None = None

    def of(self, place: int, rows: torch.Tensor | None) -> torch.Tensor:
        """For a call of which row r is prompt rows[r]."""
        value = self.tensors[place]
        return value if rows is None or value.dim() < 3 else value[rows.to(value.device)]


def read_reference(
    where: str,
    decoder: Decoder,
    kind: str,
    reference: Inputs | None,
    counterfactual: Inputs | None,
    per_position: bool,
    tokenizer: Any,
) -> Prompts | None:
    """The prompts whose activations a kind needs, None without.

    Raises:
        TypeError, ValueError: another kind; prompts that it needs and were not given, or were given
            and it does not need; one prompt to resample from.
    """
    if kind not in KINDS:
        raise ValueError(f"{where}: kind must be one of {KINDS}, got {kind!r}")
    given = {"reference": reference, "counterfactual": counterfactual}
    needed = {"zero": None, "counterfactual": "counterfactual"}.get(kind, "reference")
    for name, inputs in given.items():
        if name == needed and inputs is None:
            raise ValueError(
                f"{where}: {name} must be given for kind={kind!r}, got None; give prompts whose "
                f"activations stand for those that are ablated"
            )
        if name != needed and inputs is not None:
            raise ValueError(
                f"{where}: {name} must be left out for kind={kind!r}, which reads {needed}"
            )
    if per_position and kind != "mean":
        raise ValueError(f"{where}: per_position must be of kind='mean', got kind={kind!r}")
    if needed is None:
        return None
    prompts = read_prompts(decoder, needed, given[needed], tokenizer)  # type: ignore[arg-type]
    if kind == "resample":
        for rows in _alike(prompts):
            if len(rows) < 2:
                raise ValueError(
                    f"{where}: reference must hold at least 2 prompts of each length for "
                    f"kind='resample', got none with the tokens of row {rows[0]}; leave that out"
                )
    return prompts


def _alike(prompts: Prompts) -> list[list[int]]:
    """The rows that have tokens at the same positions."""
    found: dict[bytes, list[int]] = {}
    for row, kept in enumerate(prompts.mask.cpu().numpy()):
        found.setdefault(kept.tobytes(), []).append(row)
    return list(found.values())


def _others(prompts: Prompts, seed: int) -> torch.Tensor:
    """For each prompt another one of its length, all of them once: random cycles."""
    draw = np.random.default_rng(seed)
    found = np.empty(len(prompts.ids), dtype=np.int64)
    for rows in _alike(prompts):
        order = draw.permutation(rows)
        found[order] = np.roll(order, -1)
    return torch.from_numpy(found)


def _recorded(
    decoder: Decoder, places: Sequence[Place], prompts: Prompts
) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """For some prompts at a time the activations `[b, P, W]` of every place."""
    n, width = prompts.ids.shape
    for begin in range(0, n, BATCH):
        rows = slice(begin, begin + BATCH)
        part = prompts.rows(rows)
        found: dict[int, torch.Tensor] = {}

        def see(place: int, x: torch.Tensor, found: dict[int, torch.Tensor] = found) -> None:
            # the model may change it in place when it goes on
            found[place] = x.clone()

        with ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
            for number, place in enumerate(places):
                for remove in place.watch((len(part.ids), width), partial(see, number)):
                    stack.callback(remove)
            run(decoder, part.given, last=True)
        if missed := [p.name for i, p in enumerate(places) if i not in found]:
            raise decoder.refusal(f"a pass over the reference does not reach {missed[0]}")
        yield rows, [found[i] for i in range(len(places))]


def _means(
    decoder: Decoder, places: Sequence[Place], prompts: Prompts, per_position: bool
) -> list[torch.Tensor]:
    """`[W]` or `[P, W]` of each place."""
    dims = (0,) if per_position else (0, 1)
    sums: list[Any] = [0.0] * len(places)
    for rows, found in _recorded(decoder, places, prompts):
        for i, x in enumerate(found):
            kept = prompts.mask[rows].to(x.device)[..., None]
            sums[i] = sums[i] + torch.where(kept, x, 0).sum(dims, dtype=torch.float64)
    counts = prompts.mask.sum(dims)[..., None].clamp(min=1)
    return [total / counts.to(total.device) for total in sums]


def make_values(
    where: str,
    decoder: Decoder,
    kind: str,
    places: Sequence[Place],
    prompts: Prompts | None,
    per_position: bool,
    seed: int,
) -> Values:
    """Run the model over the reference, if there is one.

    Raises:
        ValueError: activations that are not finite.
    """
    if prompts is None:
        return Values(tuple(torch.zeros(1) for _ in places))
    n, width = prompts.ids.shape
    if kind == "mean":
        means = _means(decoder, places, prompts, per_position)
        tokens = prompts.mask.any(0)
        known = tokens if per_position and not tokens.all() else None
        values = Values(tuple(means), (None, width if per_position else None), known)
    else:
        parts = [found for _, found in _recorded(decoder, places, prompts)]
        whole = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        if kind == "resample":
            others = _others(prompts, seed)
            whole = [x[others.to(x.device)] for x in whole]
        values = Values(tuple(whole), (n, width))
    for place, x in zip(places, values.tensors, strict=True):
        # of padding nothing is asked
        kept = x[prompts.mask.to(x.device)] if x.dim() == 3 else x
        if not kept.isfinite().all():
            raise ValueError(
                f"{where}: activations of the reference must be finite, got NaN or inf at "
                f"{place.name}; load the model in a wider dtype"
            )
    return values
