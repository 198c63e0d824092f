# SPDX-License-Identifier: Apache-2.0
"""Second moments of activations: the statistics of rank-one editing."""

from __future__ import annotations

import mikernels

from ..harness.pairs import against, operands, runs
from ..harness.spec import Benchmark


def _make(s, randn):
    return {"x": randn(s.n, s.d)}


BENCHMARK = Benchmark(
    name="second_moment",
    summary="sum of x x^T over tokens",
    ops=(),
    modes=("fwd",),
    shapes={"fwd": ("tokens",)},
    gpu_shapes={"fwd": ("tokens",)},
    inputs=operands(_make),
    providers=(
        runs("ours", lambda x: mikernels.second_moment(x.x), ours=True),
        # the line of ROME's running statistics
        runs("eager", lambda x: x.x.T @ x.x),
    ),
    check=against(lambda x: x.x.T @ x.x),
    flops=lambda s, mode: float(s.n * s.d * (s.d + 1)),
    bytes=lambda s, mode, size: size * (s.n * s.d + s.d * s.d),
    family="pairs",
)
