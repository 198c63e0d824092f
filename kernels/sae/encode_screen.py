# SPDX-License-Identifier: Apache-2.0
"""Device code of encode: packing for the screen, exact scores, the certified selection.

The screen is one bf16 matrix product whose results are *upper bounds* of the ranking scores
s = scale (<x - b_dec, w> + b_enc). With x^ and v^ the bf16 roundings of x - b_dec and v = scale w,

    |<x, v> - <x^, v^>| <= |x - x^| |v| + |x^| |v - v^|            (Cauchy-Schwarz)

and the fp32 sum of K products, in any order, errs by at most K 2^-23 |x^| |v^|. The bound has rank
2, so it rides along as columns of the product, in front of what is zero padding anyway:

    x^ | 1     1     1     1         |x - x^| + K 2^-23 |x^|    |x^|
    v^ | hi    mid   low   margin    |v|                        |v - v^|

hi + mid + low is scale b_enc to 24 bits, margin what its rounding may lose. All norms are computed
ones, rounded up by 2^-6 (their own rounding, and that of the extra products) plus 2^-56 (squares
that underflow). Operands that are not finite give NaN or +inf, which rank first.
"""

import triton
import triton.language as tl

from ..common.launch import kernel
from ..common.offline import Case, with_odd_sizes
from ..select.order import NOTHING, kth_key, least_key, order_key, places
from ..select.row_topk import warps

PACK = {"ROWS": 4, "BLOCK": 512}
PACK_WARPS = 4
RESCORE = {"SLOTS": 16, "BLOCK": 128}
RESCORE_WARPS = 4

EXTRA = tl.constexpr(16)  # columns after the operand: the six above, and padding
UP = tl.constexpr(1 + 2.0**-6)
TINY = tl.constexpr(2.0**-56)


