# SPDX-License-Identifier: Apache-2.0
"""Encode for 16-bit inputs: scores are fp32 sums rounded to the inputs' dtype, as eager's are.

A panel of the product, the best of it, the next panel: eager's result without its N x F matrix, and
without torch.topk, which takes longer than the product up to d = 2304. The bits of a score can
depend on the shape of the product it comes from, so that shape depends on N, F and k alone, and
not on how much memory is free.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..common.full_sums import full_sums
from ..common.products import part
from ..select.row_topk import select_into
from .encode_winners import (
    MOST_WINNERS,
    Winners,
    panel_width,
    shape_of,
    within_memory,
)

# scores of one product, and the bytes that a chunk of tokens keeps
PANEL, KEPT = 1 << 26, 64 << 20
MOST_FEATURES, MOST_ROWS = 32768, 4096


def plan(n: int, f: int, k: int) -> tuple[int, int, int]:
    """(tokens at once, rows and features of a product)."""
    features = f if k > MOST_WINNERS else panel_width(k, min(f, MOST_FEATURES))
    rows = min(n, MOST_ROWS, max(16, PANEL // features))
    if k > MOST_WINNERS:
        return rows, rows, features
    tokens = max(rows, KEPT // Winners.token_bytes(k) // rows * rows)
    return min(n, tokens), rows, features


def encode_plain(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    b_dec: torch.Tensor | None,
    k: int,
    relu: bool,
    out: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fills values and indices [N, k] for x [N, d] and w_enc [F, d] of one 16-bit dtype."""
    n, f = x.shape[0], w_enc.shape[0]
    tokens, rows, features = plan(n, f, k)
    listed = k <= MOST_WINNERS

    def buffers(_: int):
        scores = torch.empty(rows * features, dtype=x.dtype, device=x.device)
        if not listed:
            return scores, None, None
        groups = shape_of(features, k).groups
        maxima = torch.empty(rows, groups, dtype=torch.int32, device=x.device)
        return scores, maxima, Winners(tokens, k, x.dtype, x.device)

    scratch, maxima, winners = within_memory(x.device, buffers, 256 << 20)
    with full_sums():
        for begin in range(0, n, tokens):
            chunk = reachable(x[begin : begin + tokens])
            centred = chunk if b_dec is None else chunk - b_dec
            values, indices = (t[begin : begin + tokens] for t in out)
            if not listed:
                ((_, scores),) = _panel(centred, reachable(w_enc), b_enc, rows, scratch)
                select_into(scores, k, values, indices)
                continue
            winners.begin()
            first = 0
            while first < f:
                width = panel_width(k, min(features, f - first))
                weights = reachable(w_enc[first : first + width])
                bias = part(b_enc, first, first + width)
                for row, scores in _panel(centred, weights, bias, rows, scratch):
                    winners.add(scores, row, first, maxima)
                first += width
            values.copy_(winners.scores[: len(chunk), :k])
            indices.copy_(winners.features[: len(chunk), :k])
    if relu:
        out[0].relu_()
    return out


def reachable(t: torch.Tensor) -> torch.Tensor:
    """`t`, or a copy where rows are 2^31 elements apart, which cuBLAS refuses."""
    return t if max(t.stride(), default=0) < 2**31 else t.contiguous()


def _panel(x, weights, bias, rows: int, scratch) -> Iterator[tuple[int, torch.Tensor]]:
    for row in range(0, len(x), rows):
        here = x[row : row + rows]
        scores = scratch[: len(here) * len(weights)].view(len(here), len(weights))
        if bias is None:
            torch.mm(here, weights.T, out=scores)
        else:
            torch.addmm(bias, here, weights.T, out=scores)
        yield row, scores
