# SPDX-License-Identifier: Apache-2.0
"""Encode for 16-bit inputs: scores are fp32 sums rounded to the inputs' dtype, as eager's are.

A panel of the product, an exact selection from it, the next panel: eager's result without its
N x F matrix, and without torch.topk, which takes longer than the product up to d = 2304.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..common.products import part
from .encode_winners import (
    MOST_FEATURES,
    MOST_TOKENS,
    Winners,
    full_sums,
    reachable,
    within_memory,
)


def plan(n: int, f: int, k: int, scratch: int) -> tuple[int, int, int]:
    """(tokens at once, rows and features of a product)."""
    features = min(f, MOST_FEATURES)
    while features > 256 and 16 * 2 * features > 0.6 * scratch:
        features //= 2
    tokens = min(n, max(16, int(0.35 * scratch) // Winners.token_bytes(k)))
    tokens = -(-n // -(-n // tokens))
    rows = min(tokens, MOST_TOKENS, max(16, int(0.6 * scratch) // (2 * features)))
    return tokens, rows, features


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

    def buffers(scratch: int):
        tokens, rows, features = plan(n, f, k, scratch)
        scores = torch.empty(rows * features, dtype=x.dtype, device=x.device)
        return tokens, rows, features, scores, Winners(tokens, k, x.dtype, x.device)

    tokens, rows, features, scratch, winners = within_memory(x.device, buffers)
    for begin in range(0, n, tokens):
        chunk = reachable(x[begin : begin + tokens])
        centred = chunk if b_dec is None else chunk - b_dec
        winners.begin(len(chunk))
        for first in range(0, f, features):
            weights = reachable(w_enc[first : first + features])
            bias = part(b_enc, first, first + features)
            panel = _panel(centred, weights, bias, rows, scratch)
            winners.add(panel, first, len(weights))
        winners.close()
        values, indices = (t[begin : begin + tokens] for t in out)
        values.copy_(winners.scores[: len(chunk), :k])
        indices.copy_(winners.features[: len(chunk), :k])
    if relu:
        out[0].relu_()
    return out


def _panel(x, weights, bias, rows: int, scratch) -> Iterator[tuple[int, torch.Tensor]]:
    for row in range(0, len(x), rows):
        here = x[row : row + rows]
        scores = scratch[: len(here) * len(weights)].view(len(here), len(weights))
        with full_sums():
            if bias is None:
                torch.mm(here, weights.T, out=scores)
            else:
                torch.addmm(bias, here, weights.T, out=scores)
        yield row, scores
