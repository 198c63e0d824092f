# SPDX-License-Identifier: Apache-2.0
"""Device code of pairwise_topk's screen: packed rows, their product, maxima of upper bounds.

Rows are packed as fp16 numbers times a power of two, x = 2^e (x^ + rest), which puts the largest of
a row in 2^14..2^15 whatever the magnitude of x, and keeps 11 bits: with the 8 of bf16, bounds would
be 8 times as wide. No packed number is denormal: those below 2^-14 are 0, and lost. Then

    |<x, y> - <x^, y^>| <= |x - x^| |y| + |x^| |y - y^| + c |x^| |y^|        (Cauchy-Schwarz)
                        <= |x^| |y^| (r + r' + r r' + c)        r >= |x - x^| / |x^| of every row

where c = K 2^-23 covers the fp32 sum of K products in any order, and (C + K / C) 2^-23 that of
chunks of C added up. Nothing is assumed: norms are computed, and rounded up (`pairwise_screen`).
"""

import triton
import triton.language as tl

from ..common.launch import kernel
from ..common.offline import TARGETS, Case, with_odd_sizes
from ..common.products import DEEP, product_case, tile_at
from ..select.order import NOTHING, order_key
from .pairwise_exact import GROUP

# the bounds of a 128 x 256 tile spill; Ampere and CDNA hold less in shared memory
LARGE = {"BLOCK_N": 128, "BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
SMALL = {"BLOCK_N": 128, "BLOCK_M": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
MAXIMA = {"ROWS": 16, "BLOCK_N": 128, "BLOCK_M": 128, "num_warps": 4}
PACK = {"ROWS": 4, "BLOCK": 512, "num_warps": 4}
# packed rows are a multiple of this, so that no tile needs a mask along them
PADDING = tl.constexpr(64)
# norms by fp32 sums of squares, in fp64 from chunk to chunk, and squares that underflow (|x^| is at
# least 2^14)
UP, TINY = 1 + 2.0**-6, 2.0**-40


# not what decides how wide a load can be
@kernel(do_not_specialize=["n", "segments", "positions", "segment_begin", "segment_end"])
def _pairwise_pack_kernel(
    x_ptr, packed_ptr, exponent_ptr, squares_ptr, n, segments, positions, d,
    segment_begin, segment_end, low, part, x_s, x_p, x_n, x_d, stride_packed,
    FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Packs `part` columns, from `low` on, of some of the segments (s, p) of every row.

    squares_ptr gets |x - x^|^2 and |x^|^2. FIRST: the exponents of rows are found, in all of x.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < n
    rows = x_ptr + row[:, None] * x_n
    if FIRST:
        largest = tl.zeros([ROWS, BLOCK], tl.int32)
        for segment in range(0, segments):
            s = tl.cast(segment // positions, tl.int64)
            p = tl.cast(segment % positions, tl.int64)
            for first in range(0, d, BLOCK):
                column = first + tl.arange(0, BLOCK)
                address = rows + (s * x_s + p * x_p) + column[None, :].to(tl.int64) * x_d
                x = tl.load(address, mask=valid[:, None] & (column < d)[None, :], other=0.0)
                bits = x.to(tl.float32).to(tl.int32, bitcast=True)
                largest = tl.maximum(largest, bits & 0x7FFFFFFF)
        top = tl.max(largest, 1)
        # as an integer, a denormal number has an exponent like all others
        small = (top.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - (127 + 149)
        exponent = tl.where(top < 0x800000, tl.maximum(small, -149), (top >> 23) - 127) - 14
        tl.store(exponent_ptr + row, exponent, mask=valid)
    else:
        exponent = tl.load(exponent_ptr + row, mask=valid, other=0)
    # 2^-e in two factors, of which none is beyond fp32
    half = (-exponent) >> 1
    factor = ((half + 127) << 23).to(tl.float32, bitcast=True)
    other = ((-exponent - half + 127) << 23).to(tl.float32, bitcast=True)
    lost = tl.zeros([ROWS, BLOCK], tl.float32)
    kept = tl.zeros([ROWS, BLOCK], tl.float32)
    to = packed_ptr + row[:, None] * stride_packed
    for segment in range(segment_begin, segment_end):
        s = tl.cast(segment // positions, tl.int64)
        p = tl.cast(segment % positions, tl.int64)
        for first in range(0, part, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = valid[:, None] & (column < part)[None, :]
            address = rows + (s * x_s + p * x_p) + (low + column[None, :]).to(tl.int64) * x_d
            x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
            x = x * factor[:, None] * other[:, None]
            near = tl.where(tl.abs(x) < 2.0**-14, 0.0, x).to(tl.float16)
            back = near.to(tl.float32)
            lost += (x - back) * (x - back)
            kept += back * back
            tl.store(to + (segment - segment_begin) * part + column[None, :], near, mask=inside)
    used = (segment_end - segment_begin) * part
    column = used + tl.arange(0, PADDING)
    inside = valid[:, None] & (column < stride_packed)[None, :]
    tl.store(to + column[None, :], tl.zeros([ROWS, PADDING], tl.float16), mask=inside)
    tl.store(squares_ptr + row * 2, tl.sum(lost, 1), mask=valid)
    tl.store(squares_ptr + row * 2 + 1, tl.sum(kept, 1), mask=valid)


@triton.jit
def _store_maxima(
    dot, row, first_col, a_terms_ptr, b_terms_ptr, unit_ptr, row_rank_ptr, col_rank_ptr,
    maxima_ptr, n, m, stride_maxima, ABS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Keys of the largest upper bound of every group of columns; NOTHING if no pair is allowed."""
    ROWS: tl.constexpr = dot.shape[0]
    COLS: tl.constexpr = dot.shape[1]
    col = first_col + tl.arange(0, COLS)
    inside = (row < n)[:, None] & (col < m)[None, :]
    a_terms = a_terms_ptr + tl.minimum(row, n - 1)[:, None] * 2
    b_terms = b_terms_ptr + tl.minimum(col, m - 1)[None, :] * 2
    score = dot * tl.load(a_terms) * tl.load(b_terms)
    if ABS:
        score = tl.abs(score)
    # 2^-20 for the rounding of all this
    bound = score + tl.abs(score) * 2.0**-20 + tl.load(a_terms + 1) * tl.load(b_terms + 1)
    # what may be anything comes first, as NaN does
    bound = tl.where(bound == bound, bound, float("inf"))
    if row_rank_ptr is not None:
        rank = tl.load(row_rank_ptr + row, mask=row < n, other=0)
        other = tl.load(col_rank_ptr + col, mask=col < m, other=0)
        inside = inside & (rank[:, None] < other[None, :])
    bound = tl.where(inside, bound, float("-inf"))
    largest = tl.max(tl.reshape(bound, [ROWS, COLS // GROUP, GROUP]), 2)
    absolute = largest * tl.load(unit_ptr) * tl.load(unit_ptr + 1)
    key = order_key(tl.maximum(absolute, -3.0e38), 0)
    key = tl.where(absolute < float("inf"), key, 0x7FFFFFFF)
    key = tl.where(largest == float("-inf"), NOTHING, key)
    group = first_col // GROUP + tl.arange(0, COLS // GROUP)
    to = maxima_ptr + row.to(tl.int64)[:, None] * stride_maxima + group[None, :]
    tl.store(to, key, mask=(row < n)[:, None] & (group * GROUP < m)[None, :])


@kernel(do_not_specialize=["n", "m", "stride_maxima"])
def _pairwise_product_kernel(
    a_ptr, b_ptr, a_terms_ptr, b_terms_ptr, unit_ptr, row_rank_ptr, col_rank_ptr, sums_ptr,
    maxima_ptr, n, m, width, stride_maxima,
    ABS: tl.constexpr, FIRST: tl.constexpr, WHOLE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Maxima where rows are packed WHOLE; where in chunks, their products add up in sums_ptr."""
    tile_n, tile_m = tile_at(tl.program_id(0), tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M))
    row = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    end = width
    if row_rank_ptr is not None:
        # a tile of which no pair is allowed has nothing to add up
        rank = tl.load(row_rank_ptr + tl.minimum(row, n - 1))
        other = tl.load(col_rank_ptr + tl.minimum(col, m - 1))
        end = tl.where(tl.min(rank) < tl.max(other), width, 0)
    # rows and columns beyond the last repeat it
    a_rows = a_ptr + tl.minimum(row, n - 1).to(tl.int64)[:, None] * width
    b_rows = b_ptr + tl.minimum(col, m - 1).to(tl.int64)[None, :] * width
    dot = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in range(0, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        dot = tl.dot(tl.load(a_rows + k[None, :]), tl.load(b_rows + k[:, None]), dot)
    if WHOLE:
        _store_maxima(
            dot, row, tile_m * BLOCK_M, a_terms_ptr, b_terms_ptr, unit_ptr, row_rank_ptr,
            col_rank_ptr, maxima_ptr, n, m, stride_maxima, ABS, GROUP,
        )  # fmt: skip
    else:
        # tile by tile: at constant distances and without masks, addresses take no registers
        tile = (tile_n * tl.cdiv(m, BLOCK_M) + tile_m).to(tl.int64) * (BLOCK_N * BLOCK_M)
        inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        if not FIRST:
            dot += tl.load(sums_ptr + tile + inner)
        tl.store(sums_ptr + tile + inner, dot)


@kernel(do_not_specialize=["n", "m", "stride_maxima"])
def _pairwise_maxima_kernel(
    sums_ptr, a_terms_ptr, b_terms_ptr, unit_ptr, row_rank_ptr, col_rank_ptr, maxima_ptr,
    n, m, stride_maxima,
    ABS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The maxima of products that are complete."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = (row // BLOCK_N * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    place = tile * (BLOCK_N * BLOCK_M) + row % BLOCK_N * BLOCK_M
    dot = tl.load(sums_ptr + place[:, None] + tl.arange(0, BLOCK_M)[None, :])
    _store_maxima(
        dot, row, tl.program_id(1) * BLOCK_M, a_terms_ptr, b_terms_ptr, unit_ptr, row_rank_ptr,
        col_rank_ptr, maxima_ptr, n, m, stride_maxima, ABS, GROUP,
    )  # fmt: skip


def cases() -> list[Case]:
    strides = ("x_s", "x_p", "x_n")
    sizes = ("n", "segments", "positions", "segment_begin", "segment_end", "low", "part", "d")
    types = dict.fromkeys((*sizes, *strides, "stride_packed"), "i32")
    types |= {"packed_ptr": "*fp16", "exponent_ptr": "*i32", "squares_ptr": "*fp32"}
    found = [
        Case(
            f"pack {name}{' first' if first else ''}",
            _pairwise_pack_kernel,
            types | {"x_ptr": f"*{name}"},
            {"x_d": 1, "FIRST": first, "ROWS": PACK["ROWS"], "BLOCK": PACK["BLOCK"]},
            num_warps=PACK["num_warps"],
            divisible=("d", "low", "part", "stride_packed", *strides),
        )
        for name, first in (("fp32", True), ("fp32", False), ("bf16", True), ("fp16", True))
    ]
    return with_odd_sizes(found) + _product_cases()


def _product_cases() -> list[Case]:
    types = dict.fromkeys(("n", "m", "width", "stride_maxima"), "i32")
    types |= dict.fromkeys(("a_ptr", "b_ptr"), "*fp16") | {"maxima_ptr": "*i32"}
    types |= dict.fromkeys(("a_terms_ptr", "b_terms_ptr", "unit_ptr", "sums_ptr"), "*fp32")
    ranks = dict.fromkeys(("row_rank_ptr", "col_rank_ptr"), "*i64")
    found = []
    for title, magnitude, first, whole, absent in (
        ("abs", True, True, True, (*ranks, "sums_ptr")),
        ("value, ranks", False, True, True, ("sums_ptr",)),
        ("sums, ranks", True, False, False, ("a_terms_ptr", "b_terms_ptr", "unit_ptr")),
    ):
        given = {name: t for name, t in (types | ranks).items() if name not in absent}
        constants = {"ABS": magnitude, "FIRST": first, "WHOLE": whole, "GROUP": GROUP}
        for tile, targets in ((LARGE, DEEP), (SMALL, [t for t in TARGETS if t not in DEEP])):
            found += product_case(
                f"product {title}, {tile['BLOCK_K']} deep",
                _pairwise_product_kernel,
                given,
                constants | dict.fromkeys(absent),
                lambda deep, tile=tile: dict(tile),
                False,
                divisible=("width",),
                targets=tuple(targets),
            )
    typed = {name: types[name] for name in types if name not in ("a_ptr", "b_ptr", "width")}
    blocks = {name: size for name, size in MAXIMA.items() if name != "num_warps"}
    for magnitude in (True, False):
        constants = {"ABS": magnitude, "GROUP": GROUP} | blocks
        title = f"maxima {'abs' if magnitude else 'value'}"
        found.append(Case(title, _pairwise_maxima_kernel, typed | ranks, constants))
    return found
