# SPDX-License-Identifier: Apache-2.0
"""Row top-k of a score matrix `[N, F]`."""

from __future__ import annotations

from functools import partial

import torch

import mikernels
from mikernels.ops.select.row_topk import row_topk_op

from ..harness.correctness import Truth, selection_gate, truths, values_gate
from ..harness.spec import (
    CUDA,
    Benchmark,
    Outputs,
    Provider,
    Runner,
    Shape,
    Target,
    Verdict,
    compiled,
    generator,
    need,
)


class _Inputs:
    def __init__(self, shape: Shape, mode: str, seed: int):
        draw = generator(seed)
        self.k = shape.k
        self.scores = torch.randn(shape.n, shape.f, generator=draw)
        self.dvalues = torch.randn(shape.n, shape.k, generator=draw)
        self.truth: list[Truth] | None = None


def _eager(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = torch.topk(scores, k, dim=-1, sorted=False)
    return values, indices


def _runner(top_k):
    def build(inputs: _Inputs, mode: str) -> Runner:
        if mode == "fwd":
            return Runner(lambda: _named(*top_k(inputs.scores, inputs.k)))
        scores = inputs.scores.detach().requires_grad_()
        held: list[torch.Tensor] = []

        def forward() -> None:
            held[:] = top_k(scores, inputs.k)[:1]

        def backward() -> Outputs:
            # every implementation's gradient holds dvalues, slot by slot, at its own indices
            (gradient,) = torch.autograd.grad(held.pop(), scores, inputs.dvalues)
            return {"total": gradient.sum(-1)}

        return Runner(backward, forward)

    return build


def _named_impl(impl: str):
    def build(inputs: _Inputs, mode: str) -> Runner:
        need(row_topk_op, impl)
        return _runner(partial(mikernels.row_topk, impl=impl))(inputs, mode)

    return build


def _named(values: torch.Tensor, indices: torch.Tensor) -> Outputs:
    return {"values": values, "indices": indices}


def _check(inputs: _Inputs, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    if mode == "bwd":
        return values_gate(outputs, eager, {"total": inputs.dvalues.double().sum(-1)})

    if inputs.truth is None:
        n, k = eager["indices"].shape
        inputs.truth = truths(
            lambda rows: (inputs.scores[rows].double(), inputs.scores[rows]),
            n,
            inputs.scores.shape[1],
            k,
        )
    return selection_gate(inputs.truth, outputs, eager, relu=False)


BENCHMARK = Benchmark(
    name="row_topk",
    summary="the k largest of every row, with indices",
    ops=("row_topk",),
    modes=("fwd", "bwd"),
    shapes={"fwd": ("S1",)},
    inputs=_Inputs,
    providers=(
        Provider("ours", _runner(mikernels.row_topk), ours=True),
        Provider("ours:triton", _named_impl("triton"), devices=(CUDA,)),
        Provider("ours:cuda", _named_impl("cuda"), devices=(CUDA,)),
        Provider("eager", _runner(_eager)),
        Provider("compile", lambda inputs, mode: _runner(compiled(_eager))(inputs, mode)),
    ),
    check=_check,
    # one comparison an entry
    flops=lambda s, mode: s.n * s.f if mode == "fwd" else 0.0,
    bytes=lambda s, mode, size: size * s.n * s.f + (size + 8) * s.n * s.k,
    targets=(
        Target("S1", "fwd", "eager", 4.0),
        Target("G2", "fwd", "eager", 8.0, floor=1.5, dtype="bf16"),
    ),
    gpu_shapes={"fwd": ("G1", "G2", "G3")},
)
