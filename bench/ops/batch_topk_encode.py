# SPDX-License-Identifier: Apache-2.0
"""BatchTopK encode: the k N best features of a whole batch."""

from __future__ import annotations

from collections.abc import Callable

import torch

import mikernels

from ..harness.correctness import values_gate
from ..harness.spec import CPU, Benchmark, Outputs, Provider, Runner, Verdict
from .encode import PIECE, Inputs


def _total(inputs: Inputs) -> int:
    return inputs.k * inputs.shape.n


def _ours(inputs: Inputs) -> torch.Tensor:
    codes, _ = mikernels.batch_topk_encode(
        inputs.x, inputs.w_enc, inputs.b_enc, k=inputs.k, b_dec=inputs.b_dec
    )
    return codes.values


def _eager(inputs: Inputs) -> torch.Tensor:
    """As SAELens and dictionary_learning have it: relu, flatten, topk."""
    scores = torch.relu(torch.addmm(inputs.b_enc, inputs.x - inputs.b_dec, inputs.w_enc.T))
    return scores.flatten().topk(_total(inputs), sorted=False).values


def _runner(encode: Callable[[Inputs], torch.Tensor]) -> Callable[[Inputs, str], Runner]:
    return lambda inputs, mode: Runner(lambda: {"values": encode(inputs)})


def _exact(inputs: Inputs) -> torch.Tensor:
    best = inputs.x.new_empty(0, dtype=torch.float64)
    w_enc = inputs.w_enc.double().T
    for x in inputs.x.split(PIECE):
        scores = (x.double() - inputs.b_dec.double()) @ w_enc + inputs.b_enc.double()
        best = torch.cat([best, scores.relu_().flatten()])
        best = best.topk(min(_total(inputs), len(best))).values
    return best


def _check(inputs: Inputs, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    """The values by rank, which a wrong pair would change."""
    if inputs.exact is None:
        inputs.exact = {"values": _exact(inputs)}
    ranked = [{"values": o["values"].sort(descending=True).values} for o in (outputs, eager)]
    return values_gate(*ranked, inputs.exact)


BENCHMARK = Benchmark(
    name="batch_topk_encode",
    ops=("batch_topk_encode",),
    summary="the k N best features of a batch, exactly",
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
