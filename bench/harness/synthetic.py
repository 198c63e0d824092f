# SPDX-License-Identifier: Apache-2.0
"""One SAE, one batch: the inputs of `gradients` and `step`, and their fp64 answers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mikernels.ops.sae.gradients import by_feature_reference, sae_gradients_reference

from .spec import Outputs, Shape, generator

# a gap below which two fp32 evaluations of a score may disagree about the k-th feature
CLEAR_GAP = 2e-5


class Weights(NamedTuple):
    """w_enc, w_dec: `[F, d]`; b_enc: `[F]`; b_dec: `[d]`. What trains copies them."""

    w_enc: torch.Tensor
    b_enc: torch.Tensor
    w_dec: torch.Tensor
    b_dec: torch.Tensor


WEIGHTS = Weights._fields


class SAEBatch:
    """Normal activations x `[N, d]`, a decoder of unit rows with its transpose as encoder.

    Only tokens whose k-th and (k + 1)-th scores differ by more than rounding are taken (99.8 % of
    them), so that every library selects the same features and their losses can be compared.

    Attributes:
        x: `[N, d]`. w_enc, w_dec: `[F, d]`. b_enc: `[F]`. b_dec: `[d]`.
        values, indices: `[N, k]`, the codes of eager torch. dy: `[N, d]`, an upstream gradient.
    """

    def __init__(self, shape: Shape, mode: str, seed: int):
        draw = generator(seed)
        self.shape, self.k = shape, shape.k
        self.w_dec = torch.nn.functional.normalize(
            torch.randn(shape.f, shape.d, generator=draw), dim=-1
        )
        self.w_enc = self.w_dec.clone()
        self.b_enc = 0.01 * torch.randn(shape.f, generator=draw)
        self.b_dec = 0.1 * torch.randn(shape.d, generator=draw)
        self.x, self.values, self.indices = self._clear_tokens(draw)
        self.dy = torch.randn(shape.n, shape.d, generator=draw) / shape.n
        self.exact: Outputs | None = None

    def weights(self) -> Weights:
        return Weights(self.w_enc, self.b_enc, self.w_dec, self.b_dec)

    def _clear_tokens(self, draw: torch.Generator) -> tuple[torch.Tensor, ...]:
        n, rows = self.shape.n, 512
        kept: list[tuple[torch.Tensor, ...]] = []
        while sum(len(x) for x, _, _ in kept) < n:
            x = torch.randn(min(rows, n), self.shape.d, generator=draw)
            scores = torch.addmm(self.b_enc, x - self.b_dec, self.w_enc.T).relu()
            best = scores.topk(self.k + 1, dim=-1)
            clear = best.values[:, -2] - best.values[:, -1] > CLEAR_GAP * best.values[:, 0]
            clear &= best.values[:, -2] > 0
            order = best.indices[clear, :-1].sort(-1)
            kept.append((x[clear], best.values[clear].gather(-1, order.indices), order.values))
        return tuple(torch.cat(parts)[:n] for parts in zip(*kept, strict=True))


def exact_gradients(batch: SAEBatch, dy: torch.Tensor, values: torch.Tensor) -> Outputs:
    """fp64 gradients of the weights, from codes with these fp64 values and upstream dy."""
    w_enc, b_enc, w_dec, b_dec = (w.double() for w in batch.weights())
    dw_dec, dw_enc, db_enc = (torch.empty_like(w) for w in (w_dec, w_enc, b_enc))
    slots = by_feature_reference(batch.indices.reshape(-1), batch.shape.f)
    centred = batch.x.double() - b_dec
    rows = dy, centred, w_dec, None, None
    sae_gradients_reference(
        values, batch.indices, *slots, None, *rows, dw_dec, dw_enc, db_enc, False
    )
    db_dec = dy.sum(0) - db_enc @ w_enc
    return {"w_enc": dw_enc, "b_enc": db_enc, "w_dec": dw_dec, "b_dec": db_dec}


def exact_codes(batch: SAEBatch) -> torch.Tensor:
    """fp64 values `[N, k]` of the selected features."""
    w_enc, b_enc, _, b_dec = (w.double() for w in batch.weights())
    centred = batch.x.double() - b_dec
    columns = batch.indices.unbind(-1)
    return torch.stack([(centred * w_enc[c]).sum(-1) + b_enc[c] for c in columns], -1).relu()
