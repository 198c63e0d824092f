# SPDX-License-Identifier: Apache-2.0
"""The behaviour's number with each of several subsets of components ablated.

Subsets lie beside each other in the batch: each prompt is repeated once a subset, and a mask says
what is replaced in which row. So a forward pass of a few prompts costs no more for many subsets
than one of as many prompts.
"""

from __future__ import annotations

import torch

from mikernels.circuits.ablation.context import Ablation
from mikernels.circuits.passes import run
from mikernels.circuits.prompts import Prompts
from mikernels.circuits.targets import Behavior
from mikernels.values.intervals import Interval, mean_intervals


@torch.no_grad()
def values_without(
    ablation: Ablation, prompts: Prompts, behavior: Behavior, which: torch.Tensor, batch: int
) -> torch.Tensor:
    """`[S, B]`: the number of each prompt without each subset.

    Args:
        which: bool `[S, n]`, of the n components those that are ablated.
        batch: rows of a forward pass; a callable gets all prompts at once whatever it is.
    """
    b = len(prompts.ids)
    step = b if behavior.function is not None else min(b, batch)
    found = torch.empty(len(which), b, dtype=torch.float64)
    for begin in range(0, b, step):
        rows = torch.arange(begin, min(begin + step, b))
        part = prompts.rows(slice(begin, begin + step))
        own, last = behavior[begin : begin + step], behavior.only_last(part.kept)
        for subset in torch.arange(len(which)).split(max(1, batch // len(rows))):
            many = part.times(len(subset))
            masks = which[subset].repeat_interleave(len(rows), 0)
            with ablation.entered(masks, rows.repeat(len(subset))):
                logits = run(ablation.decoder, many.given, last)
            for i, one in zip(subset.tolist(), logits.split(len(rows)), strict=True):
                found[i, rows] = own(one, None if last else part.kept).double().cpu()
    return found


def means(values: torch.Tensor) -> list[Interval]:
    """Of `[S, B]` over prompts, with Student's 95 % interval."""
    return mean_intervals(values.numpy().T)


def bounds(interval: Interval) -> str:
    return f"[{interval.low:+.4f}, {interval.high:+.4f}]"
