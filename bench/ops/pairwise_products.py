# SPDX-License-Identifier: Apache-2.0
"""All inner products of two sets of vectors, summed over a batch."""

from __future__ import annotations

import torch

import mikernels

from ..harness.pairs import against, operands, runs
from ..harness.spec import Benchmark


def _make(s, randn):
    return {"a": randn(s.batch, s.n, s.d)}


def _einsum(x):
    return torch.einsum("bid,bjd->ij", x.a, x.a)


def _long(x):
    rows = x.a.movedim(1, 0).reshape(x.shape.n, -1)
    return rows @ rows.T


BENCHMARK = Benchmark(
    name="pairwise_products",
    summary="Gram matrix of gradients, summed over a batch",
    ops=("pair_products_",),
    modes=("fwd",),
    shapes={"fwd": ("gradients",)},
    gpu_shapes={"fwd": ("gradients",)},
    inputs=operands(_make),
    providers=(
        runs("ours", lambda x: mikernels.pairwise_products(x.a), ours=True),
        runs("ours two-sided", lambda x: mikernels.pairwise_products(x.a, x.a)),
        runs("eager", _einsum),
        runs("one product", _long),
    ),
    check=against(_einsum),
    # both sides are the same: half of the products
    flops=lambda s, mode: float(s.batch * s.n * (s.n + 1) * s.d),
    bytes=lambda s, mode, size: size * (s.batch * s.n * s.d + s.n * s.n),
    family="pairs",
)
