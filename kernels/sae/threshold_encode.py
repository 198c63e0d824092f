# SPDX-License-Identifier: Apache-2.0
"""Threshold encode on a GPU: the scores of some tokens at a time, those above the floor kept.

torch's product, comparison and nonzero do the work; nonzero waits for the device once a chunk,
since the number of slots is a shape. Scratch: some 10 bytes for each of a chunk's PAIRS scores.
"""

from __future__ import annotations

import torch

from .chunk_scores import scores, tokens_at_once


def threshold_encode(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    b_dec: torch.Tensor | None,
    floor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mikernels::threshold_encode` for x [N, d] and w_enc [F, d]."""
    n, tokens = x.shape[0], tokens_at_once(w_enc.shape[0])
    places = dict(dtype=torch.int64, device=x.device)
    row_offsets = torch.zeros(n + 1, **places)
    values, indices = [floor.new_empty(0)], [torch.empty(0, **places)]
    for first in range(0, n, tokens):
        h = scores(x[first : first + tokens], w_enc, b_enc, b_dec)
        kept = ~(h <= floor)
        row_offsets[first + 1 : first + 1 + tokens] = kept.sum(-1)
        token, feature = kept.nonzero(as_tuple=True)
        values.append(h[token, feature])
        indices.append(feature)
    return torch.cat(values), torch.cat(indices), row_offsets.cumsum_(0)
