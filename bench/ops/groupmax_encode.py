# SPDX-License-Identifier: Apache-2.0
"""GroupMax encode: the best feature of each of k groups."""

from __future__ import annotations

from collections.abc import Callable

import torch

import mikernels

from ..harness.correctness import values_gate
from ..harness.spec import CPU, Benchmark, Outputs, Provider, Runner, Verdict
from .encode import PIECE, ROWS, Inputs


def _ours(inputs: Inputs) -> torch.Tensor:
    return mikernels.groupmax_encode(
        inputs.x, inputs.w_enc, inputs.b_enc, k=inputs.k, b_dec=inputs.b_dec
    ).values


def _eager(inputs: Inputs) -> torch.Tensor:
    """As sparsify has it: relu, unflatten, max."""
    scores = torch.relu(torch.addmm(inputs.b_enc, inputs.x - inputs.b_dec, inputs.w_enc.T))
    values, within = scores.unflatten(-1, (inputs.k, -1)).max(dim=-1)
    within.add_(torch.arange(0, inputs.shape.f, inputs.shape.f // inputs.k, device=within.device))
    return values


def _runner(encode: Callable[[Inputs], torch.Tensor]) -> Callable[[Inputs, str], Runner]:
    return lambda inputs, mode: Runner(lambda: {"values": encode(inputs)})


def _exact(inputs: Inputs) -> torch.Tensor:
    def scores(x: torch.Tensor) -> torch.Tensor:
        centred = x.double() - inputs.b_dec.double()
        products = [centred @ w.double().T for w in inputs.w_enc.split(ROWS)]
        return torch.cat(products, 1).add_(inputs.b_enc).relu_()

    pieces = [scores(x).unflatten(-1, (inputs.k, -1)).amax(-1) for x in inputs.x.split(PIECE)]
    return torch.cat(pieces)


def _check(inputs: Inputs, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    """The values by group, which a wrong feature would change."""
    if inputs.exact is None:
        inputs.exact = {"values": _exact(inputs)}
    return values_gate(outputs, eager, inputs.exact)


BENCHMARK = Benchmark(
    name="groupmax_encode",
    ops=("groupmax_encode",),
    summary="the best feature of each of k groups, exactly",
    modes=("fwd",),
    shapes={"fwd": ("S1", "S2")},
    inputs=Inputs,
    providers=(
        Provider("ours", _runner(_ours), ours=True, screens=True, devices=(CPU,)),
        Provider("eager", _runner(_eager)),
    ),
    check=_check,
    flops=lambda s, mode: 2 * s.n * s.d * s.f,
    bytes=lambda s, mode, size: size * (s.n * s.d + s.f * s.d + s.f),
)
