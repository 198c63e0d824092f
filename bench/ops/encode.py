# SPDX-License-Identifier: Apache-2.0
"""Top-k encode: `relu((x - b_dec) w_enc^T + b_enc)`, the k best a token."""

from __future__ import annotations

from functools import partial

import torch

import mikernels
from mikernels.ops.sae.encode import encode_op

from ..harness import peers
from ..harness.correctness import Truth, selection_gate, truths, values_gate
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

GRADIENTS = ("x", "w_enc", "b_enc", "b_dec")


class Inputs:
    """Normal activations, unit-norm directions, small biases; fp32."""

    def __init__(self, shape: Shape, mode: str, seed: int):
        draw = generator(seed)
        self.shape, self.k = shape, shape.k
        self.x = torch.randn(shape.n, shape.d, generator=draw)
        self.w_enc = torch.nn.functional.normalize(
            torch.randn(shape.f, shape.d, generator=draw), dim=-1
        )
        self.b_enc = 0.01 * torch.randn(shape.f, generator=draw)
        self.b_dec = 0.1 * torch.randn(shape.d, generator=draw)
        self.dvalues = torch.randn(shape.n, shape.k, generator=draw)
        self.truth: list[Truth] | None = None
        self.exact: Outputs | None = None

    def weights(self) -> Weights:
        """For libraries that need a decoder as well."""
        return Weights(self.w_enc, self.b_enc, self.w_enc, self.b_dec)

    def leaves(self) -> list[torch.Tensor]:
        return [getattr(self, name).detach().requires_grad_() for name in GRADIENTS]


# tokens of a piece where eager's own N x F matrices do not fit
PIECE = 256
# rows of w_enc that are fp64 at a time
ROWS = 1 << 17


def _ours(x, w_enc, b_enc, b_dec, k, impl=None):
    codes = mikernels.topk_encode(x, w_enc, b_enc, k=k, b_dec=b_dec, impl=impl)
    return codes.values, codes.indices


def _eager(x, w_enc, b_enc, b_dec, k):
    scores = torch.relu(torch.addmm(b_enc, x - b_dec, w_enc.T))
    values, indices = torch.topk(scores, k, dim=-1, sorted=False)
    return values, indices


def _mm_row_topk(x, w_enc, b_enc, b_dec, k):
    """Eager's product with our selection: what a fused encode has to beat."""
    values, indices = mikernels.row_topk(torch.addmm(b_enc, x - b_dec, w_enc.T), k)
    return values.relu(), indices


def _triton(inputs: Inputs, mode: str) -> Runner:
    need(encode_op, "triton")
    return _runner(partial(_ours, impl="triton"))(inputs, mode)


