# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of pairs share: random operands, and runners of one tensor."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from .correctness import values_gate
from .spec import Outputs, PairShape, Provider, Runner, Verdict, generator

Compute = Callable[[Any], torch.Tensor]


class Operands(SimpleNamespace):
    """Tensors by name, the shape, and the fp64 answer once it was asked for."""

    shape: PairShape
    truth: torch.Tensor | None = None


def operands(make: Callable[..., dict[str, torch.Tensor]]):
    """Inputs of a benchmark from make(shape, randn)."""

    def inputs(shape: PairShape, mode: str, seed: int) -> Operands:
        draw = generator(seed)
        made = make(shape, lambda *sizes: torch.randn(*sizes, generator=draw))
        return Operands(shape=shape, truth=None, **made)

    return inputs


def runs(name: str, compute: Compute, *, ours: bool = False, screens: bool = False) -> Provider:
    """A provider that computes one tensor."""
    return Provider(
        name, lambda inputs, mode: Runner(lambda: {"out": compute(inputs)}), ours, screens
    )


def against(exact: Compute):
    """The gate for one tensor: exact(operands in fp64)."""

    def check(inputs: Operands, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
        if inputs.truth is None:
            wide = vars(inputs).copy()
            for name, value in wide.items():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    wide[name] = value.double()
            inputs.truth = exact(SimpleNamespace(**wide))
        return values_gate(outputs, eager, {"out": inputs.truth})

    return check
