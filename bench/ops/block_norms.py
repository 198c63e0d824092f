# SPDX-License-Identifier: Apache-2.0
"""Frobenius norms of all products of two sets of matrices: composition scores."""

from __future__ import annotations

import torch

import mikernels

from ..harness.pairs import against, operands, runs
from ..harness.spec import Benchmark


def _make(s, randn):
    return {"a": randn(s.n, s.positions, s.d), "b": randn(s.m, s.d, s.positions)}


def _einsum(x):
    return torch.linalg.vector_norm(torch.einsum("ird,jds->ijrs", x.a, x.b), dim=(2, 3))


def _exact(x):
    return torch.stack([torch.linalg.vector_norm(a @ x.b, dim=(1, 2)) for a in x.a])


BENCHMARK = Benchmark(
    name="block_norms",
    summary="|a_i b_j| for every pair of heads",
    ops=("block_norms",),
    modes=("fwd",),
    shapes={"fwd": ("composition",)},
    gpu_shapes={"fwd": ("composition",)},
    inputs=operands(_make),
    providers=(
        runs("ours", lambda x: mikernels.block_norms(x.a, x.b), ours=True),
        runs("eager", _einsum),
    ),
    check=against(_exact),
    # positions: the rank of a head
    flops=lambda s, mode: 2.0 * s.n * s.m * s.positions**2 * s.d,
    bytes=lambda s, mode, size: size * (s.n + s.m) * s.positions * s.d,
    family="pairs",
)
