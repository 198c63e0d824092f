# SPDX-License-Identifier: Apache-2.0
"""Readers' inputs under a mask of edges: circuit evaluation and mask learning."""

from __future__ import annotations

import torch

import mikernels

from ..harness.pairs import against, operands, runs
from ..harness.spec import Benchmark


def _make(s, randn):
    return {
        "base": randn(s.batch, s.positions, s.d),
        "delta": randn(s.batch, s.positions, s.n, s.d),
        "mask": (randn(s.n, s.m) > 0).float(),
    }


def _einsum(x):
    return torch.einsum("wr,bpwd->bprd", x.mask, x.delta) + x.base[:, :, None]


def _matmul(x):
    return torch.matmul(x.mask.T, x.delta) + x.base[:, :, None]


BENCHMARK = Benchmark(
    name="edge_mix",
    summary="base + mask^T delta for every reader",
    ops=("edge_mix",),
    modes=("fwd",),
    shapes={"fwd": ("gpt2-layer", "llama")},
    gpu_shapes={"fwd": ("gpt2-layer", "llama")},
    inputs=operands(_make),
    providers=(
        runs("ours", lambda x: mikernels.edge_mix(x.base, x.delta, x.mask), ours=True),
        runs("eager", _einsum),
        runs("matmul", _matmul),
    ),
    check=against(_matmul),
    flops=lambda s, mode: 2.0 * s.batch * s.positions * s.n * s.m * s.d,
    bytes=lambda s, mode, size: size * s.batch * s.positions * (s.n + s.m + 1) * s.d,
    family="pairs",
)
