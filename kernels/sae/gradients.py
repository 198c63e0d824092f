# SPDX-License-Identifier: Apache-2.0
"""by_feature and gather_dot: see mikernels/ops/sae/gradients.py.

`gather_dot`: a program is a token and a block of its slots, with a loop over columns; of ragged
codes, or with levels, a block of slots each with a row of its own. An index outside 0..F-1 gives
NaN, and nothing outside w is read.
"""

from __future__ import annotations

import torch
import triton.language as tl

from ..common import offline
from ..common.launch import ceil_div, kernel, power_of_two
from .gradients_hot import FORMS, levels_inside


def by_feature(indices: torch.Tensor, n_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A stable radix sort by torch (CUB), which takes one pass for 8 bits of the key."""
    if n_features < 2**15:
        key = torch.int16
    else:
        key = torch.int32 if n_features < 2**31 else torch.int64
    features, order = torch.sort(indices.to(key), stable=True)
    bounds = torch.arange(n_features + 1, dtype=key, device=indices.device)
    return torch.searchsorted(features, bounds), order


@kernel(do_not_specialize=["k", "n_features"])
def _gather_dot_kernel(
    rows, w, indices, tokens, levels, out, k, d, n_features, rows_l, rows_n, rows_d, w_f, w_d,
    indices_n, indices_k, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(k, BLOCK_K)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    slots = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    real = slots < k
    feature = tl.load(indices + token * indices_n + slots.to(tl.int64) * indices_k, real, other=0)
    inside_w = real & (feature >= 0) & (feature < n_features)
    if tokens is not None:
        owner = tl.load(tokens + slots, real, other=0)[:, None] * rows_n
    if levels is not None:
        level = tl.load(levels + feature, inside_w, other=0)[:, None] * rows_l
        owner = level + (token * rows_n if tokens is None else owner)
    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, d, BLOCK_D):
        columns = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        inside = columns < d
        if tokens is None and levels is None:
            row = tl.load(rows + token * rows_n + columns * rows_d, inside, other=0)
            row = row.to(tl.float32)[None, :]
        else:
            own = rows + owner + columns[None, :] * rows_d
            row = tl.load(own, real[:, None] & inside[None, :], other=0).to(tl.float32)
        at = feature[:, None] * w_f + columns[None, :] * w_d
        weights = tl.load(w + at, inside_w[:, None] & inside[None, :], other=0)
        acc += weights.to(tl.float32) * row
    dots = tl.where(inside_w, tl.sum(acc, 1), float("nan"))
    tl.store(out + token * k + slots, dots.to(out.dtype.element_ty), real)


# BLOCK_D -> BLOCK_K at most: 4096 products at a time, 32 a thread of 4 warps
GATHER_TILES = {64: 32, 128: 32, 256: 16, 512: 8}


def tokens_of(row_offsets: torch.Tensor, slots: int) -> torch.Tensor:
    """[S] int64: the token of each slot, in 0..N-1 whatever the offsets are."""
    places = torch.arange(slots, device=row_offsets.device)
    # the last bound is left out: what lies behind it is the last token's
    return torch.searchsorted(row_offsets[1:-1].contiguous(), places, right=True)


def gather_dots(
    rows: torch.Tensor,
    w: torch.Tensor,
    indices: torch.Tensor,
    tokens: torch.Tensor | None,
    levels: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """gather_dot into [N, k], or [S] for slots of these tokens, of any dtype."""
    n, d = rows.shape[-2:]
    k = indices.shape[-1]
    out = rows.new_empty(indices.shape, dtype=dtype)
    levels, rows_l = levels_inside(rows, levels)
    if out.numel() == 0:
        return out
    block_d = min(max(64, power_of_two(d)), 512)
    block_k = min(GATHER_TILES[block_d], power_of_two(k))
    # all slots of ragged codes are those of one program's token
    owners, strides = (n, indices.stride()) if tokens is None else (1, (0, *indices.stride()))
    _gather_dot_kernel[(owners * ceil_div(k, block_k),)](
        rows,
        w,
        indices,
        tokens,
        levels,
        out,
        k,
        d,
        w.shape[0],
        rows_l,
        *rows.stride()[-2:],
        *w.stride(),
        *strides,
        block_k,
        block_d,
        num_warps=4,
    )
    return out


def gather_dot(
    rows: torch.Tensor,
    w: torch.Tensor,
    indices: torch.Tensor,
    row_offsets: torch.Tensor | None,
    levels: torch.Tensor | None,
) -> torch.Tensor:
    tokens = None if row_offsets is None else tokens_of(row_offsets, indices.shape[0])
    return gather_dots(rows, w, indices, tokens, levels, rows.dtype)


def cases() -> list[offline.Case]:
    found = []
    for dtype in ("fp32", "bf16", "fp16"):
        strides = dict.fromkeys(("rows_n", "w_f"), "i32")
        types = {"rows": f"*{dtype}", "w": f"*{dtype}", "indices": "*i64", "out": f"*{dtype}"}
        types |= {"k": "i32", "d": "i32", "n_features": "i32", **strides, "indices_n": "i32"}
        for block_d, block_k in GATHER_TILES.items():
            if dtype != "bf16" and block_d < 512:
                continue
            fixed = dict(rows_d=1, w_d=1, indices_k=1, BLOCK_K=block_k, BLOCK_D=block_d)
            one = {"levels": None, "rows_l": 1}
            forms = [(kind, typed, constants | one) for kind, typed, constants in FORMS]
            if block_d == 512:
                each = {"levels": "*i64", "rows_l": "i32"}
                forms += [(f"{kind} levels", typed | each, more) for kind, typed, more in FORMS]
            for kind, typed, constants in forms:
                found.append(
                    offline.Case(
                        f"gather_dot {dtype} BLOCK_D={block_d}{kind}",
                        _gather_dot_kernel,
                        types | typed,
                        fixed | constants,
                        divisible=("d", *strides),
                    )
                )
    return found
