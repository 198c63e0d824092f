# SPDX-License-Identifier: Apache-2.0
"""The threshold that keeps a fraction of the mass of an attribution graph's edges."""

from __future__ import annotations

import torch

import mikernels
from mikernels.ops.select.mass_threshold import mass_threshold_op

from ..harness.pairs import against, operands, runs
from ..harness.spec import CUDA, Benchmark, Provider, Runner, Target, need

FRACTION = 0.98


def _make(s, randn):
    # edge scores spread over several orders of magnitude
    return {"x": randn(s.m).mul_(2).exp_()}


def _sorted(x):
    ordered = x.x.sort(descending=True).values
    mass = ordered.cumsum(0) / ordered.sum()
    return ordered[min(int(torch.searchsorted(mass, FRACTION)), len(ordered) - 1)]


def _in_cuda(x, mode):
    need(mass_threshold_op, "cuda")
    return Runner(lambda: {"out": mikernels.mass_threshold(x.x, FRACTION, impl="cuda")})


def _exact(x):
    # in fp32 the running sum of 30 million numbers stands still: the answer is fp64's
    return mikernels.mass_threshold(x.x, FRACTION, impl="reference")


BENCHMARK = Benchmark(
    name="mass_threshold",
    summary="threshold above which 98 % of the mass lies",
    ops=("mass_threshold",),
    modes=("fwd",),
    shapes={"fwd": ("scores",)},
    gpu_shapes={"fwd": ("scores",)},
    inputs=operands(_make),
    providers=(
        runs("ours", lambda x: mikernels.mass_threshold(x.x, FRACTION), ours=True),
        Provider("ours:cuda", _in_cuda, devices=(CUDA,)),
        # circuit-tracer's find_threshold
        runs("eager", _sorted),
    ),
    check=against(_exact),
    flops=lambda s, mode: 2.0 * s.m,
    bytes=lambda s, mode, size: 2.0 * size * s.m,
    targets=(Target("scores", "fwd", "eager", 10.0, dtype="fp32"),),
    family="pairs",
    # the largest scores are beyond fp16
    gpu_dtypes=("bf16", "fp32"),
)
