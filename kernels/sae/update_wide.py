# SPDX-License-Identifier: Apache-2.0
"""sae_update_ for rows wider than registers: gradients through memory, some features at a time."""

from __future__ import annotations

import torch

from .adam import adam_rows_
from .gradients_hot import Slots
from .gradients_sum import sum_by_feature

PIECE = 4096  # features: two buffers of 0.13 GB at d = 8192


def update_by_pieces(
    values: torch.Tensor,
    slots: Slots,
    dy: torch.Tensor,
    x: torch.Tensor,
    w_dec: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    db_enc: torch.Tensor,
    settings: tuple[torch.Tensor, float, float, float, torch.Tensor, torch.Tensor],
    project: bool,
    unit_norm: bool,
) -> torch.Tensor:
    """Everything that sae_update_ writes but the shadows; returns d_input.

    `weights` are w_enc and the moments m_dec, v_dec, m_enc, v_enc.
    """
    w_enc, m_dec, v_dec, m_enc, v_enc = weights
    n_features, d = w_dec.shape
    d_input = w_dec.new_zeros(d, dtype=torch.float64)
    buffers = w_dec.new_empty(2, min(PIECE, n_features), d, dtype=torch.float32)
    for begin in range(0, n_features, PIECE):
        rows = slice(begin, min(begin + PIECE, n_features))
        piece = slots._replace(offsets=slots.offsets[rows.start : rows.stop + 1])
        grad, scaled = buffers[:, : rows.stop - rows.start]
        dvalues = sum_by_feature(values, dy, None, piece, grad, None, False, w_dec[rows])
        assert dvalues is not None
        adam_rows_(w_dec[rows], grad, m_dec[rows], v_dec[rows], *settings, project, unit_norm)
        sum_by_feature(dvalues, x, None, piece, grad, db_enc[rows], False)
        torch.mul(w_enc[rows], db_enc[rows, None], out=scaled)
        d_input += scaled.sum(0, dtype=torch.float64)
        adam_rows_(w_enc[rows], grad, m_enc[rows], v_enc[rows], *settings, False, False)
    return d_input.float()
