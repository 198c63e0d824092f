# SPDX-License-Identifier: Apache-2.0
"""sae_gradients_: see mikernels/ops/sae/gradients.py.

A program is a feature with its row of w_dec in registers. Each token's dy row serves the dot that
gives dv and the sum for dw_dec, then dv serves x's row, so N k d is read twice and dv is never in
memory. Slots are taken in tiles, so that several rows are in flight; hot features as in
`gradients_hot`. Rows whose value is 0 are not read, so that a NaN in them does not come out as
0 * NaN. Where dv is given (d_pre), x's row is read where dv is not 0, and w_dec is not read. Rows
wider than 4096 (2048 where x and dy have two widths) go through dv in memory instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common import offline
from ..common.launch import kernel, power_of_two
from . import gradients_hot
from .gradients import gather_dots
from .gradients_hot import feature_work, hot_share, levels_inside, share_of, token_of
from .gradients_sum import sum_by_feature


@triton.jit
def sae_rows(
    begin, end, order, tokens, values, d_pre, dy, x, w, k, dy_n, dy_d, x_n, x_d, columns, inside,
    inside_x, SHORT: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of dw_dec and dw_enc [BLOCK_D] and the sum of dv over slots begin..end; fp32.

    `inside` are the columns of dy and w, `inside_x` those of x.
    """
    to_dec = tl.zeros([BLOCK_D], tl.float32)
    to_enc = tl.zeros([BLOCK_D], tl.float32)
    bias = tl.zeros([E], tl.float32)
    # slots are known two tiles ahead, values and tokens one, so that a tile waits for its rows only
    at = begin + tl.arange(0, E)
    slot = tl.load(order + at, at < end, other=0)
    value = tl.load(values + slot, at < end, other=0).to(tl.float32)
    next_slot = tl.load(order + at + E, at + E < end, other=0)
    if d_pre is not None:
        given = tl.load(d_pre + slot, at < end, other=0).to(tl.float32)
    if tokens is not None:
        # in 32 bits while they wait: 64 spill in the fused update
        owner = tl.load(tokens + slot, at < end, other=0).to(tl.int32)
    for start in range(begin, end, E):
        live = value != 0
        live_x = live if d_pre is None else given != 0
        token = token_of(slot, k, SHORT) if tokens is None else owner.to(tl.int64)
        token = token[:, None]
        column = columns[None, :].to(tl.int64)
        read, read_x = live[:, None] & inside[None, :], live_x[:, None] & inside_x[None, :]
        g = tl.load(dy + token * dy_n + column * dy_d, read, other=0).to(tl.float32)
        h = tl.load(x + token * x_n + column * x_d, read_x, other=0).to(tl.float32)
        at = start + E + tl.arange(0, E)
        next_value = tl.load(values + next_slot, at < end, other=0).to(tl.float32)
        if tokens is not None:
            owner = tl.load(tokens + next_slot, at < end, other=0).to(tl.int32)
        last_slot = tl.load(order + at + E, at + E < end, other=0)
        if d_pre is None:
            # a row of w with inf or NaN times rows that were not read would give NaN
            dv = tl.where(live, tl.sum(g * w[None, :], 1), 0)
        else:
            dv = given
            given = tl.load(d_pre + next_slot, at < end, other=0).to(tl.float32)
        to_dec += tl.sum(g * value[:, None], 0)
        to_enc += tl.sum(h * dv[:, None], 0)
        bias += dv
        value, slot, next_slot = next_value, next_slot, last_slot
    return to_dec, to_enc, tl.sum(bias, 0)


@triton.jit
def at_level(dy, levels, feature, dy_l):
    """Where the rows begin that are the gradients at the output of this feature's level."""
    return dy if levels is None else dy + tl.load(levels + feature) * dy_l


@kernel(do_not_specialize=["n_features", "slots", "bits", "k"])
def _sae_shares_kernel(
    values, d_pre, order, offsets, tokens, dy, levels, x, w_dec, partial, partial_bias, n_features,
    slots, bits, k, d, d_x, dy_l, dy_n, dy_d, x_n, x_d, w_f, w_d, SHORT: tl.constexpr,
    E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0)
    feature, begin, end = hot_share(share, offsets, n_features, slots, bits)
    if begin < end:
        columns = tl.arange(0, BLOCK_D)
        inside = columns < d
        inside_x = inside if d_x is None else columns < d_x
        w = None
        if d_pre is None:
            w = tl.load(w_dec + feature * w_f + columns.to(tl.int64) * w_d, inside, other=0)
            w = w.to(tl.float32)
        dy = at_level(dy, levels, feature, dy_l)
        to_dec, to_enc, bias = sae_rows(
            begin, end, order, tokens, values, d_pre, dy, x, w, k, dy_n, dy_d, x_n, x_d, columns,
            inside, inside_x, SHORT, E, BLOCK_D,
        )  # fmt: skip
        row = partial + share.to(tl.int64) * (d + (d if d_x is None else d_x))
        tl.store(row + columns, to_dec, inside)
        tl.store(row + d + columns, to_enc, inside_x)
        tl.store(partial_bias + share, bias)


