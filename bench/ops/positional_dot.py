# SPDX-License-Identifier: Apache-2.0
"""Each feature's vector with the gradients at its position: a row of an attribution graph."""

from __future__ import annotations

import torch

import mikernels

from ..harness.pairs import against, operands, runs
from ..harness.spec import Benchmark, Target


def _make(s, randn):
    return {
        "grads": randn(s.m, s.positions, s.d),
        "vectors": randn(s.n, s.d),
        "positions": torch.arange(s.n) * s.positions // s.n,
    }


def _gather(x):
    return torch.einsum("bid,id->ib", x.grads[:, x.positions], x.vectors)


def _exact(x):
    return torch.stack([x.grads[:, p] @ v for p, v in zip(x.positions, x.vectors, strict=True)])


BENCHMARK = Benchmark(
    name="positional_dot",
    summary="<grads[b, position], vector> for every active feature",
    ops=("positional_dot_",),
    modes=("fwd",),
    shapes={"fwd": ("graph",)},
    gpu_shapes={"fwd": ("graph",)},
    inputs=operands(_make),
    providers=(
        runs(
            "ours", lambda x: mikernels.positional_dot(x.grads, x.vectors, x.positions), ours=True
        ),
        # the gather and product of circuit-tracer's score hook
        runs("eager", _gather),
    ),
    check=against(_exact),
    flops=lambda s, mode: 2.0 * s.n * s.m * s.d,
    bytes=lambda s, mode, size: size * (s.n * s.d + s.m * s.positions * s.d + s.n * s.m),
    targets=(Target("graph", "fwd", "eager", 4.0, extra_mb=24.0),),
    family="pairs",
)
