# SPDX-License-Identifier: Apache-2.0
"""feature_sum and sae_gradients_: see mikernels/ops/sae/gradients.py.

A program is a feature and a block of columns. All features of one block come before the next block,
so that a slice [N, BLOCK_D] of the rows serves all its slots from L2: a row is read k times, and
whole rows of G2's dy and x together are 151 MB. Slots are taken in tiles, so that several rows are
in flight; hot features as in `gradients_hot`. Rows whose coefficient is 0 are not read, so that a
NaN in them does not come out as 0 * NaN.

sae_gradients_ is two such sums: values and dy give dw_dec and, while the rows are there, the
block's part of dv = <dy, w_dec>; then dv and x give dw_enc. The parts, 4 bytes a slot and block,
are summed in order of the blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common import offline
from ..common.launch import ceil_div, kernel, power_of_two
from . import gradients_hot
from .gradients_hot import (
    Slots,
    compensated,
    feature_work,
    held,
    hot_share,
    levels_inside,
    share_of,
    token_of,
)


@triton.jit
def sum_rows(
    begin, end, order, tokens, coefficients, rows, w, dots, k, d, rows_n, rows_d, columns,
    SHORT: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum over slots begin..end of coefficient * row, and of the coefficients; fp32.

    With a row w of these columns, <row, w> of every slot goes to dots.
    """
    total, lost = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    bias, bias_lost = tl.zeros([E], tl.float32), tl.zeros([E], tl.float32)
    inside = columns < d
    # slots are known two tiles ahead, coefficients and tokens one: a tile waits for its rows only
    at = begin + tl.arange(0, E)
    slot = tl.load(order + at, at < end, other=0)
    c = tl.load(coefficients + slot, at < end, other=0).to(tl.float32)
    next_slot = tl.load(order + at + E, at + E < end, other=0)
    if tokens is not None:
        owner = tl.load(tokens + slot, at < end, other=0)
    for start in range(begin, end, E):
        live = c != 0
        token = token_of(slot, k, SHORT) if tokens is None else owner
        where = token[:, None] * rows_n + columns[None, :] * rows_d
        tile = tl.load(rows + where, live[:, None] & inside[None, :], other=0).to(tl.float32)
        at = start + E + tl.arange(0, E)
        next_c = tl.load(coefficients + next_slot, at < end, other=0).to(tl.float32)
        if tokens is not None:
            owner = tl.load(tokens + next_slot, at < end, other=0)
        last_slot = tl.load(order + at + E, at + E < end, other=0)
        if w is not None:
            # a row of w with inf or NaN times rows that were not read would give NaN
            dot = tl.where(live, tl.sum(tile * w[None, :], 1), 0)
            tl.store(dots + slot, dot, at - E < end)
        total, lost = compensated(total, lost, tl.sum(c[:, None] * tile, 0))
        bias, bias_lost = compensated(bias, bias_lost, c)
        c, slot, next_slot = next_c, next_slot, last_slot
    return total, tl.sum(bias, 0)


@triton.jit
def part_of(w, dots, feature, slots, d, w_f, w_d, columns):
    """These columns of the feature's row of w in fp32, and where their part of the dots goes."""
    row = tl.load(w + feature * w_f + columns * w_d, columns < d, other=0).to(tl.float32)
    return row, dots + tl.program_id(1) * slots.to(tl.int64)


@kernel(do_not_specialize=["n_features", "slots", "bits", "k"])
def _sum_shares_kernel(
    coefficients, rows, levels, w, dots, offsets, order, tokens, partial, partial_bias,
    n_features, slots, bits, k, d, rows_l, rows_n, rows_d, w_f, w_d,
    SHORT: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0)
    feature, begin, end = hot_share(share, offsets, n_features, slots, bits)
    if begin < end:
        if levels is not None:
            rows += tl.load(levels + feature) * rows_l
        columns = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
        part = None
        if w is not None:
            part, dots = part_of(w, dots, feature, slots, d, w_f, w_d, columns)
        total, bias = sum_rows(
            begin, end, order, tokens, coefficients, rows, part, dots, k, d, rows_n, rows_d,
            columns, SHORT, E, BLOCK_D,
        )  # fmt: skip
        tl.store(partial + share.to(tl.int64) * d + columns, total, columns < d)
        if tl.program_id(1) == 0:
            tl.store(partial_bias + share, bias)


