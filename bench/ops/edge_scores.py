# SPDX-License-Identifier: Apache-2.0
"""Edge scores: writers' differences with readers' gradients, as EAP and EAP-IG add them up."""

from __future__ import annotations

import torch

import mikernels

from ..harness.pairs import against, operands, runs
from ..harness.spec import Benchmark, Target


def _make(s, randn):
    # the writers before a reader are the first of a buffer of twice as many, as in a real graph
    return {
        "delta": randn(s.batch, s.positions, 2 * s.n, s.d)[:, :, : s.n],
        "grad": randn(s.batch, s.positions, s.m, s.d),
    }


def _einsum(x):
    return torch.einsum("bpwd,bprd->wr", x.delta, x.grad)


def _bmm(x):
    s = x.shape
    delta, grad = (t.reshape(s.batch * s.positions, -1, s.d) for t in (x.delta, x.grad))
    return torch.bmm(delta, grad.mT).sum(0)


def _exact(x):
    parts = zip(x.delta.unbind(), x.grad.unbind(), strict=True)
    return sum(torch.bmm(d, g.mT).sum(0) for d, g in parts)


BENCHMARK = Benchmark(
    name="edge_scores",
    summary="scores of the edges from every earlier writer to the readers of one hook",
    ops=(),
    modes=("fwd",),
    shapes={"fwd": ("gpt2", "gpt2-layer", "llama")},
    gpu_shapes={"fwd": ("gpt2", "gpt2-layer", "llama")},
    inputs=operands(_make),
    providers=(
        runs("ours", lambda x: mikernels.edge_scores(x.delta, x.grad), ours=True),
        # the line of EAP-IG's gradient hook
        runs("eager", _einsum),
        runs("bmm", _bmm),
    ),
    check=against(_exact),
    flops=lambda s, mode: 2.0 * s.batch * s.positions * s.n * s.m * s.d,
    bytes=lambda s, mode, size: size * s.batch * s.positions * (s.n + s.m) * s.d,
    targets=(Target("gpt2", "fwd", "eager", 2.5), Target("llama", "fwd", "eager", 2.5)),
    family="pairs",
)
