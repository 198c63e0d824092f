# SPDX-License-Identifier: Apache-2.0
"""feature_sum: see mikernels/ops/sae/gradients.py.

A program is a feature and a block of columns; slots are taken in tiles, so that several rows are in
flight, and hot features as in `gradients_hot`. Rows whose coefficient is 0 are not read, so that
a NaN in them does not come out as 0 * NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common import offline
from . import gradients_hot
from .gradients_hot import feature_work, hot_share, levels_inside, share_of, token_of


@triton.jit
def sum_rows(
    begin, end, order, tokens, coefficients, gates, rows, k, d, rows_n, rows_d, columns, SHORT:
    tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum over slots begin..end of coefficient * row, and of the coefficients; fp32."""
    total = tl.zeros([BLOCK_D], tl.float32)
    bias = tl.zeros([E], tl.float32)
    inside = columns < d
    for start in range(begin, end, E):
        at = start + tl.arange(0, E)
        slot = tl.load(order + at, at < end, other=0)
        c = tl.load(coefficients + slot, at < end, other=0).to(tl.float32)
        live = tl.load(gates + slot, at < end, other=0).to(tl.float32) != 0
        if tokens is None:
            token = token_of(slot, k, SHORT)
        else:
            token = tl.load(tokens + slot, at < end, other=0)
        where = token[:, None] * rows_n + columns[None, :] * rows_d
        tile = tl.load(rows + where, live[:, None] & inside[None, :], other=0).to(tl.float32)
        total += tl.sum(tl.where(live, c, 0)[:, None] * tile, 0)
        bias += c
    return total, tl.sum(bias, 0)


@triton.jit(do_not_specialize=["n_features", "slots", "bits", "k"])
def _sum_shares_kernel(
    coefficients, gates, rows, levels, offsets, order, tokens, partial, partial_bias,
    n_features, slots, bits, k, d, rows_l, rows_n, rows_d,
    SHORT: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0)
    feature, begin, end = hot_share(share, offsets, n_features, slots, bits)
    if begin < end:
        if levels is not None:
            rows += tl.load(levels + feature) * rows_l
        columns = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
        total, bias = sum_rows(
            begin, end, order, tokens, coefficients, gates, rows, k, d, rows_n, rows_d, columns,
            SHORT, E, BLOCK_D,
        )  # fmt: skip
        tl.store(partial + share.to(tl.int64) * d + columns, total, columns < d)
        if tl.program_id(1) == 0:
            tl.store(partial_bias + share, bias)


