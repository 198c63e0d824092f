# SPDX-License-Identifier: Apache-2.0
"""Pre-activations of some tokens at a time, by torch's product, for operators of ragged codes."""

from __future__ import annotations

import torch

# scores of a chunk, and numbers of w_enc that are widened to float32 at a time
PAIRS = 1 << 22


def tokens_at_once(n_features: int) -> int:
    """Tokens of a chunk."""
    return max(1, PAIRS // max(1, n_features))


def scores(
    x: torch.Tensor, w_enc: torch.Tensor, b_enc: torch.Tensor | None, b_dec: torch.Tensor | None
) -> torch.Tensor:
    """`(x - b_dec) w_enc^T + b_enc`, `[n, F]` float32."""
    centred = x.float() if b_dec is None else x.float() - b_dec.float()
    h = torch.empty(x.shape[0], w_enc.shape[0], dtype=torch.float32, device=x.device)
    features = max(1, PAIRS // max(1, w_enc.shape[1]))
    for first in range(0, w_enc.shape[0], features):
        here = slice(first, first + features)
        h[:, here] = centred @ w_enc[here].float().T
    return h if b_enc is None else h.add_(b_enc.float())
