# SPDX-License-Identifier: Apache-2.0
"""Edge scores of heads from their z: the heads' outputs are never formed."""

from __future__ import annotations

import torch

import mikernels

from ..harness.pairs import against, operands, runs
from ..harness.spec import Benchmark


def _make(s, randn):
    # a quarter of the heads that the writers of the shape are, d / heads numbers each
    heads, width = max(1, s.n // 4), 64 if s.d < 2048 else 128
    return {
        "dz": randn(s.batch, s.positions, heads, width),
        "w_o": randn(heads, width, s.d),
        "grad": randn(s.batch, s.positions, s.m, s.d),
    }


def _eager(x):
    rows = torch.einsum("bphe,hed->bphd", x.dz, x.w_o)
    return torch.einsum("bphd,bprd->hr", rows, x.grad)


def _flops(s, mode):
    heads, width = max(1, s.n // 4), 64 if s.d < 2048 else 128
    return 2.0 * s.batch * s.positions * heads * s.d * (width + s.m)


def _bytes(s, mode, size):
    heads, width = max(1, s.n // 4), 64 if s.d < 2048 else 128
    return size * (s.batch * s.positions * (heads * width + s.m * s.d) + heads * width * s.d)


BENCHMARK = Benchmark(
    name="edge_heads",
    summary="edge scores whose writers are heads, given by z",
    ops=("edge_heads_",),
    modes=("fwd",),
    shapes={"fwd": ("gpt2", "llama")},
    gpu_shapes={"fwd": ("gpt2", "llama")},
    inputs=operands(_make),
    providers=(
        runs("ours", lambda x: mikernels.edge_scores_heads(x.dz, x.w_o, x.grad), ours=True),
        runs("eager", _eager),
    ),
    check=against(_eager),
    flops=_flops,
    bytes=_bytes,
    family="pairs",
)
