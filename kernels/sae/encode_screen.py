# SPDX-License-Identifier: Apache-2.0
"""Device code of encode's screen: operands whose fp16 product is an upper bound of every score.

The ranking scores are s = scale (<x - b_dec, w> + b_enc). A token's row is multiplied by 2^a and
v = scale w by 2^b: `a` of its own for every token, one `b` for all weights, so that the bounds of a
token have one unit. With X = 2^a (x - b_dec), V = 2^b v, and X^, V^ their fp16 roundings,

    |<X, V> - <X^, V^>| <= |X - X^| |V| + |X^| |V - V^|            (1, Cauchy-Schwarz)

with *computed* norms of what was lost, and the fp32 sum of K products, in any order and with a
truncating adder, errs by at most K 2^-23 |X^| |V^| where |V^| <= |V| + |V - V^|. The bound has rank
2, so it rides along as columns of the product, in front of what is zero padding anyway:

    X^ | o     o     o     o         2^8 (|X - X^| + K 2^-23 |X^|)    2^-5 (1 + K 2^-23) |X^|
    V^ | hi    mid   low   margin    2^-8 |V|                         2^5 |V - V^|

hi + mid + low is B = 2^q scale b_enc to 33 bits, o = 2^(a + b - q), and margin covers what the sums
and the three parts may lose of B. Norms are rounded up by UP (their own rounding, and that of the
extra products) and TINY: fp16 numbers below 2^-14 are stored as 0, so that no unit needs denormals.

Ranges. b and q follow from the largest |v| element of a sample of rows and the largest |scale
b_enc|: |V| <= 2^7 in the sample, |B| < 2^4. a is the largest with |X| <= 2^6 (by the largest
element) and o <= 2^8. A weight row with |V| > 2^12, or one that is not finite, has bound +inf or
NaN and passes by construction, and so does a bound above fp16's 65504; -inf stands for any below
-65504. Where o would be below 2^-14 it is 0, and 2^-11 of the unit lost with it. SLACK and RELATIVE
are for that and for what happens to a bound on the way to its comparison: fp16's rounding (2^-11,
and 2^-14 below its normal numbers), fp32's of h and s (2^-23 each, and 2^-150 scale where they are
denormal: `LOST`).
"""

import triton
import triton.language as tl

from ..common.launch import kernel
from ..common.offline import Case, with_odd_sizes

# 1,024 rows, evenly spread, tell the unit of the weights: 9 MB of 1.2 GB at G2
SURVEY = {"ROWS": 16, "BLOCK": 256, "BIASES": 1024}
SURVEY_WARPS = 4
PACK = {"ROWS": 4, "BLOCK": 512}
PACK_WARPS = 4

SURVEYORS = tl.constexpr(64)  # programs of the survey
EXTRA = tl.constexpr(16)  # columns after the operand: the six above, and padding
TINY = tl.constexpr(2.0**-14)
SLACK = tl.constexpr(2.0**-10)
RELATIVE = tl.constexpr(2.0**-10)

# in place of a token's exponent a + b: all its scores are known without a product, or its bounds
# say nothing because scores are denormal in fp32 at their unit
ZERO, NAN, LOST = tl.constexpr(1000), tl.constexpr(1001), tl.constexpr(1002)


