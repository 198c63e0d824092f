# SPDX-License-Identifier: Apache-2.0
"""GroupMax encode on a GPU: float32 products of a chunk of tokens and features, a max per group.

A chunk holds whole groups or, where one does not fit, a part of one; parts are merged in the order
of their features, so ties go to the first. Products run on torch's float32 path: what the user
allows it (TF32) rounds the scores. Scratch: some 16 bytes for each of SCORES scores, and those of
w_enc as float32 where it is not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..common.products import part

# tokens and scores of a chunk
TOKENS, SCORES = 4096, 1 << 23


def _chunks(f: int, group: int, most: int) -> Iterator[tuple[int, int]]:
    """(first, end) of features: whole groups, or parts of one where a group is more than `most`."""
    step = most // group * group
    if step:
        yield from ((first, min(f, first + step)) for first in range(0, f, step))
    else:
        for begin in range(0, f, group):
            for first in range(begin, begin + group, most):
                yield first, min(first + most, begin + group)


def _values(
    x: torch.Tensor, w_enc: torch.Tensor, b_enc: torch.Tensor | None, first: int, end: int
) -> torch.Tensor:
    h = x @ w_enc[first:end].float().T
    bias = part(b_enc, first, end)
    return h if bias is None else h.add_(bias.float())


@torch.no_grad()
def groupmax_encode(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    b_dec: torch.Tensor | None,
    scale: torch.Tensor | None,
    k: int,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mikernels::groupmax_encode` for x [N, d] and w_enc [F, d]."""
    n, f = x.shape[0], w_enc.shape[0]
    group = f // k
    if group * k != f:
        raise ValueError(f"groupmax_encode: k must divide {f} (rows of w_enc), got {k}")
    values = x.new_empty(n, k)
    indices = torch.empty(n, k, dtype=torch.int64, device=x.device)
    for row in range(0, n, TOKENS):
        here = slice(row, row + TOKENS)
        centred = x[here].float()
        if b_dec is not None:
            centred = centred - b_dec.float()
        kept, scores = torch.empty(2, len(centred), k, dtype=torch.float32, device=x.device)
        chosen = indices[here]
        for first, end in _chunks(f, group, max(1, SCORES // len(centred))):
            h = _values(centred, w_enc, b_enc, first, end)
            weights = part(scale, first, end)
            ranked = h if weights is None else h * weights.float()
            slots = slice(first // group, (end - 1) // group + 1)
            width = min(group, end - first)
            # of equal ones torch's max is the first, and NaN is above all
            best, within = ranked.view(len(h), -1, width).max(-1)
            at = within + torch.arange(0, end - first, width, device=x.device)
            found = best, h.gather(1, at), at + first
            if first % group:
                before = scores[:, slots], kept[:, slots], chosen[:, slots]
                better = ~(best <= before[0]) & ~before[0].isnan()
                found = tuple(
                    torch.where(better, new, old) for new, old in zip(found, before, strict=True)
                )
            scores[:, slots], kept[:, slots], chosen[:, slots] = found
        values[here] = kept.relu_() if relu else kept
    return values, indices
