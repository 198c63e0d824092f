# SPDX-License-Identifier: Apache-2.0
"""Matryoshka's nested decodes, their squared errors, and the gradients at the output by level.

Every side has the codes of its own form: eager, as SAELens decodes them, a dense N x F matrix that
is made outside the timed call.
"""

from __future__ import annotations

import torch

import mikernels
from mikernels.ops.sae.decode_levels import decode_levels, decode_levels_op, reference

from ..harness.correctness import values_gate
from ..harness.spec import (
    CUDA,
    Benchmark,
    Outputs,
    Provider,
    Runner,
    Shape,
    Verdict,
    generator,
    need,
)

# SAELens' own example has prefixes that double
LEVELS = 5
OUTPUTS = "mixed", "error", "squares"


class _Inputs:
    def __init__(self, shape: Shape, mode: str, seed: int):
        draw = generator(seed)
        self.f = shape.f
        self.prefixes = [shape.f >> p for p in reversed(range(LEVELS))]
        values = torch.randn(shape.n, shape.k, generator=draw).abs()
        band = shape.f // shape.k
        indices = torch.randint(band, (shape.n, shape.k), generator=draw)
        indices += band * torch.arange(shape.k)
        self.values, self.indices = values, indices
        self.w_dec = torch.nn.functional.normalize(
            torch.randn(shape.f, shape.d, generator=draw), dim=-1
        )
        self.b_dec = torch.randn(shape.d, generator=draw)
        self.x = torch.randn(shape.n, shape.d, generator=draw)
        ends = torch.tensor(self.prefixes)
        self.levels = torch.bucketize(torch.arange(shape.f), ends, right=True)
        # the mean of the prefixes' losses: every prefix from level g on has a part in mixed[g]
        self.mix = torch.full((LEVELS, LEVELS), 2 / (LEVELS * shape.n)).triu()
        self.exact: Outputs | None = None

    def codes(self) -> mikernels.SparseCodes:
        return mikernels.SparseCodes(self.values, self.indices, self.f)


def _named(outputs: tuple[torch.Tensor, ...]) -> Outputs:
    return dict(zip(OUTPUTS, outputs, strict=True))


def _ours(inputs: _Inputs, mode: str) -> Runner:
    codes, x = inputs.codes(), inputs.x.float()
    operands = inputs.w_dec, inputs.b_dec, x, inputs.levels, inputs.mix
    return Runner(lambda: _named(decode_levels(codes, *operands)))


def _triton(inputs: _Inputs, mode: str) -> Runner:
    need(decode_levels_op, "triton")
    rows = inputs.values, inputs.indices, None, inputs.w_dec, inputs.b_dec
    more = inputs.x.float(), inputs.levels, inputs.mix.float()
    return Runner(lambda: _named(decode_levels_op(*rows, *more, impl="triton")))


def _mixed(errors: torch.Tensor, mix: torch.Tensor) -> Outputs:
    squares = errors.square().sum(-1)
    mixed = torch.tensordot(mix.to(errors.dtype), errors, 1)
    return _named((mixed, errors[-1], squares))


def _dense(inputs: _Inputs, mode: str) -> Runner:
    """A product of each ring's columns of the dense codes with its rows."""
    acts = inputs.codes().to_dense()

    def run() -> Outputs:
        y, low, errors = inputs.b_dec, 0, []
        for high in inputs.prefixes:
            y = y + acts[:, low:high] @ inputs.w_dec[low:high]
            errors.append(y.to(inputs.x.dtype) - inputs.x)
            low = high
        return _mixed(torch.stack(errors), inputs.mix)

    return Runner(run)


def _prefixes(inputs: _Inputs, mode: str) -> Runner:
    codes = inputs.codes()

    def run() -> Outputs:
        y = mikernels.sparse_decode(codes, inputs.w_dec, inputs.b_dec, prefixes=inputs.prefixes)
        return _mixed(y - inputs.x, inputs.mix)

    return Runner(run)


def _check(inputs: _Inputs, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    if inputs.exact is None:
        values, w, bias, x = (
            t.double() for t in (inputs.values, inputs.w_dec, inputs.b_dec, inputs.x)
        )
        rows = values, inputs.indices, None, w, bias, x
        inputs.exact = _named(reference(*rows, inputs.levels, inputs.mix))
    return values_gate(outputs, eager, inputs.exact)


BENCHMARK = Benchmark(
    name="decode_levels",
    summary="nested reconstructions with losses and gradients; eager multiplies dense codes",
    ops=("decode_levels",),
    modes=("fwd",),
    shapes={"fwd": ("S1",)},
    inputs=_Inputs,
    providers=(
        Provider("ours", _ours, ours=True),
        Provider("ours:triton", _triton, devices=(CUDA,)),
        Provider("eager", _dense),
        Provider("prefixes", _prefixes),
    ),
    check=_check,
    # the rows' sums, and half of the mix's products
    flops=lambda s, mode: 2 * s.n * s.d * (s.k + LEVELS * (LEVELS + 1) // 2),
    # the rows that are gathered, x, and the outputs, which are in fp32
    bytes=lambda s, mode, size: size * s.n * s.k * s.d + 4 * s.n * s.d * (LEVELS + 2),
)