def _in_pieces(inputs: Inputs, mode: str) -> Outputs:
    weights = inputs.w_enc, inputs.b_enc, inputs.b_dec, inputs.k
    pieces = [_eager(x, *weights) for x in inputs.x.split(PIECE)]
    return _named(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def _runner(encode):
    def build(inputs: Inputs, mode: str) -> Runner:
        if mode == "fwd":
            operands = inputs.x, inputs.w_enc, inputs.b_enc, inputs.b_dec, inputs.k
            return Runner(lambda: _named(*encode(*operands)))
        leaves = inputs.leaves()
        held: list[torch.Tensor] = []

        def forward() -> None:
            values, indices = encode(*leaves, inputs.k)
            # slots come in any order; the upstream gradient belongs to the slot's rank by index
            rank = indices.argsort(-1).argsort(-1)
            held[:] = values, inputs.dvalues.gather(-1, rank)

        def backward() -> Outputs:
            values, upstream = held
            held.clear()
            gradients = torch.autograd.grad(values, leaves, upstream)
            return dict(zip(GRADIENTS, gradients, strict=True))

        return Runner(backward, forward)

    return build


def _named(values: torch.Tensor, indices: torch.Tensor) -> Outputs:
    return {"values": values, "indices": indices}


def _no_grad(build):
    """Peers' encoders keep graphs for their parameters; the forward alone is compared."""

    def wrapped(inputs: Inputs, mode: str) -> Runner:
        if mode != "fwd":
            raise Unavailable("its backward is measured in `gradients` and `step`")
        encode = build(inputs)

        @torch.no_grad()
        def run() -> Outputs:
            return _named(*encode(inputs.x))

        return Runner(run)

    return wrapped


def _sparsify(inputs: Inputs):
    sae = peers.sparsify_sae(inputs.weights(), inputs.k)
    return lambda x: sae.encode(x)[:2]


def _dictionary_learning(inputs: Inputs):
    sae = peers.dictionary_learning_trainer(inputs.weights(), inputs.k, lr=1e-3).ae
    return lambda x: sae.encode(x, return_topk=True)[1:3]


def _check(inputs: Inputs, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    if mode == "bwd":
        if inputs.exact is None:
            inputs.exact = _exact_gradients(inputs)
        return values_gate(outputs, eager, inputs.exact)
    if inputs.truth is None:

        def scores(rows: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = inputs.x[rows]
            centred = x.double() - inputs.b_dec.double()
            products = [centred @ w.double().T for w in inputs.w_enc.split(ROWS)]
            exact = torch.cat(products, 1).add_(inputs.b_enc)
            return exact, torch.addmm(inputs.b_enc, x - inputs.b_dec, inputs.w_enc.T)

        inputs.truth = truths(scores, inputs.shape.n, inputs.shape.f, inputs.k)
    return selection_gate(inputs.truth, outputs, eager, relu=True)


def _exact_gradients(inputs: Inputs) -> Outputs:
    with torch.no_grad():
        _, indices = _eager(inputs.x, inputs.w_enc, inputs.b_enc, inputs.b_dec, inputs.k)
    indices = indices.sort(-1).values
    x, w_enc, b_enc, b_dec = (leaf.detach().double().requires_grad_() for leaf in inputs.leaves())
    centred = x - b_dec
    columns = [
        (centred * w_enc[indices[:, j]]).sum(-1) + b_enc[indices[:, j]] for j in range(inputs.k)
    ]
    values = torch.stack(columns, -1).relu()
    leaves = x, w_enc, b_enc, b_dec
    gradients = torch.autograd.grad(values, leaves, inputs.dvalues.double())
    return dict(zip(GRADIENTS, gradients, strict=True))


BENCHMARK = Benchmark(
    name="encode",
    summary="the k best features of every token, exactly",
    ops=("encode",),
    modes=("fwd", "bwd"),
    shapes={"fwd": ("S1", "S2")},
    inputs=Inputs,
    providers=(
        Provider("ours", _runner(_ours), ours=True, screens=True),
        Provider("ours:triton", _triton, screens=True, devices=(CUDA,)),
        Provider("mm_row_topk", _runner(_mm_row_topk), devices=(CUDA,)),
        Provider("eager", _runner(_eager)),
        Provider("compile", lambda inputs, mode: _runner(compiled(_eager))(inputs, mode)),
        Provider("sparsify", _no_grad(_sparsify)),
        Provider("dictionary_learning", _no_grad(_dictionary_learning)),
    ),
    check=_check,
    flops=lambda s, mode: 2 * s.n * s.d * s.f if mode == "fwd" else 4 * s.n * s.k * s.d,
    bytes=lambda s, mode, size: size * (s.n * s.d + s.f * s.d + s.f) * (1 if mode == "fwd" else 2),
    targets=(
        Target("S1", "fwd", "eager", 8.0, extra_mb=64.0),
        Target("S2", "fwd", "eager", 6.0),
        Target("G1", "fwd", "eager", 3.5),
        Target("G2", "fwd", "eager", 2.0),
        Target("G3", "fwd", "eager", 1.6),
    ),
    gpu_shapes={"fwd": ("G1", "G2", "G3", "G4")},
    fp32_modes=("bwd",),
    yardstick=_in_pieces,
)