def packed_width(d: int) -> int:
    """Columns of a packed operand: d to a multiple of 16, and the bound."""
    return -(-d // 16) * 16 + EXTRA.value


def root_exponent(d: int) -> int:
    """The least r with sqrt(d) <= 2^r."""
    return ((d - 1).bit_length() + 1) // 2


@triton.jit
def power(n):
    """2^n for -127 < n < 128."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def bounded(n):
    return tl.minimum(tl.maximum(n, -126), 126)


@triton.jit
def magnitude(x):
    """The bits of |x|, which order as magnitudes do, NaN above inf."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def finite(bits):
    return tl.where(bits < 0x7F800000, bits, 0)


@triton.jit
def exponent(bits):
    """floor(log2 |x|), -127 for denormal numbers and 0."""
    return (bits >> 23) - 127


@triton.jit
def _largest(survey_ptr, row: tl.constexpr):
    return tl.max(tl.load(survey_ptr + row * SURVEYORS + tl.arange(0, SURVEYORS)))


@triton.jit
def units(survey_ptr, root):
    """(b, q, the most that a may be): see above."""
    weight = _largest(survey_ptr, 0)
    bias = _largest(survey_ptr, 1)
    b = tl.where(weight > 0, bounded(6 - exponent(weight) - root), 0)
    q = tl.where(bias > 0, bounded(3 - exponent(bias)), 0)
    return b, q, tl.where(bias > 0, 8 + q - b, 126)


@triton.jit
def scaled(score, e):
    """A score in the unit of the screen; what overflowed in fp32 counts as its largest number."""
    half = e >> 1
    score = tl.minimum(score, 3.4028234663852886e38) * power(half) * power(e - half)
    return tl.where(e == LOST, float("-inf"), score)


@kernel(do_not_specialize=["f"])
def _encode_survey_kernel(
    rows_ptr, scale_ptr, bias_ptr, survey_ptr, f, d,
    stride_row, stride_col, stride_scale, stride_bias,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """Largest finite |scale w| of a sample, |scale b_enc| and |scale|, of each program, as bits."""
    program = tl.program_id(0)
    number = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row = number * f // (SURVEYORS * ROWS)
    top = tl.zeros([ROWS, BLOCK], tl.int32)
    scale = tl.full([ROWS], 1.0, tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + row * stride_scale).to(tl.float32)
    for first in range(0, d, BLOCK):
        column = first + tl.arange(0, BLOCK)
        address = rows_ptr + row[:, None] * stride_row
        address += column[None, :].to(tl.int64) * stride_col
        w = tl.load(address, mask=(column < d)[None, :], other=0.0).to(tl.float32)
        top = tl.maximum(top, finite(magnitude(w * scale[:, None])))
    tl.store(survey_ptr + program, tl.max(tl.reshape(top, [ROWS * BLOCK])))
    biases = tl.zeros([BIASES], tl.int32)
    scales = tl.full([BIASES], 0x3F800000, tl.int32)
    if scale_ptr is not None or bias_ptr is not None:
        for first in range(program * BIASES, f, SURVEYORS * BIASES):
            feature = first + tl.arange(0, BIASES)
            factor = tl.full([BIASES], 1.0, tl.float32)
            if scale_ptr is not None:
                address = scale_ptr + feature * stride_scale
                factor = tl.load(address, mask=feature < f, other=0.0).to(tl.float32)
                scales = tl.maximum(scales, finite(magnitude(factor)))
            if bias_ptr is not None:
                address = bias_ptr + feature * stride_bias
                bias = tl.load(address, mask=feature < f, other=0.0).to(tl.float32)
                biases = tl.maximum(biases, finite(magnitude(bias * factor)))
    tl.store(survey_ptr + SURVEYORS + program, tl.max(biases))
    tl.store(survey_ptr + 2 * SURVEYORS + program, tl.max(scales))


@triton.jit
def _rounded(x):
    """fp16, denormal numbers as 0: units that flush them compute the same."""
    return tl.where(tl.abs(x) < 2.0**-14, 0.0, x).to(tl.float16)


@triton.jit
def _norm(squares):
    return tl.sqrt(tl.sum(squares, 1))


# not d and body: where 16 divides them, a thread moves 16 bytes at a time, else one number
@kernel(do_not_specialize=["n", "root"])
def _encode_pack_x_kernel(
    rows_ptr, shift_ptr, survey_ptr, packed_ptr, exponents_ptr, n, d, body, root,
    stride_row, stride_col, stride_packed, stride_shift,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Packs tokens; exponents_ptr gets a + b, or what is known of the token without it."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < n
    source = rows_ptr + row[:, None] * stride_row
    top = tl.zeros([ROWS, BLOCK], tl.int32)
    for first in range(0, body, BLOCK):
        column = first + tl.arange(0, BLOCK)
        address = source + column[None, :].to(tl.int64) * stride_col
        x = tl.load(address, mask=valid[:, None] & (column < d)[None, :], other=0.0).to(tl.float32)
        if shift_ptr is not None:
            shift = tl.load(shift_ptr + column * stride_shift, mask=column < d, other=0.0)
            x -= shift.to(tl.float32)[None, :]
        top = tl.maximum(top, tl.where((column < d)[None, :], magnitude(x), 0))
    top = tl.max(top, 1)
    b, q, most = units(survey_ptr, root)
    a = tl.where(top > 0, 5 - exponent(top) - root, 126)
    a = bounded(tl.minimum(a, most))
    lost = tl.zeros([ROWS, BLOCK], tl.float32)
    kept = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, body, BLOCK):
        column = first + tl.arange(0, BLOCK)
        address = source + column[None, :].to(tl.int64) * stride_col
        x = tl.load(address, mask=valid[:, None] & (column < d)[None, :], other=0.0).to(tl.float32)
        if shift_ptr is not None:
            shift = tl.load(shift_ptr + column * stride_shift, mask=column < d, other=0.0)
            x -= shift.to(tl.float32)[None, :]
        x = x * power(a)[:, None]
        near = _rounded(x)
        back = near.to(tl.float32)
        lost += (x - back) * (x - back)
        kept += back * back
        address = packed_ptr + row[:, None] * stride_packed + column[None, :]
        tl.store(address, near, mask=valid[:, None] & (column < body)[None, :])
    rounding = (body + EXTRA) * 2.0**-23
    up = 1 + 2.0**-6 + 4 * rounding
    kept_norm = _norm(kept)
    one = a + b - q
    one = tl.where(one < -14, 0.0, power(bounded(one)))
    one = tl.where(_largest(survey_ptr, 1) > 0, one, 1.0)
    column = tl.arange(0, EXTRA)[None, :]
    extra = tl.where(column < 4, one[:, None], 0.0)
    fourth = (_norm(lost) + rounding * kept_norm) * (256 * up) + TINY
    extra = tl.where(column == 4, fourth[:, None], extra)
    fifth = (1 + rounding) * kept_norm * (up / 32) + TINY
    extra = tl.where(column == 5, fifth[:, None], extra)
    address = packed_ptr + row[:, None] * stride_packed + body + column
    tl.store(address, extra.to(tl.float16), mask=valid[:, None])
    # scores that are denormal in fp32 are rounded by up to 2^-150 scale: below SLACK in their unit
    e = tl.where(a + b + exponent(_largest(survey_ptr, 2)) <= 130, a + b, LOST)
    e = tl.where(top == 0, ZERO, e)
    e = tl.where(top > 0x7F800000, NAN, e)
    tl.store(exponents_ptr + row, e, mask=valid)


@kernel(do_not_specialize=["n", "root"])
def _encode_pack_w_kernel(
    rows_ptr, scale_ptr, bias_ptr, survey_ptr, count_ptr, packed_ptr, n, d, body, root,
    stride_row, stride_col, stride_packed, stride_scale, stride_bias,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Packs rows of w_enc; nothing where count_ptr (None: always) holds 0."""
    wanted = True
    if count_ptr is not None:
        wanted = tl.load(count_ptr) > 0
    if wanted:
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        valid = row < n
        source = rows_ptr + row[:, None] * stride_row
        b, q, _ = units(survey_ptr, root)
        scale = tl.full([ROWS], 1.0, tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + row * stride_scale, mask=valid, other=0.0).to(tl.float32)
        factor = scale * power(b)
        lost = tl.zeros([ROWS, BLOCK], tl.float32)
        whole = tl.zeros([ROWS, BLOCK], tl.float32)
        for first in range(0, body, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = valid[:, None] & (column < d)[None, :]
            address = source + column[None, :].to(tl.int64) * stride_col
            x = tl.load(address, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
            near = _rounded(x)
            back = near.to(tl.float32)
            lost += (x - back) * (x - back)
            whole += x * x
            address = packed_ptr + row[:, None] * stride_packed + column[None, :]
            tl.store(address, near, mask=valid[:, None] & (column < body)[None, :])
        rounding = (body + EXTRA) * 2.0**-23
        up = 1 + 2.0**-6 + 4 * rounding
        norm = _norm(whole)
        column = tl.arange(0, EXTRA)[None, :]
        extra = tl.zeros([ROWS, EXTRA], tl.float32)
        if bias_ptr is not None:
            given = tl.load(bias_ptr + row * stride_bias, mask=valid, other=0.0).to(tl.float32)
            unit = scale * power(q)
            bias = given * unit
            high = _rounded(bias).to(tl.float32)
            middle = _rounded(bias - high).to(tl.float32)
            low = bias - high - middle
            margin = tl.abs(bias) * (2 * rounding + 2.0**-16) * up + 4 * TINY
            # a feature that is switched off by a bias of -inf is no candidate, however few are left
            off = (given == float("-inf")) & (unit > 0) & (unit < float("inf"))
            extra = tl.where(column == 0, high[:, None], extra)
            extra = tl.where(column == 1, tl.where(off, 0.0, middle)[:, None], extra)
            extra = tl.where(column == 2, tl.where(off, 0.0, low)[:, None], extra)
            extra = tl.where(column == 3, tl.where(off, 0.0, margin)[:, None], extra)
        fourth = tl.where(norm <= 4096, norm * (up / 256) + TINY, float("inf"))
        extra = tl.where(column == 4, fourth[:, None], extra)
        # 2^-22 for the rounding of scale w itself
        fifth = (_norm(lost) + norm * 2.0**-22) * (32 * up) + TINY
        extra = tl.where(column == 5, fifth[:, None], extra)
        address = packed_ptr + row[:, None] * stride_packed + body + column
        tl.store(address, extra.to(tl.float16), mask=valid[:, None])


def cases() -> list[Case]:
    found = []
    aligned = ("stride_row", "stride_packed", "d", "body")
    for name in ("fp32", "bf16", "fp16"):
        rows = {"rows_ptr": f"*{name}", "survey_ptr": "*i32", "stride_row": "i32", "d": "i32"}
        packed = {"packed_ptr": "*fp16", "stride_packed": "i32"}
        packed |= dict.fromkeys(("n", "body", "root"), "i32")
        scales = {"scale_ptr": f"*{name}", "bias_ptr": f"*{name}"}
        ones = dict.fromkeys(("stride_col", "stride_scale", "stride_bias"), 1)
        found += [
            Case(
                f"survey {name}",
                _encode_survey_kernel,
                rows | scales | {"f": "i32"},
                ones | SURVEY,
                num_warps=SURVEY_WARPS,
                divisible=("stride_row", "d"),
            ),
            Case(
                f"pack x {name}",
                _encode_pack_x_kernel,
                rows | packed | {"shift_ptr": f"*{name}", "exponents_ptr": "*i32"},
                {"stride_col": 1, "stride_shift": 1} | PACK,
                num_warps=PACK_WARPS,
                divisible=aligned,
            ),
            Case(
                f"pack w {name}",
                _encode_pack_w_kernel,
                rows | packed | scales | {"count_ptr": "*i32"},
                ones | PACK,
                num_warps=PACK_WARPS,
                divisible=aligned,
            ),
        ]
    return with_odd_sizes(found)
