# SPDX-License-Identifier: Apache-2.0
"""Matryoshka's nested decodes with their losses and gradients, each row of w read once.

Feature f is of level levels[f], one of L; prefix p holds the features of levels 0..p:

    e_p[n] = bias + sum of values[s] w[indices[s]] over the slots s of n of levels <= p, - x[n]
    squares[p, n] = |e_p[n]|^2      error[n] = e_{L-1}[n]      mixed[g, n] = sum_p mix[g, p] e_p[n]

`mixed` is the gradient at the output of the features of level g: they are in the prefixes p >= g,
so a loss sum_p c_p |e_p|^2 / 2 has mix[g, p] = c_p for p >= g and 0 otherwise; where inner levels
are detached from the losses of outer ones, the mix has fewer entries. sae_gradients_ takes it as it
is, with the same levels.

A slot whose value is 0 is inactive and adds nothing, whatever its row holds, and neither does e_p
where mix[g, p] is 0; otherwise NaN and inf propagate to their token's prefixes. fp32 sums (fp64 for
fp64), by level and then in stored order. O(N (k + L^2) d) time; memory is the output.

Codes are padded, `[N, k]`, or ragged, `[S]` with `row_offsets` (mikernels/_ragged.py).
Matryoshka SAEs: Bussmann et al. 2025, arXiv 2503.17547.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mikernels._autocast import in_own_dtype
from mikernels._dispatch import Op
from mikernels._indices import check_indices
from mikernels.ops.sae import decode

if TYPE_CHECKING:
    from mikernels.values.codes import SparseCodes


def reference(
    values: torch.Tensor,
    indices: torch.Tensor,
    row_offsets: torch.Tensor | None,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    levels: torch.Tensor,
    mix: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if mix.shape[0] == 0:
        raise ValueError("decode_levels: mix must be [L, L] of at least one level, got [0, 0]")
    check_indices("decode_levels", "levels", levels, mix.shape[0])
    x = x.contiguous()
    values, w, mix = (t.to(x.dtype) for t in (values, w, mix))
    level = levels.index_select(0, indices.reshape(-1)).view_as(indices)
    error = torch.zeros_like(x) if bias is None else bias.to(x.dtype).expand_as(x)
    errors = []
    for p in range(mix.shape[0]):
        ring = values.where(level == p, 0)
        error = error + decode.reference(ring, indices, row_offsets, w, None)
        errors.append(error - x)
    mixed = x.new_zeros(len(mix), *x.shape)
    for out, row in zip(mixed, mix, strict=True):
        for share, e in zip(row, errors, strict=True):
            out += torch.where(share != 0, share * e, 0)
    squares = torch.stack([e.square().sum(-1) for e in errors])
    return mixed, errors[-1], squares


def _fake(values, indices, row_offsets, w, bias, x, levels, mix):
    level_count = mix.shape[0]
    return (
        x.new_empty(level_count, *x.shape),
        x.new_empty(x.shape),
        x.new_empty(level_count, x.shape[0]),
    )


decode_levels_op = Op(
    "decode_levels(Tensor values, Tensor indices, Tensor? row_offsets, Tensor w, Tensor? bias,"
    " Tensor x, Tensor levels, Tensor mix) -> (Tensor mixed, Tensor error, Tensor squares)",
    reference,
    _fake,
    operands={
        **decode.CODES,
        "w": "T[F,d]",
        "bias": "T[d]",
        "x": "acc[N,d]",
        "levels": "i64[F]",
        "mix": "float[L,L]",
    },
    triton="sae.decode_levels:decode_levels",
)


@in_own_dtype
def decode_levels(
    codes: SparseCodes,
    w_dec: torch.Tensor,
    b_dec: torch.Tensor | None,
    x: torch.Tensor,
    levels: torch.Tensor,
    mix: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The errors of all nested reconstructions, their squares, and their mixtures by level.

    Args:
        codes: of N tokens, values `[N, k]` (or ragged) in the dtype of `w_dec`.
        w_dec: `[F, d]`. b_dec: `[d]` or None, part of every prefix.
        x: `[N, d]` float32 (float64 for float64 weights).
        levels: `[F]` int64 in 0..L-1, not necessarily ascending.
        mix: `[L, L]`: row g are the weights of the prefixes' errors in `mixed[g]`.

    Returns:
        mixed `[L, N, d]`, the error of all features `[N, d]` and squares `[L, N]`, in the dtype of
        `x`. None is differentiable.

    Raises:
        ValueError, RuntimeError: for operands other than the above.
    """
    values = codes.values.detach()
    return decode_levels_op(
        values,
        codes.indices,
        codes.row_offsets,
        w_dec.detach(),
        None if b_dec is None else b_dec.detach(),
        x,
        levels,
        mix.float(),
    )
