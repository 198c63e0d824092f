# SPDX-License-Identifier: Apache-2.0
"""All weight gradients of an SAE from its codes and dy: w_dec, w_enc, b_enc, b_dec.

Every side starts after the forward pass: autograd sides keep their graph between rounds, and ours
sorts the slots by feature inside the timed call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import mikernels
from mikernels.ops.sae.gradients import sae_gradients_op, weighted_row_sum

from ..harness import peers
from ..harness.correctness import values_gate
from ..harness.spec import Benchmark, Outputs, Provider, Runner, Shape, Target, Unavailable, Verdict
from ..harness.synthetic import WEIGHTS, SAEBatch, exact_gradients

ACC = torch.float32


def _ours(batch: SAEBatch, mode: str) -> Runner:
    w_enc, b_enc, w_dec, b_dec = batch.weights()
    # a training run owns its gradient buffers: fresh pages cost more than the arithmetic
    dw_enc, db_enc, dw_dec = (torch.zeros_like(w, dtype=ACC) for w in (w_enc, b_enc, w_dec))
    # as the fused step has them: everything but the weights is fp32
    values, dy, x, bias = (t.to(ACC) for t in (batch.values, batch.dy, batch.x, b_dec))

    def run() -> Outputs:
        slots = mikernels.by_feature(batch.indices.reshape(-1), batch.shape.f)
        centred = x - bias
        sae_gradients_op(
            values,
            batch.indices,
            *slots,
            None,
            dy,
            centred,
            w_dec,
            None,
            None,
            dw_dec,
            dw_enc,
            db_enc,
            False,
        )
        db_dec = dy.sum(0) - weighted_row_sum(db_enc, w_enc)
        return dict(zip(WEIGHTS, (dw_enc, db_enc, dw_dec, db_dec), strict=True))

    return Runner(run)


def _through_autograd(
    forward: Callable[..., torch.Tensor],
) -> Callable[[SAEBatch, str], Runner]:
    def build(batch: SAEBatch, mode: str) -> Runner:
        _selects_alike(batch)
        leaves = [w.detach().requires_grad_() for w in batch.weights()]
        return _backward(forward(batch, *leaves), leaves, batch.dy)

    return build


def _selects_alike(batch: SAEBatch) -> None:
    if batch.x.dtype != ACC:
        raise Unavailable("it selects features itself, and 16-bit scores tie; compared in fp32")


def _backward(y: torch.Tensor, leaves: Sequence[torch.Tensor], dy: torch.Tensor) -> Runner:
    def run() -> Outputs:
        gradients = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        return dict(zip(WEIGHTS, gradients, strict=True))

    return Runner(run)


def _our_forward(batch: SAEBatch, w_enc, b_enc, w_dec, b_dec) -> torch.Tensor:
    codes = mikernels.topk_encode(batch.x, w_enc, b_enc, k=batch.k, b_dec=b_dec)
    return mikernels.sparse_decode(codes, w_dec, b_dec)


def _dense_forward(batch: SAEBatch, w_enc, b_enc, w_dec, b_dec) -> torch.Tensor:
    scores = torch.addmm(b_enc, batch.x - b_dec, w_enc.T).relu()
    values, indices = scores.topk(batch.k, dim=-1, sorted=False)
    codes = torch.zeros_like(scores).scatter(-1, indices, values)
    return codes @ w_dec + b_dec


def _eager(batch: SAEBatch, mode: str) -> Runner:
    """embedding_bag's backward for the decoder, index_add_ of outer products for the encoder."""
    w_enc, b_enc, w_dec, b_dec = batch.weights()
    leaf, values = w_dec.detach().requires_grad_(), batch.values.detach().requires_grad_()
    y = torch.nn.functional.embedding_bag(
        batch.indices, leaf, mode="sum", per_sample_weights=values
    )
    flat = batch.indices.reshape(-1)

    def run() -> Outputs:
        dw_dec, dvalues = torch.autograd.grad(y, (leaf, values), batch.dy, retain_graph=True)
        dvalues = dvalues * (batch.values > 0)
        outer = dvalues.unsqueeze(2) * (batch.x - b_dec).unsqueeze(1)
        dw_enc = torch.zeros_like(w_enc).index_add_(0, flat, outer.flatten(0, 1))
        db_enc = torch.zeros_like(b_enc).index_add_(0, flat, dvalues.reshape(-1))
        db_dec = batch.dy.sum(0) - db_enc @ w_enc
        return dict(zip(WEIGHTS, (dw_enc, db_enc, dw_dec, db_dec), strict=True))

    return Runner(run)


def _sparsify(batch: SAEBatch, mode: str) -> Runner:
    _selects_alike(batch)
    sae = peers.sparsify_sae(batch.weights(), batch.k)
    codes = sae.encode(batch.x)
    y = sae.decode(codes.top_acts, codes.top_indices)
    return _backward(y, (sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec), batch.dy)


def _check(batch: SAEBatch, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    if batch.exact is None:
        batch.exact = exact_gradients(batch, batch.dy.double(), batch.values.double())
    return values_gate(outputs, eager, batch.exact)


def _bytes(s: Shape, mode: str, size: int) -> float:
    # w_dec is read and two fp32 gradients are written once; dy and x are read once a slot
    return (size + 8) * s.f * s.d + 8 * s.n * s.k * s.d


BENCHMARK = Benchmark(
    name="gradients",
    summary="every weight gradient of an SAE, from its codes",
    ops=("sae_gradients_", "weighted_row_sum"),
    modes=("bwd",),
    shapes={"bwd": ("S1",)},
    inputs=SAEBatch,
    providers=(
        Provider("ours", _ours, ours=True),
        Provider("ours_autograd", _through_autograd(_our_forward)),
        Provider("eager", _eager),
        Provider("dense", _through_autograd(_dense_forward)),
        Provider("sparsify", _sparsify),
    ),
    check=_check,
    flops=lambda s, mode: 6 * s.n * s.k * s.d,
    bytes=_bytes,
    targets=(
        Target("S1", "bwd", "sparsify", 4.0),
        *(Target(name, "bwd", "sparsify", 2.5) for name in ("G1", "G2")),
    ),
    gpu_shapes={"bwd": ("G1", "G2")},
    gpu_dtypes=("bf16", "fp32"),
)
