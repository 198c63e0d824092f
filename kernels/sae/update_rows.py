# SPDX-License-Identifier: Apache-2.0
"""Both gradient rows of a feature in registers, for sae_update_, which applies them there.

Each token's dy row serves the dot that gives dv and the sum for dw_dec, then dv serves x's row, so
N k d is read twice and dv is never in memory. Slots are taken in tiles, so that several rows are in
flight; hot features as in `gradients_hot`. Rows whose value is 0 are not read, so that a NaN in
them does not come out as 0 * NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import offline
from ..common.launch import kernel, power_of_two
from . import gradients_hot
from .gradients_hot import feature_work, hot_share, share_of, token_of


@triton.jit
def slot_rows(
    begin, end, order, tokens, values, dy, x, w, k, dy_n, dy_d, x_n, x_d, columns, inside,
    SHORT: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of dw_dec and dw_enc [BLOCK_D] and the sum of dv over slots begin..end; fp32."""
    to_dec = tl.zeros([BLOCK_D], tl.float32)
    to_enc = tl.zeros([BLOCK_D], tl.float32)
    bias = tl.zeros([E], tl.float32)
    # slots are known two tiles ahead, values and tokens one, so that a tile waits for its rows only
    at = begin + tl.arange(0, E)
    slot = tl.load(order + at, at < end, other=0)
    value = tl.load(values + slot, at < end, other=0).to(tl.float32)
    next_slot = tl.load(order + at + E, at + E < end, other=0)
    if tokens is not None:
        # in 32 bits while they wait: 64 spill
        owner = tl.load(tokens + slot, at < end, other=0).to(tl.int32)
    for start in range(begin, end, E):
        live = value != 0
        token = token_of(slot, k, SHORT) if tokens is None else owner.to(tl.int64)
        token = token[:, None]
        column = columns[None, :].to(tl.int64)
        read = live[:, None] & inside[None, :]
        g = tl.load(dy + token * dy_n + column * dy_d, read, other=0).to(tl.float32)
        h = tl.load(x + token * x_n + column * x_d, read, other=0).to(tl.float32)
        at = start + E + tl.arange(0, E)
        next_value = tl.load(values + next_slot, at < end, other=0).to(tl.float32)
        if tokens is not None:
            owner = tl.load(tokens + next_slot, at < end, other=0).to(tl.int32)
        last_slot = tl.load(order + at + E, at + E < end, other=0)
        # a row of w with inf or NaN times rows that were not read would give NaN
        dv = tl.where(live, tl.sum(g * w[None, :], 1), 0)
        to_dec += tl.sum(g * value[:, None], 0)
        to_enc += tl.sum(h * dv[:, None], 0)
        bias += dv
        value, slot, next_slot = next_value, next_slot, last_slot
    return to_dec, to_enc, tl.sum(bias, 0)


@kernel(do_not_specialize=["n_features", "slots", "bits", "k"])
def _update_shares_kernel(
    values, order, offsets, tokens, dy, x, w_dec, partial, partial_bias, n_features, slots, bits,
    k, d, dy_n, dy_d, x_n, x_d,
    SHORT: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0)
    feature, begin, end = hot_share(share, offsets, n_features, slots, bits)
    if begin < end:
        columns = tl.arange(0, BLOCK_D)
        inside = columns < d
        w = tl.load(w_dec + feature * d + columns, inside, other=0).to(tl.float32)
        to_dec, to_enc, bias = slot_rows(
            begin, end, order, tokens, values, dy, x, w, k, dy_n, dy_d, x_n, x_d, columns, inside,
            SHORT, E, BLOCK_D,
        )  # fmt: skip
        row = partial + share.to(tl.int64) * 2 * d
        tl.store(row + columns, to_dec, inside)
        tl.store(row + d + columns, to_enc, inside)
        tl.store(partial_bias + share, bias)


@triton.jit
def feature_rows(
    feature, values, order, offsets, tokens, dy, x, w, partial, partial_bias, bits, k, d, dy_n,
    dy_d, x_n, x_d, columns, inside, SHORT: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """slot_rows over all slots of a feature, from the partial sums if it is hot."""
    begin, end, block, last = feature_work(feature, offsets, bits)
    to_dec, to_enc, bias = slot_rows(
        begin, end, order, tokens, values, dy, x, w, k, dy_n, dy_d, x_n, x_d, columns, inside,
        SHORT, E, BLOCK_D,
    )  # fmt: skip
    for b in range(block, last):
        share = share_of(b, begin, bits)
        row = partial + share * 2 * d
        to_dec += tl.load(row + columns, inside, other=0)
        to_enc += tl.load(row + d + columns, inside, other=0)
        bias += tl.load(partial_bias + share)
    return to_dec, to_enc, bias


# BLOCK_D -> (slots of a tile, warps): 4 columns per thread, 8 in the widest, keep the update's ten
# rows in 128 registers, so that 16 warps fit on an SM
TILES = {
    64: (8, 1),
    128: (4, 1),
    256: (2, 2),
    512: (2, 4),
    1024: (2, 8),
    2048: (2, 16),
    4096: (2, 16),
}
WIDEST = max(TILES)


def row_tile(d: int, slots: int) -> dict[str, int | bool]:
    block_d = max(64, power_of_two(d))
    entries, warps = TILES[block_d]
    short = gradients_hot.is_short(slots)
    return {"SHORT": short, "E": entries, "BLOCK_D": block_d, "num_warps": warps}


def cases() -> list[offline.Case]:
    found = []
    fixed = dict.fromkeys(("offsets", "order"), "*i64")
    fixed |= dict.fromkeys(("partial", "partial_bias"), "*fp32")
    even = "d", "dy_n", "x_n"
    fixed |= dict.fromkeys(("n_features", "slots", "bits", "k", *even), "i32")
    for dtype, weights in [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp16")]:
        types = dict.fromkeys(("values", "dy", "x"), f"*{dtype}") | {"w_dec": f"*{weights}"} | fixed
        for block_d, (entries, warps) in TILES.items():
            if (dtype, weights) != ("fp32", "bf16") and block_d < WIDEST:
                continue
            tile = dict(dy_d=1, x_d=1, SHORT=True, E=entries, BLOCK_D=block_d)
            for kind, typed, constants in gradients_hot.FORMS:
                if kind and block_d not in (1024, WIDEST):
                    continue
                found.append(
                    offline.Case(
                        f"shares {dtype} w={weights} BLOCK_D={block_d}{kind}",
                        _update_shares_kernel,
                        types | typed,
                        tile | constants,
                        num_warps=warps,
                        divisible=even,
                    )
                )
    return found
