# SPDX-License-Identifier: Apache-2.0
"""BatchTopK encode on a GPU: the best pairs so far against the scores of the next tokens.

Tokens are taken in chunks, so that a chunk's scores, in token order, follow the pairs kept so far,
which are in the order of their flat position: ties go to the first by standing there. torch's
product and its radix selection do the work; what is kept is decided on the device, and no size
depends on the data. Scratch: some 40 bytes for each of PAIRS scores and of the pairs kept.
"""

from __future__ import annotations

import torch

from .chunk_scores import scores, tokens_at_once


def _keys(scores: torch.Tensor) -> torch.Tensor:
    """int32 in the order of float32 scores: NaN first, -0 as +0."""
    bits = (scores + 0.0).view(torch.int32)
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return keys.masked_fill(scores.isnan(), 0x7FFFFFFF)


def _best(keys: torch.Tensor, total: int) -> torch.Tensor:
    """Positions of the `total` largest keys, ascending; of equal keys the first ones."""
    last = keys.topk(total, sorted=False).values.amin()
    above, level = keys > last, keys == last
    kept = above | (level & (level.cumsum(0) <= total - above.sum()))
    # those that are not kept meet in a place of their own, which is cut off
    places = torch.where(kept, kept.cumsum(0) - 1, total)
    at = torch.arange(len(keys), device=keys.device)
    return at.new_empty(total + 1).scatter_(0, places, at)[:total]


def batch_topk_encode(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    b_dec: torch.Tensor | None,
    scale: torch.Tensor | None,
    total: int,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mikernels::batch_topk_encode` for x [N, d] and w_enc [F, d]."""
    n, f = x.shape[0], w_enc.shape[0]
    numbers = dict(dtype=torch.float32, device=x.device)
    values, ranked = torch.empty(0, **numbers), torch.empty(0, **numbers)
    flat = torch.empty(0, dtype=torch.int64, device=x.device)
    tokens = tokens_at_once(f)
    for first in range(0, n, tokens) if total else ():
        h = scores(x[first : first + tokens], w_enc, b_enc, b_dec)
        ranks = h if scale is None else h * scale.float()
        places = torch.arange(first * f, first * f + h.numel(), device=x.device)
        values, ranked, flat = (
            torch.cat([kept, new.reshape(-1)])
            for kept, new in ((values, h), (ranked, ranks), (flat, places))
        )
        if len(flat) > total:
            chosen = _best(_keys(ranked), total)
            values, ranked, flat = values[chosen], ranked[chosen], flat[chosen]
    threshold = torch.full((), torch.inf, **numbers)
    if total:
        # NaN ranks first, so only among NaN is the last one NaN
        worst = ranked.masked_fill(ranked.isnan(), torch.inf).amin()
        threshold = torch.where(ranked.isnan().all(), torch.nan, worst)
    bounds = torch.arange(n + 1, device=x.device) * f
    row_offsets = torch.searchsorted(flat, bounds)
    if relu:
        values, threshold = values.relu(), threshold.relu()
    return values.to(x.dtype), flat % max(f, 1), row_offsets, threshold
