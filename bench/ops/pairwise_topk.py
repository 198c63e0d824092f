# SPDX-License-Identifier: Apache-2.0
"""The k strongest pairs of two sets of vectors, without the matrix."""

from __future__ import annotations

import torch

import mikernels

from ..harness.pairs import Operands, operands
from ..harness.spec import Benchmark, Outputs, Provider, Runner, Target, Verdict


def _make(s, randn):
    return {"a": randn(s.n, s.d), "b": randn(s.m, s.d)}


def _ours(inputs: Operands) -> Outputs:
    found = mikernels.pairwise_topk(inputs.a, inputs.b, k=inputs.shape.k)
    return {"values": found.values, "rows": found.rows, "cols": found.cols}


def _eager(inputs: Operands) -> Outputs:
    scores = inputs.a @ inputs.b.T
    flat = scores.abs().flatten().topk(inputs.shape.k).indices
    rows, cols = flat // scores.shape[1], flat % scores.shape[1]
    return {"values": scores[rows, cols], "rows": rows, "cols": cols}


def _product(inputs: Operands) -> Outputs:
    return {"product": inputs.a @ inputs.b.T}


def _scores(inputs: Operands, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    return (inputs.a[rows].double() * inputs.b[cols].double()).sum(-1)


def _check(inputs: Operands, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    if "product" in outputs:
        # the yardstick of the target, not a way to select
        rows, cols = eager["rows"], eager["cols"]
        exact, values = _scores(inputs, rows, cols), outputs["product"][rows, cols]
    else:
        rows, cols, values = outputs["rows"], outputs["cols"], outputs["values"]
        exact = _scores(inputs, rows, cols)
    theirs = _scores(inputs, eager["rows"], eager["cols"])
    scale = float(theirs.abs().max())
    rounding = torch.finfo(values.dtype).eps * scale
    error = float((values.double() - exact).abs().max())
    eager_error = float((eager["values"].double() - theirs).abs().max())
    wrong = [] if error <= 2 * eager_error + rounding else [f"values: error {error:.2e}"]
    # strength for strength, the selection is as good as eager's within eager's own rounding
    gap = theirs.abs().sort().values - exact.abs().sort().values
    if not float(gap.max()) <= 2 * (eager_error + rounding):
        wrong.append(f"a stronger pair was missed by {float(gap.max()):.2e}")
    pairs = rows * inputs.shape.m + cols
    if "product" not in outputs and len(pairs.unique()) != len(pairs):
        wrong.append("a pair is selected twice")
    return Verdict(not wrong, error / scale, eager_error / scale, "; ".join(wrong))


def _provider(name: str, run, **kind) -> Provider:
    return Provider(name, lambda inputs, mode: Runner(lambda: run(inputs)), **kind)


BENCHMARK = Benchmark(
    name="pairwise_topk",
    summary="the k strongest of n x m inner products",
    ops=("pairwise_topk",),
    modes=("fwd",),
    shapes={"fwd": ("features",)},
    gpu_shapes={"fwd": ("features", "features-64k")},
    inputs=operands(_make),
    providers=(
        _provider("ours", _ours, ours=True, screens=True),
        _provider("eager", _eager),
        _provider("product alone", _product),
    ),
    check=_check,
    flops=lambda s, mode: 2.0 * s.n * s.m * s.d,
    bytes=lambda s, mode, size: size * (s.n + s.m) * s.d,
    # at most 1.3 times the product's time
    targets=(
        Target("features", "fwd", "product alone", 1 / 1.3, extra_mb=64.0),
        Target("features", "fwd", "eager", 1.0),
        Target("features-64k", "fwd", "product alone", 1 / 1.15),
    ),
    family="pairs",
)