def packed_width(d: int) -> int:
    """Columns of a packed operand: d to a multiple of 16, and the bound."""
    return -(-d // 16) * 16 + EXTRA.value


# not d and body: where 16 divides them, a thread moves 16 bytes at a time, else one number
@kernel(do_not_specialize=["n"])
def _encode_pack_kernel(
    rows_ptr, shift_ptr, scale_ptr, bias_ptr, packed_ptr, extra_ptr, norms_ptr, n, d, body,
    stride_row, stride_col, stride_packed, stride_extra, stride_shift, stride_scale, stride_bias,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Packs rows of x (TOKENS) or of w_enc; norms_ptr gets |x^| or |v| in fp32.

    packed_ptr gets the rounded rows (None: not wanted), extra_ptr the columns of the bound.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < n
    source = rows_ptr + row[:, None] * stride_row
    factor = tl.full([ROWS], 1.0, tl.float32)
    if scale_ptr is not None:
        factor = tl.load(scale_ptr + row * stride_scale, mask=valid, other=0.0).to(tl.float32)
    lost = tl.zeros([ROWS, BLOCK], tl.float32)
    kept = tl.zeros([ROWS, BLOCK], tl.float32)
    whole = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, body, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = valid[:, None] & (column < d)[None, :]
        address = source + column[None, :].to(tl.int64) * stride_col
        x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        if shift_ptr is not None:
            shift = tl.load(shift_ptr + column * stride_shift, mask=column < d, other=0.0)
            x -= shift.to(tl.float32)[None, :]
        if scale_ptr is not None:
            x *= factor[:, None]
        near = x.to(tl.bfloat16)
        back = near.to(tl.float32)
        lost += (x - back) * (x - back)
        kept += back * back
        whole += x * x
        if packed_ptr is not None:
            address = packed_ptr + row[:, None] * stride_packed + column[None, :]
            tl.store(address, near, mask=valid[:, None] & (column < body)[None, :])
    lost_norm = tl.sqrt(tl.sum(lost, 1))
    kept_norm = tl.sqrt(tl.sum(kept, 1))
    whole_norm = tl.sqrt(tl.sum(whole, 1))
    rounding = (body + EXTRA) * 2.0**-23
    column = tl.arange(0, EXTRA)[None, :]
    extra = tl.zeros([ROWS, EXTRA], tl.float32)
    if TOKENS:
        extra = tl.where(column < 4, 1.0, extra)
        fourth = (lost_norm + rounding * kept_norm) * UP + TINY
        fifth = kept_norm * UP + TINY
        tl.store(norms_ptr + row, kept_norm, mask=valid)
    else:
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + row * stride_bias, mask=valid, other=0.0).to(tl.float32)
            bias *= factor
            high = bias.to(tl.bfloat16).to(tl.float32)
            middle = (bias - high).to(tl.bfloat16).to(tl.float32)
            margin = tl.abs(bias) * (2 * rounding + 2.0**-16) * UP
            extra = tl.where(column == 0, high[:, None], extra)
            extra = tl.where(column == 1, middle[:, None], extra)
            extra = tl.where(column == 2, (bias - high - middle)[:, None], extra)
            extra = tl.where(column == 3, margin[:, None], extra)
        fourth = whole_norm * UP + TINY
        # 2^-22 for the rounding of scale w itself
        fifth = (lost_norm + whole_norm * 2.0**-22) * UP + TINY
        # features beyond fp32 are NaN or inf in the product; they say nothing of the others
        norm = tl.where(whole_norm < float("inf"), whole_norm, 0.0)
        tl.store(norms_ptr + row, norm, mask=valid)
    extra = tl.where(column == 4, fourth[:, None], extra)
    extra = tl.where(column == 5, fifth[:, None], extra)
    address = extra_ptr + row[:, None] * stride_extra + column
    tl.store(address, extra.to(tl.bfloat16), mask=valid[:, None])


@triton.jit
def exact_scores(
    x_ptr, w_ptr, b_enc_ptr, b_dec_ptr, scale_ptr, feature, d,
    stride_xd, stride_wf, stride_wd, stride_be, stride_bd, stride_s,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(h, s) of one token and a block of features: dot products in fp64, rounded once to fp32."""
    sums = tl.zeros([feature.shape[0], BLOCK], tl.float64)
    rows = w_ptr + feature[:, None] * stride_wf
    for first in range(0, d, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < d
        x = tl.load(x_ptr + column.to(tl.int64) * stride_xd, mask=inside, other=0.0).to(tl.float32)
        if b_dec_ptr is not None:
            x -= tl.load(b_dec_ptr + column * stride_bd, mask=inside, other=0.0).to(tl.float32)
        address = rows + column[None, :].to(tl.int64) * stride_wd
        w = tl.load(address, mask=inside[None, :], other=0.0).to(tl.float32)
        sums += w.to(tl.float64) * x.to(tl.float64)[None, :]
    dot = tl.sum(sums, 1)
    if b_enc_ptr is not None:
        dot += tl.load(b_enc_ptr + feature * stride_be).to(tl.float64)
    h = dot.to(tl.float32)
    s = h
    if scale_ptr is not None:
        s = h * tl.load(scale_ptr + feature * stride_s).to(tl.float32)
    return h, s


@kernel(do_not_specialize=["c"])
def _encode_rescore_kernel(
    x_ptr, w_ptr, b_enc_ptr, b_dec_ptr, scale_ptr, candidates_ptr, h_ptr, s_ptr, d, c,
    stride_xn, stride_xd, stride_wf, stride_wd, stride_be, stride_bd, stride_s, stride_c,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Exact h and s of the candidates [n, c], by gathered rows of w_enc."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    inside = slot < c
    feature = tl.load(candidates_ptr + row * stride_c + slot, mask=inside, other=0).to(tl.int64)
    h, s = exact_scores(
        x_ptr + row * stride_xn, w_ptr, b_enc_ptr, b_dec_ptr, scale_ptr, feature, d,
        stride_xd, stride_wf, stride_wd, stride_be, stride_bd, stride_s, BLOCK,
    )  # fmt: skip
    tl.store(h_ptr + row * c + slot, h, mask=inside)
    tl.store(s_ptr + row * c + slot, s, mask=inside)


@triton.jit
def score_of(key):
    """The fp32 score of a key; +inf for NaN's."""
    negative = ~key | (-(2**31))
    bits = tl.where(key < 0, negative, tl.minimum(key, 0x7F800000))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def relu_of(h):
    # NaN stays, so that a diverged run shows it
    return tl.where(h <= 0, 0.0, h)


@kernel(do_not_specialize=["c", "k", "complete"])
def _encode_settle_kernel(
    s_ptr, h_ptr, bounds_ptr, candidates_ptr, left_out_ptr, norms_ptr, largest_ptr,
    values_ptr, indices_ptr, certain_ptr, c, k, complete, stride_c,
    RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Selects k of a token's c exact scores, and decides whether that is certainly the selection.

    It is when no feature outside the candidates can reach the k-th score: their upper bounds are at
    most the least bound of the candidates (or left_out, where given), before it was rounded.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK)
    inside = slot < c
    s = tl.load(s_ptr + row * c + slot, mask=inside, other=0.0)
    keys = tl.where(inside, order_key(s, 0), NOTHING)
    kth = kth_key(keys, k, least_key(keys), 0)
    ties = k - tl.sum((keys > kth).to(tl.int32))
    taken, place = places(keys, kth, ties, 0, 0)
    h = tl.load(h_ptr + row * c + slot, mask=inside, other=0.0)
    feature = tl.load(candidates_ptr + row * stride_c + slot, mask=inside, other=0)
    if RELU:
        h = relu_of(h)
    tl.store(values_ptr + row * k + place, h, mask=taken)
    tl.store(indices_ptr + row * k + place, feature, mask=taken)
    bound = tl.load(bounds_ptr + row * stride_c + slot, mask=inside, other=0.0).to(tl.float32)
    least = tl.min(tl.where(inside, order_key(bound, 0), 0x7FFFFFFF))
    if left_out_ptr is not None:
        least = tl.maximum(least, order_key(tl.load(left_out_ptr + row), 0))
    edge = score_of(least)
    # bf16's rounding of the bound (2^-9), fp32's of the scores, underflow anywhere
    edge += tl.abs(edge) * 2.0**-7 + 2.0**-100
    # the sums in the screen did not overflow on the way to a finite result
    size = tl.load(norms_ptr + row) * tl.load(largest_ptr)
    certain = (edge < score_of(kth)) & (edge < float("inf")) & (size < 2.0**120)
    tl.store(certain_ptr + row, (certain | (complete != 0)).to(tl.int32))


def cases() -> list[Case]:
    found = []
    strides = {"stride_row": "i32", "stride_packed": "i32", "stride_extra": "i32"}
    for name in ("fp32", "bf16", "fp16"):
        sides = {
            "x": ({"shift_ptr": f"*{name}"}, {"scale_ptr": None, "bias_ptr": None}),
            "w": ({"scale_ptr": f"*{name}", "bias_ptr": f"*{name}"}, {"shift_ptr": None}),
        }
        ones = dict.fromkeys(("stride_col", "stride_shift", "stride_scale", "stride_bias"), 1)
        for side, (pointers, absent) in sides.items():
            found.append(
                Case(
                    f"pack {side} {name}",
                    _encode_pack_kernel,
                    {"rows_ptr": f"*{name}", "packed_ptr": "*bf16", "extra_ptr": "*bf16"}
                    | {"norms_ptr": "*fp32", "n": "i32", "d": "i32", "body": "i32"}
                    | strides
                    | pointers,
                    ones | absent | {"TOKENS": side == "x"} | PACK,
                    num_warps=PACK_WARPS,
                    divisible=("stride_row", "stride_packed", "stride_extra", "d", "body"),
                )
            )
        operands = dict.fromkeys(("x_ptr", "w_ptr", "b_enc_ptr", "b_dec_ptr"), f"*{name}")
        ones = dict.fromkeys(("stride_xd", "stride_wd", "stride_be", "stride_bd", "stride_s"), 1)
        found.append(
            Case(
                f"rescore {name}",
                _encode_rescore_kernel,
                operands
                | {"candidates_ptr": "*i32", "h_ptr": "*fp32", "s_ptr": "*fp32"}
                | dict.fromkeys(("d", "c", "stride_xn", "stride_wf", "stride_c"), "i32"),
                ones | {"scale_ptr": None} | RESCORE,
                num_warps=RESCORE_WARPS,
                divisible=("stride_xn", "stride_wf", "d"),
            )
        )
        for block in (64, 512, 4096):
            found.append(
                Case(
                    f"settle {name} {block}",
                    _encode_settle_kernel,
                    {"s_ptr": "*fp32", "h_ptr": "*fp32", "bounds_ptr": "*bf16"}
                    | {"candidates_ptr": "*i32", "left_out_ptr": "*fp32", "norms_ptr": "*fp32"}
                    | {"largest_ptr": "*fp32", "values_ptr": f"*{name}", "indices_ptr": "*i64"}
                    | {"certain_ptr": "*i32"}
                    | dict.fromkeys(("c", "k", "complete", "stride_c"), "i32"),
                    {"RELU": True, "BLOCK": block},
                    num_warps=warps(block),
                )
            )
    return with_odd_sizes(found)