@triton.jit
def sae_feature(
    feature, values, d_pre, order, offsets, tokens, dy, x, w, partial, partial_bias, bits, k, d,
    d_x, dy_n, dy_d, x_n, x_d, columns, inside, inside_x, SHORT: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sae_rows over all slots of a feature, from the partial sums if it is hot."""
    begin, end, block, last = feature_work(feature, offsets, bits)
    to_dec, to_enc, bias = sae_rows(
        begin, end, order, tokens, values, d_pre, dy, x, w, k, dy_n, dy_d, x_n, x_d, columns,
        inside, inside_x, SHORT, E, BLOCK_D,
    )  # fmt: skip
    for b in range(block, last):
        share = share_of(b, begin, bits)
        row = partial + share * (d + (d if d_x is None else d_x))
        to_dec += tl.load(row + columns, inside, other=0)
        to_enc += tl.load(row + d + columns, inside_x, other=0)
        bias += tl.load(partial_bias + share)
    return to_dec, to_enc, bias


@kernel(do_not_specialize=["bits", "k"])
def _sae_gradients_kernel(
    values, d_pre, order, offsets, tokens, dy, levels, x, w_dec, partial, partial_bias, dw_dec,
    dw_enc, db_enc, bits, k, d, d_x, dy_l, dy_n, dy_d, x_n, x_d, w_f, w_d, dec_f, dec_d, enc_f,
    enc_d, db_f,
    ACCUMULATE: tl.constexpr, SHORT: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < d
    inside_x = inside if d_x is None else columns < d_x
    w = None
    if d_pre is None:
        w = tl.load(w_dec + feature * w_f + columns.to(tl.int64) * w_d, inside, other=0)
        w = w.to(tl.float32)
    to_dec, to_enc, bias = sae_feature(
        feature, values, d_pre, order, offsets, tokens, at_level(dy, levels, feature, dy_l), x, w,
        partial, partial_bias, bits, k, d, d_x, dy_n, dy_d, x_n, x_d, columns, inside, inside_x,
        SHORT, E, BLOCK_D,
    )  # fmt: skip
    at_dec = dw_dec + feature * dec_f + columns.to(tl.int64) * dec_d
    at_enc = dw_enc + feature * enc_f + columns.to(tl.int64) * enc_d
    at_bias = db_enc + feature * db_f
    if ACCUMULATE:
        to_dec += tl.load(at_dec, inside, other=0).to(tl.float32)
        to_enc += tl.load(at_enc, inside_x, other=0).to(tl.float32)
        bias += tl.load(at_bias).to(tl.float32)
    tl.store(at_dec, to_dec.to(dw_dec.dtype.element_ty), inside)
    tl.store(at_enc, to_enc.to(dw_enc.dtype.element_ty), inside_x)
    tl.store(at_bias, bias.to(db_enc.dtype.element_ty))


# BLOCK_D -> (slots of a tile, warps): as many slots as leave room for 16 warps on an SM
ROW_TILES = {
    64: (8, 1),
    128: (2, 1),
    256: (2, 1),
    512: (2, 2),
    1024: (2, 4),
    2048: (2, 8),
    4096: (1, 8),
}
# two masks of 4096 columns spill (sm_90, fp32)
WIDEST, WIDEST_APART = 4096, 2048


def row_tile(
    d: int, slots: int, tiles: dict[int, tuple[int, int]] = ROW_TILES
) -> dict[str, int | bool]:
    block_d = max(64, power_of_two(d))
    entries, warps = tiles[block_d]
    short = gradients_hot.is_short(slots)
    return {"SHORT": short, "E": entries, "BLOCK_D": block_d, "num_warps": warps}


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
    n_features, d = w_dec.shape
    d_x, slots = x.shape[1], values.numel()
    k, tokens = gradients_hot.owners(values, tokens, x.shape[0])
    if n_features == 0 or (accumulate and slots == 0):
        return
    if max(d, d_x) > (WIDEST if d == d_x else WIDEST_APART):
        dvalues = d_pre
        if dvalues is None:
            dvalues = gather_dots(dy, w_dec, indices, tokens, levels, torch.float32)
            dvalues.masked_fill_(values == 0, 0)
        gates = values if d_pre is None else d_pre
        by_feature = offsets, order, tokens
        sum_by_feature(values, values, dy, levels, *by_feature, dw_dec, None, accumulate)
        sum_by_feature(dvalues, gates, x, None, *by_feature, dw_enc, db_enc, accumulate)
        return
    values, d_pre = values.contiguous(), None if d_pre is None else d_pre.contiguous()
    levels, dy_l = levels_inside(dy, levels)
    offsets, order = gradients_hot.inside(offsets, order, slots)
    bits = gradients_hot.chunk_bits(slots)
    shares = gradients_hot.shares(slots, bits)
    partial = dy.new_empty(shares, d + d_x, dtype=torch.float32)
    partial_bias = dy.new_empty(shares, dtype=torch.float32)
    operands = values, d_pre, order, offsets, tokens, dy, levels, x, w_dec, partial, partial_bias
    # one width is one mask in the kernels
    widths = d, None if d_x == d else d_x
    sizes = k, *widths, dy_l, *dy.stride()[-2:], *x.stride(), *w_dec.stride()
    tile = row_tile(max(d, d_x), slots)
    if shares:
        _sae_shares_kernel[(shares,)](*operands, n_features, slots, bits, *sizes, **tile)
    _sae_gradients_kernel[(n_features,)](
        *operands, dw_dec, dw_enc, db_enc, bits, *sizes, *dw_dec.stride(), *dw_enc.stride(),
        *db_enc.stride(), ACCUMULATE=accumulate, **tile,
    )  # fmt: skip


def cases() -> list[offline.Case]:
    found = []
    # a training step has fp32 activations and fp32 or bf16 weights; an operator call, one dtype
    for dtype, weights in [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp16")]:
        operands = dict.fromkeys(("values", "dy", "x"), f"*{dtype}") | {"w_dec": f"*{weights}"}
        plain = {"levels": None, "d_pre": None, "d_x": None, "dy_l": 0}
        levels = {"levels": "*i64", "dy_l": "i32", "d_x": "i32"}
        given = {"d_pre": f"*{dtype}"}
        ways: list[tuple[str, dict[str, str], dict[str, int | None]]] = [
            ("", {}, plain),
            (" levels, two widths", levels, {"d_pre": None}),
            (" d_pre", given, {n: v for n, v in plain.items() if n != "d_pre"}),
            (" d_pre, levels, two widths", given | levels, {}),
        ]
        operands |= {
            "offsets": "*i64",
            "order": "*i64",
            "partial": "*fp32",
            "partial_bias": "*fp32",
        }
        strides = dict.fromkeys(("dy_n", "x_n", "w_f"), "i32")
        sizes = {"bits": "i32", "k": "i32", "d": "i32", **strides}
        for block_d, (entries, warps) in ROW_TILES.items():
            if (dtype, weights) != ("fp32", "bf16") and block_d < WIDEST:
                continue
            # what they add is least likely to fit beside the widest rows of the widest numbers
            more = ways if dtype == "fp32" and block_d >= WIDEST_APART else ways[:1]
            forms = [
                (kind + way, {**typed, **pointers}, {**constants, **fixed})
                for kind, typed, constants in gradients_hot.FORMS
                for way, pointers, fixed in more
                if not kind or block_d in (1024, WIDEST) or (way and block_d == WIDEST_APART)
                if block_d <= WIDEST_APART or "two widths" not in way
            ]
            for kind, typed, constants in forms:
                tile = dict(
                    dy_d=1, x_d=1, w_d=1, SHORT=True, E=entries, BLOCK_D=block_d, **constants
                )
                name = f"{dtype} w={weights} BLOCK_D={block_d}{kind}"
                even = ("d", *strides, *(n for n in ("d_x", "dy_l") if n in typed))
                found.append(
                    offline.Case(
                        f"shares {name}",
                        _sae_shares_kernel,
                        {**operands, **typed, **sizes, "n_features": "i32", "slots": "i32"},
                        tile,
                        num_warps=warps,
                        divisible=even,
                    )
                )
                out = {name: "*fp32" for name in ("dw_dec", "dw_enc", "db_enc")}
                out |= {"dec_f": "i32", "enc_f": "i32"}
                found.append(
                    offline.Case(
                        f"gradients {name}",
                        _sae_gradients_kernel,
                        {**operands, **typed, **sizes, **out},
                        dict(dec_d=1, enc_d=1, db_f=1, ACCUMULATE=True, **tile),
                        num_warps=warps,
                        divisible=(*even, "dec_f", "enc_f"),
                    )
                )
    return found