@triton.jit(do_not_specialize=["bits", "k"])
def _feature_sum_kernel(
    coefficients, gates, rows, levels, offsets, order, tokens, partial, partial_bias, dw, db,
    bits, k, d, rows_l, rows_n, rows_d, dw_f, dw_d, db_f,
    WITH_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr,
    SHORT: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    columns = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    begin, end, block, last = feature_work(feature, offsets, bits)
    if levels is not None:
        rows += tl.load(levels + feature) * rows_l
    total, bias = sum_rows(
        begin, end, order, tokens, coefficients, gates, rows, k, d, rows_n, rows_d, columns,
        SHORT, E, BLOCK_D,
    )  # fmt: skip
    for b in range(block, last):
        share = share_of(b, begin, bits)
        total += tl.load(partial + share * d + columns, columns < d, other=0)
        bias += tl.load(partial_bias + share)
    to = dw + feature * dw_f + columns * dw_d
    if ACCUMULATE:
        total += tl.load(to, columns < d, other=0).to(tl.float32)
    tl.store(to, total.to(dw.dtype.element_ty), columns < d)
    if WITH_BIAS:
        # one block's alone: the others would read it while that one writes
        first = tl.program_id(1) == 0
        to_bias = db + feature * db_f
        if ACCUMULATE:
            bias += tl.load(to_bias, first, other=0).to(tl.float32)
        tl.store(to_bias, bias.to(db.dtype.element_ty), first)


# BLOCK_D -> (entries of a tile, warps): 4 to 8 rows in flight, at least 8 columns per thread
SUM_TILES = {64: (16, 1), 128: (8, 1), 256: (8, 1), 512: (8, 2), 1024: (8, 4)}


def sum_by_feature(
    coefficients: torch.Tensor,
    gates: torch.Tensor,
    rows: torch.Tensor,
    levels: torch.Tensor | None,
    offsets: torch.Tensor,
    order: torch.Tensor,
    tokens: torch.Tensor | None,
    dw: torch.Tensor,
    db: torch.Tensor | None,
    accumulate: bool,
) -> None:
    """feature_sum into dw [F, d], db [F] of any dtype; slots whose gate is 0 are skipped.

    With levels [F], rows are [L, N, d] and a feature's are those of its level.
    """
    n_features, d = dw.shape
    slots = coefficients.numel()
    k, tokens = gradients_hot.owners(coefficients, tokens, rows.shape[-2])
    levels, rows_l = levels_inside(rows, levels)
    if n_features == 0:
        return
    coefficients, gates = coefficients.contiguous(), gates.contiguous()
    offsets, order = gradients_hot.inside(offsets, order, slots)
    block_d = min(max(64, triton.next_power_of_2(d)), 1024)
    entries, warps = SUM_TILES[block_d]
    short = gradients_hot.is_short(slots)
    tile = {"SHORT": short, "E": entries, "BLOCK_D": block_d, "num_warps": warps}
    blocks_d = max(triton.cdiv(d, block_d), 1)
    bits = gradients_hot.chunk_bits(slots)
    shares = gradients_hot.shares(slots, bits)
    partial = rows.new_empty(shares, d, dtype=torch.float32)
    partial_bias = rows.new_empty(shares, dtype=torch.float32)
    operands = coefficients, gates, rows, levels, offsets, order, tokens, partial, partial_bias
    sizes = k, d, rows_l, *rows.stride()[-2:]
    if shares:
        _sum_shares_kernel[(shares, blocks_d)](*operands, n_features, slots, bits, *sizes, **tile)
    _feature_sum_kernel[(n_features, blocks_d)](
        *operands, dw, dw if db is None else db,
        bits, *sizes, *dw.stride(), 0 if db is None else db.stride(0),
        WITH_BIAS=db is not None, ACCUMULATE=accumulate, **tile,
    )  # fmt: skip


def feature_sum(
    coefficients: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    order: torch.Tensor,
    tokens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    n_features = offsets.shape[0] - 1
    dw, db = rows.new_empty(n_features, rows.shape[1]), rows.new_empty(n_features)
    sum_by_feature(coefficients, coefficients, rows, None, offsets, order, tokens, dw, db, False)
    return dw, db


def cases() -> list[offline.Case]:
    found = []
    for dtype in ("fp32", "bf16", "fp16"):
        operands = dict.fromkeys(("coefficients", "gates", "rows"), f"*{dtype}")
        operands |= {
            "offsets": "*i64",
            "order": "*i64",
            "partial": "*fp32",
            "partial_bias": "*fp32",
        }
        sizes = dict.fromkeys(("bits", "k", "d", "rows_n"), "i32")
        for block_d, (entries, warps) in SUM_TILES.items():
            if dtype != "bf16" and block_d < 1024:
                continue
            forms = [
                (kind, typed, {**constants, "levels": None, "rows_l": 1})
                for kind, typed, constants in gradients_hot.FORMS
            ]
            if block_d == 1024:
                each = {"tokens": "*i64", "levels": "*i64", "rows_l": "i32"}
                forms.append((" ragged levels", each, {}))
            for kind, typed, constants in forms:
                tile = dict(rows_d=1, SHORT=True, E=entries, BLOCK_D=block_d, **constants)
                name = f"{dtype} BLOCK_D={block_d}{kind}"
                found.append(
                    offline.Case(
                        f"shares {name}",
                        _sum_shares_kernel,
                        {**operands, **typed, **sizes, "n_features": "i32", "slots": "i32"},
                        tile,
                        num_warps=warps,
                        divisible=("d", "rows_n"),
                    )
                )
                out = {"dw": f"*{dtype}", "db": f"*{dtype}", "dw_f": "i32"}
                found.append(
                    offline.Case(
                        f"feature_sum {name}",
                        _feature_sum_kernel,
                        {**operands, **typed, **sizes, **out},
                        dict(dw_d=1, db_f=1, WITH_BIAS=True, ACCUMULATE=False, **tile),
                        num_warps=warps,
                        divisible=("d", "rows_n", "dw_f"),
                    )
                )
    return found
