# SPDX-License-Identifier: Apache-2.0
"""Sparse decode: `y[n] = sum_j values[n, j] w_dec[indices[n, j]] + b_dec`."""

from __future__ import annotations

import warnings
from functools import partial

import torch

import mikernels
from mikernels.ops.sae.decode import decode_op, reference

from ..harness import peers
from ..harness.correctness import values_gate
from ..harness.spec import (
    CUDA,
    Benchmark,
    Outputs,
    Provider,
    Runner,
    Shape,
    Target,
    Unavailable,
    Verdict,
    compiled,
    generator,
    need,
)
from ..harness.synthetic import Weights

GRADIENTS = ("values", "w_dec", "b_dec")


class _Inputs:
    def __init__(self, shape: Shape, mode: str, seed: int):
        draw = generator(seed)
        self.f, self.k = shape.f, shape.k
        self.values = torch.randn(shape.n, shape.k, generator=draw).abs()
        # one feature from each of k equal bands: distinct, ascending, uniform
        band = shape.f // shape.k
        self.indices = torch.randint(band, (shape.n, shape.k), generator=draw)
        self.indices += band * torch.arange(shape.k)
        self.w_dec = torch.nn.functional.normalize(
            torch.randn(shape.f, shape.d, generator=draw), dim=-1
        )
        self.b_dec = torch.randn(shape.d, generator=draw)
        self.dy = torch.randn(shape.n, shape.d, generator=draw)
        self.exact: Outputs | None = None


def _ours(values, indices, w_dec, b_dec, impl=None):
    codes = mikernels.SparseCodes(values, indices, w_dec.shape[0])
    return mikernels.sparse_decode(codes, w_dec, b_dec, impl=impl)


def _triton(inputs: _Inputs, mode: str) -> Runner:
    need(decode_op, "triton")
    return _runner(partial(_ours, impl="triton"))(inputs, mode)


def _embedding_bag(values, indices, w_dec, b_dec):
    bags = torch.nn.functional.embedding_bag(indices, w_dec, mode="sum", per_sample_weights=values)
    return bags + b_dec


def _dense(values, indices, w_dec, b_dec):
    codes = values.new_zeros(values.shape[0], w_dec.shape[0]).scatter(1, indices, values)
    return codes @ w_dec + b_dec


def _csr(values, indices, w_dec, b_dec):
    n, k = values.shape
    codes = torch.sparse_csr_tensor(
        torch.arange(0, n * k + 1, k, device=values.device),
        indices.reshape(-1),
        values.reshape(-1),
        size=(n, w_dec.shape[0]),
        check_invariants=False,
    )
    return codes @ w_dec + b_dec


def _runner(decode):
    def build(inputs: _Inputs, mode: str) -> Runner:
        if mode == "fwd":
            operands = inputs.values, inputs.indices, inputs.w_dec, inputs.b_dec
            return Runner(lambda: {"y": decode(*operands)})
        leaves = [getattr(inputs, name).detach().requires_grad_() for name in GRADIENTS]
        values, w_dec, b_dec = leaves
        held: list[torch.Tensor] = []

        def forward() -> None:
            held[:] = [decode(values, inputs.indices, w_dec, b_dec)]

        def backward() -> Outputs:
            gradients = torch.autograd.grad(held.pop(), leaves, inputs.dy)
            return dict(zip(GRADIENTS, gradients, strict=True))

        return Runner(backward, forward)

    return build


def _csr_build(inputs: _Inputs, mode: str) -> Runner:
    if mode != "fwd":
        raise Unavailable("torch gives a CSR product no gradient by its values")
    with warnings.catch_warnings():
        # torch says once that CSR is in beta
        warnings.simplefilter("ignore")
        _csr(
            *(torch.zeros(1, 1, dtype=t) for t in (torch.float32, torch.int64)),
            *torch.zeros(2, 1, 1),
        )
    return _runner(_csr)(inputs, mode)


def _sparsify(inputs: _Inputs, mode: str) -> Runner:
    if mode != "fwd":
        raise Unavailable("its backward is measured in `gradients` and `step`")
    weights = Weights(inputs.w_dec, torch.zeros(inputs.f), inputs.w_dec, inputs.b_dec)
    sae = peers.sparsify_sae(weights, inputs.k)

    @torch.no_grad()
    def run() -> Outputs:
        return {"y": sae.decode(inputs.values, inputs.indices)}

    return Runner(run)


def _openai(inputs: _Inputs, mode: str) -> Runner:
    if mode != "fwd":
        raise Unavailable("only its forward product is compared")
    matmul = peers.openai_decode()
    operands = inputs.indices, inputs.values, inputs.w_dec

    def run() -> Outputs:
        return {"y": matmul(*operands) + inputs.b_dec}

    return Runner(run)


def _check(inputs: _Inputs, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    if inputs.exact is None:
        inputs.exact = _exact(inputs, mode)
    return values_gate(outputs, eager, inputs.exact)


def _exact(inputs: _Inputs, mode: str) -> Outputs:
    values, w_dec, b_dec = inputs.values.double(), inputs.w_dec, inputs.b_dec
    # rows become fp64 as they are gathered, the matrix never does
    if mode == "fwd":
        return {"y": reference(values, inputs.indices, None, w_dec, b_dec)}
    dy = inputs.dy.double()
    dw_dec = torch.zeros_like(w_dec, dtype=torch.float64)
    dvalues = torch.empty_like(values)
    for j in range(inputs.k):
        column = inputs.indices[:, j]
        dw_dec.index_add_(0, column, dy * values[:, j : j + 1])
        dvalues[:, j] = (dy * w_dec[column].double()).sum(-1)
    return {"values": dvalues, "w_dec": dw_dec, "b_dec": dy.sum(0)}


BENCHMARK = Benchmark(
    name="decode",
    summary="reconstructions from k features a token; eager is embedding_bag",
    ops=("decode", "gather_dot", "feature_sum"),
    modes=("fwd", "bwd"),
    shapes={"fwd": ("S1",)},
    inputs=_Inputs,
    providers=(
        Provider("ours", _runner(_ours), ours=True),
        Provider("ours:triton", _triton, devices=(CUDA,)),
        Provider("eager", _runner(_embedding_bag)),
        Provider("compile", lambda inputs, mode: _runner(compiled(_embedding_bag))(inputs, mode)),
        Provider("dense", _runner(_dense)),
        Provider("csr", _csr_build),
        Provider("sparsify", _sparsify),
        Provider("openai", _openai, devices=(CUDA,)),
    ),
    check=_check,
    flops=lambda s, mode: 2 * s.n * s.k * s.d * (1 if mode == "fwd" else 2),
    # the rows that are gathered, and the output; the backward also writes every row of dw_dec
    bytes=lambda s, mode, size: (
        size * (s.n * s.k * s.d + s.n * s.d + (s.f * s.d if mode == "bwd" else 0))
    ),
    targets=(
        Target("S1", "fwd", "eager", 1.2),
        Target("S1", "fwd", "dense", 10.0),
        *(Target(name, "fwd", "dense", 1.0, floor=1 / 0.85) for name in ("G1", "G2", "G3")),
    ),
    gpu_shapes={"fwd": ("G1", "G2", "G3", "G4")},
)