@kernel(do_not_specialize=["slots", "bits", "k"])
def _feature_sum_kernel(
    coefficients, rows, levels, w, dots, offsets, order, tokens, partial, partial_bias, dw, db,
    slots, bits, k, d, rows_l, rows_n, rows_d, w_f, w_d, dw_f, dw_d, db_f,
    ACCUMULATE: tl.constexpr, SHORT: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    columns = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    begin, end, block, last = feature_work(feature, offsets, bits)
    if levels is not None:
        rows += tl.load(levels + feature) * rows_l
    part = None
    if w is not None:
        part, dots = part_of(w, dots, feature, slots, d, w_f, w_d, columns)
    total, bias = sum_rows(
        begin, end, order, tokens, coefficients, rows, part, dots, k, d, rows_n, rows_d, columns,
        SHORT, E, BLOCK_D,
    )  # fmt: skip
    lost, bias_lost = tl.zeros([BLOCK_D], tl.float32), bias * 0
    for b in range(block, last):
        share = share_of(b, begin, bits)
        term = tl.load(partial + share * d + columns, columns < d, other=0)
        total, lost = compensated(total, lost, term)
        bias, bias_lost = compensated(bias, bias_lost, tl.load(partial_bias + share))
    to = dw + feature * dw_f + columns * dw_d
    if ACCUMULATE:
        total += tl.load(to, columns < d, other=0).to(tl.float32)
    tl.store(to, total.to(dw.dtype.element_ty), columns < d)
    if db is not None:
        # one block's alone: the others would read it while that one writes
        first = tl.program_id(1) == 0
        to_bias = db + feature * db_f
        if ACCUMULATE:
            bias += tl.load(to_bias, first, other=0).to(tl.float32)
        tl.store(to_bias, bias.to(db.dtype.element_ty), first)


# BLOCK_D -> (entries of a tile, warps): 4 slots a feature is the mean at G2, and twice as many rows
# in flight take 207 registers instead of 128
SUM_TILES = {64: (16, 1), 128: (8, 1), 256: (4, 1), 512: (4, 2)}
# bytes of a slice of rows that stay in L2 beside the weights that stream past: half of an H100's,
# whose two parts may both hold it
SLICE = 20 << 20
LEAST_COLUMNS = 128  # of a slice: programs of less would wait longer for slots than for rows


def columns_of(n: int, d: int, itemsize: int) -> int:
    """BLOCK_D for n rows of d numbers."""
    block_d = min(max(64, power_of_two(d)), max(SUM_TILES))
    while block_d > LEAST_COLUMNS and n * block_d * itemsize > SLICE:
        block_d //= 2
    return block_d


def sum_by_feature(
    coefficients: torch.Tensor,
    rows: torch.Tensor,
    levels: torch.Tensor | None,
    slots: Slots,
    dw: torch.Tensor,
    db: torch.Tensor | None,
    accumulate: bool,
    w: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """feature_sum into dw [F, d], db [F] of any dtype; with w [F, d], returns <row, w> by slot.

    With levels [F], rows are [L, N, d] and a feature's are those of its level. The dots are fp32,
    [M], and 0 where the coefficient is.
    """
    n_features, d = dw.shape
    levels, rows_l = levels_inside(rows, levels)
    block_d = columns_of(rows.shape[-2], d, rows.element_size())
    entries, warps = SUM_TILES[block_d]
    blocks_d = max(ceil_div(d, block_d), 1)
    parts = None if w is None else rows.new_empty(blocks_d, slots.count, dtype=torch.float32)
    if n_features:
        partial = rows.new_empty(slots.shares, d, dtype=torch.float32)
        partial_bias = rows.new_empty(slots.shares, dtype=torch.float32)
        operands = (
            coefficients.contiguous(), rows, levels, w, parts, slots.offsets, slots.order,
            slots.tokens, partial, partial_bias,
        )  # fmt: skip
        sizes = (
            slots.count, slots.bits, slots.k, d, rows_l, *rows.stride()[-2:],
            *((0, 0) if w is None else w.stride()),
        )  # fmt: skip
        tile = {
            "SHORT": gradients_hot.is_short(slots.count),
            "E": entries,
            "BLOCK_D": block_d,
            "num_warps": warps,
        }
        if slots.shares:
            _sum_shares_kernel[(slots.shares, blocks_d)](*operands, n_features, *sizes, **tile)
        _feature_sum_kernel[(n_features, blocks_d)](
            *operands, dw, db, *sizes, *dw.stride(), 0 if db is None else db.stride(0),
            ACCUMULATE=accumulate, **tile,
        )  # fmt: skip
    if parts is None:
        return None
    return parts[0] if blocks_d == 1 else parts.sum(0)


def feature_sum(
    coefficients: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    order: torch.Tensor,
    tokens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    n_features = offsets.shape[0] - 1
    dw, db = rows.new_empty(n_features, rows.shape[1]), rows.new_empty(n_features)
    slots = held(coefficients, offsets, order, tokens, rows.shape[0])
    sum_by_feature(coefficients, rows, None, slots, dw, db, False)
    return dw, db


def sae_gradients_(
    values: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    order: torch.Tensor,
    tokens: torch.Tensor | None,
    dy: torch.Tensor,
    x: torch.Tensor,
    w_dec: torch.Tensor,
    levels: torch.Tensor | None,
    d_pre: torch.Tensor | None,
    dw_dec: torch.Tensor,
    dw_enc: torch.Tensor,
    db_enc: torch.Tensor,
    accumulate: bool,
) -> None:
    if accumulate and values.numel() == 0:
        return
    slots = held(values, offsets, order, tokens, x.shape[0])
    through = w_dec if d_pre is None else None
    dots = sum_by_feature(values, dy, levels, slots, dw_dec, None, accumulate, through)
    dvalues = dots if d_pre is None else d_pre
    assert dvalues is not None
    sum_by_feature(dvalues, x, None, slots, dw_enc, db_enc, accumulate)


def cases() -> list[offline.Case]:
    found = []
    pointers = dict.fromkeys(("offsets", "order"), "*i64")
    pointers |= dict.fromkeys(("partial", "partial_bias"), "*fp32")
    sizes = dict.fromkeys(("slots", "bits", "k", "d", "rows_n"), "i32")
    plain: dict[str, int | None] = {"levels": None, "rows_l": 1}
    by_level = {"levels": "*i64", "rows_l": "i32"}
    # (name, dtypes of coefficients and rows, of w, of dw, types, constants): an operator call has
    # one dtype; a training step has fp32 rows and sums, and fp32 or bf16 weights
    low = "bf16", "fp16"
    ways: list[tuple[str, str, str | None, str, dict[str, str], dict[str, int | None]]] = [
        ("", t, None, t, {"db": f"*{t}"}, {"w": None, "dots": None, "w_f": 1})
        for t in ("fp32", *low)
    ] + [
        (f" w={w}", t, w, "fp32", {"w": f"*{w}", "dots": "*fp32", "w_f": "i32"}, {"db": None})
        for t, w in (("fp32", "fp32"), ("fp32", "bf16"), *zip(low, low, strict=True))
    ]
    for way, dtype, w, dw, typed, constants in ways:
        operands = dict.fromkeys(("coefficients", "rows"), f"*{dtype}") | pointers | sizes | typed
        fixed = {"rows_d": 1, "w_d": 1, "SHORT": True, **constants}
        for block_d, (entries, warps) in SUM_TILES.items():
            if (dtype, w) not in (("bf16", None), ("fp32", "bf16")) and block_d < max(SUM_TILES):
                continue
            forms = [(k, t, plain | c) for k, t, c in gradients_hot.FORMS]
            if block_d == max(SUM_TILES) and dtype == "fp32":
                forms += [(f"{k} levels", t | by_level, dict(c)) for k, t, c in gradients_hot.FORMS]
            for kind, more, rest in forms:
                tile = {**fixed, **rest, "E": entries, "BLOCK_D": block_d}
                name = f"{dtype}{way} BLOCK_D={block_d}{kind}"
                even = [n for n in ("d", "rows_n", "rows_l", "w_f") if n in operands | more]
                typed = operands | more
                found.append(
                    offline.Case(
                        f"shares {name}",
                        _sum_shares_kernel,
                        {n: t for n, t in typed.items() if n != "db"} | {"n_features": "i32"},
                        {n: c for n, c in tile.items() if n != "db"},
                        num_warps=warps,
                        divisible=tuple(even),
                    )
                )
                found.append(
                    offline.Case(
                        f"feature_sum {name}",
                        _feature_sum_kernel,
                        typed | {"dw": f"*{dw}", "dw_f": "i32"},
                        tile | {"dw_d": 1, "db_f": 1, "ACCUMULATE": w is not None},
                        num_warps=warps,
                        divisible=(*even, "dw_f"),
                    )
                )
    return found
