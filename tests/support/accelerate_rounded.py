# SPDX-License-Identifier: Apache-2.0
"""Runs under bf16 autocast, in which a few selections differ from fp64's, whoever computes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate_cases import assert_as_accurate

Run = tuple[Mapping[str, torch.Tensor], torch.Tensor]


def assert_as_accurate_in_bf16(found: Run, exact: Run, eager: Run) -> None:
    """The error-ratio rule of parameters, all together, of losses and of firing.

    One selection that differs moves single numbers by more than all rounding, so that parameters
    are judged as one, and one rounding is one of bf16.

    Args:
        found, exact, eager: each the numbers, of which "losses" and parameters, and where [steps,
            F] features were silent.
    """
    runs: Sequence[Run] = (found, exact, eager)
    names = [n for n, t in exact[0].items() if n != "losses" and t.dtype.is_floating_point]
    whole = [
        {"parameters": torch.cat([numbers[n].double().flatten() for n in names])}
        for numbers, _ in runs
    ]
    assert_as_accurate(*whole)
    losses = [{"losses": numbers["losses"]} for numbers, _ in runs]
    assert_as_accurate(*losses, torch.bfloat16)
    other = [float((silent != exact[1]).double().mean()) for _, silent in runs] or [0.0]
    limit = 2 * other[2] + torch.finfo(torch.bfloat16).eps
    assert other[0] <= limit or not exact[1].numel(), f"{other[0]:.2%} > {limit:.2%} fire otherwise"
