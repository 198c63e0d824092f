# SPDX-License-Identifier: Apache-2.0
"""The slots of all tokens sorted by feature: what every by-feature gradient begins with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mikernels.ops.sae.gradients import by_feature_op

from ..harness.spec import (
    CUDA,
    Benchmark,
    Outputs,
    Provider,
    Runner,
    Shape,
    Target,
    Verdict,
    generator,
    need,
)

Sort = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


class _Inputs:
    def __init__(self, shape: Shape, mode: str, seed: int):
        self.f = shape.f
        self.indices = torch.randint(shape.f, (shape.n * shape.k,), generator=generator(seed))


def _eager(indices: torch.Tensor, n_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    # without a sync, which a bincount is
    features, order = torch.sort(indices, stable=True)
    ends = torch.arange(n_features + 1, device=indices.device)
    return torch.searchsorted(features, ends), order


def _runner(sort: Sort) -> Callable[[_Inputs, str], Runner]:
    def build(inputs: _Inputs, mode: str) -> Runner:
        def run() -> Outputs:
            return dict(zip(("offsets", "order"), sort(inputs.indices, inputs.f), strict=True))

        return Runner(run)

    return build


def _named(impl: str) -> Callable[[_Inputs, str], Runner]:
    def build(inputs: _Inputs, mode: str) -> Runner:
        need(by_feature_op, impl)
        return _runner(lambda indices, f: by_feature_op(indices, f, impl=impl))(inputs, mode)

    return build


def _check(inputs: _Inputs, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    wrong = [name for name, expected in eager.items() if not torch.equal(outputs[name], expected)]
    return Verdict(not wrong, float(len(wrong)), 0.0, ", ".join(wrong))


BENCHMARK = Benchmark(
    name="by_feature",
    summary="slots sorted by feature, with the offsets of the features",
    ops=("by_feature",),
    modes=("fwd",),
    shapes={"fwd": ("S1",)},
    inputs=_Inputs,
    providers=(
        Provider("ours", _runner(by_feature_op), ours=True),
        Provider("ours:triton", _named("triton"), devices=(CUDA,)),
        Provider("ours:cuda", _named("cuda"), devices=(CUDA,)),
        Provider("eager", _runner(_eager)),
    ),
    check=_check,
    # a comparison a slot
    flops=lambda s, mode: float(s.n * s.k),
    bytes=lambda s, mode, size: 16.0 * s.n * s.k + 8.0 * s.f,
    targets=(Target("G2", "fwd", "eager", 2.0),),
    gpu_shapes={"fwd": ("G1", "G2", "G3")},
    # indices are what they are
    gpu_dtypes=("fp32",),
)
