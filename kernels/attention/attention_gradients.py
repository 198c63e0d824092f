# SPDX-License-Identifier: Apache-2.0
"""attention_gradients: see mikernels/ops/attention/attention_gradients.py.

Three kernels, each of which makes the scores and dP anew, a tile at a time, so that no T x S matrix
is in memory. A block of queries meets its keys twice: first for the largest score, the sums of
exponentials and the means `sum_j P dP` at both temperatures, and for P v; then, with these numbers
of each query, for dq and the squared sums. A block of keys meets the queries of all heads that
share it, in order, for dk and dv: no atomics, and the same call gives the same bits.

Rows of 16-bit numbers are loaded whole: P and dS are rounded to their dtype for the matrix unit, as
in eager torch; everything else is fp32. Rows of fp32, rows wider than 256 (128 before Hopper), and
those of which 16 bytes cannot be read at a time are multiplied COLUMNS at a time, and a program
makes 64 or 128 columns of a result: registers hold no more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common.launch import ceil_div, kernel, power_of_two
from ..common.offline import Case
from ..common.products import DEEP, WIDEN, columns, dot, is_deep, is_even, multiply

INF, LOG2E = tl.constexpr(float("inf")), tl.constexpr(1.4426950408889634)
# rows of numbers a query: largest score; of both temperatures 1 / sum of exponentials and mean of
# dP; from FAR on, of each part of the values' columns, how far P v is from out
FAR = tl.constexpr(5)
WIDEST, PART = 256, 64


@triton.jit
def _load(ptr, first, row, row_stride, rows, column, column_stride, width):
    """[row, column] of the rows from `first` on; 0 outside."""
    # one address and offsets within the tile, which loops leave as they are
    ptr += tl.cast(first, tl.int64) * row_stride
    at = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    return tl.load(
        ptr + at, mask=(row < rows - first)[:, None] & (column < width)[None, :], other=0.0
    )


@triton.jit
def _store(ptr, x, first, row, rows, column, width):
    """Into contiguous rows from `first` on."""
    ptr += tl.cast(first, tl.int64) * width
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    x = x.to(ptr.dtype.element_ty)
    tl.store(ptr + at, x, mask=(row < rows - first)[:, None] & (column < width)[None, :])


@triton.jit
def _products(
    x, x_ptr, x_first, i, x_n, x_d, n, y, y_ptr, y_first, j, y_m, y_d, m, width,
    WIDEN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Products of rows i and j: of x and y, or of what is loaded from x_ptr and y_ptr."""
    total = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    if COLUMNS == 0:
        total = dot(x, tl.trans(y), total, WIDEN)
    else:
        for first in range(0, width, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            part = _load(x_ptr, x_first, i, x_n, n, column, x_d, width)
            other = _load(y_ptr, y_first, j, y_m, m, column, y_d, width)
            total = multiply(part, tl.trans(other), total, WIDEN)
    return total


@triton.jit
def _add(x, y, total, WIDEN: tl.constexpr, COLUMNS: tl.constexpr):
    """total + x y; x is rounded to y's dtype, where rows are whole."""
    if COLUMNS == 0:
        total = dot(x.to(y.dtype), y, total, WIDEN)
    else:
        if y.dtype == tl.float16:
            # its range is not that of bf16 pieces
            y = y.to(tl.float32)
        total = multiply(x, y, total, WIDEN)
    return total


@triton.jit
def _tanh(x):
    """To 4 units of 2^-24, relatively: small scores keep their accuracy under a large cap."""
    z = x * x
    # (tanh(x) / x - 1) / x^2 to 2^-30 up to 0.55
    rest = -0.33333318 + z * (0.13332586 + z * (-0.05385231 + z * (0.02107167 - z * 0.00627422)))
    large = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.55, x + x * z * rest, tl.where(x < 0, -large, large))


@triton.jit
def _keys_of(i, queries, keys, window, CAUSAL: tl.constexpr):
    """The first key that query i may attend to by its place, and the one after the last."""
    last = tl.minimum(i + 1, keys) if CAUSAL else tl.zeros_like(i) + keys
    return i - window + 1, tl.where(i < queries, last, 0)


@triton.jit
def _queries_of(j, queries, keys, window, WINDOWED: tl.constexpr):
    """The first query that may attend to key j by its place, and the one after the last."""
    last = tl.minimum(j + window, queries) if WINDOWED else tl.zeros_like(j) + queries
    return j, tl.where(j < keys, last, 0)


@triton.jit
def _masked(
    scores, i, j, place, first, last, rows, columns, keep_ptr, keep_t, bias_ptr, bias_t,
    FROM: tl.constexpr,
):  # fmt: skip
    """Scores of queries i and keys j with their bias, -inf where not attended to; and where they
    are. All count from the tile's first; masks have rows and columns. `place` is the one of i and j
    that first (if FROM) and last are of."""
    inside = place < last
    if FROM:
        inside = inside & (place >= first)
    # not `inside`, which would have numbers loaded one by one
    there = (i < rows) & (j < columns)
    if keep_ptr is not None:
        at = keep_ptr + (i.to(tl.int64) * keep_t + j)
        inside = inside & (tl.load(at, mask=there, other=0) != 0)
    if bias_ptr is not None:
        at = bias_ptr + (i.to(tl.int64) * bias_t + j)
        added = tl.load(at, mask=there, other=0.0).to(tl.float32)
        inside = inside & (added != -INF)
        scores += added
    return tl.where(inside, scores, -INF), inside


@triton.jit
def _exponentials(x, rate, POWER: tl.constexpr):
    """exp(x) and exp(rate x), the first of which is the second to this power, unless it is 0."""
    # exp2 is one instruction, and flushes what is below 2^-126
    tempered = tl.exp2(x * (rate * LOG2E))
    plain = tl.exp2(x * LOG2E) if POWER == 0 else tempered if POWER == 1 else tempered * tempered
    return plain, tempered


@triton.jit
def _largest(x, most):
    """The larger of `most` and of a row's numbers, none negative; NaN is the largest of all."""
    bits = tl.max(x.to(tl.int32, bitcast=True), 1)
    return tl.maximum(bits, most.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _inverse(total):
    """1 / total; 0 where nothing was added."""
    return tl.where(total == 0, 0.0, tl.div_rn(1.0, total))


@kernel(do_not_specialize=["queries", "keys", "window", "total_rows"])
def _attention_sums_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, keep_ptr, bias_ptr, out_ptr, largest_ptr, rows_ptr, checks_ptr,
    heads, group, queries, keys, width, values, window, total_rows, scale, softcap, rate,
    grad_b, grad_h, grad_t, grad_d, q_b, q_h, q_t, q_d, k_b, k_g, k_s, k_d, v_b, v_g, v_s, v_d,
    keep_b, keep_h, keep_t, bias_b, bias_h, bias_t, columns,
    out_b, out_h, out_t, out_d,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, POWER: tl.constexpr,
    WIDEN: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """What the other kernels need of BLOCK_T queries of a head, the largest product, and P v
    beside out in the columns of program_id(1)."""
    blocks = tl.cdiv(queries, BLOCK_T)
    head = tl.program_id(0) // blocks
    # under causality the last ones have most keys: they begin first
    begin_t = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_T
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    g = (head % heads // group).to(tl.int64)
    grad_ptr += b * grad_b + h * grad_h
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + g * k_g
    v_ptr += b * v_b + g * v_g
    first_t = tl.cast(begin_t, tl.int64)
    if keep_ptr is not None:
        keep_ptr += b * keep_b + h * keep_h + first_t * keep_t
    if bias_ptr is not None:
        bias_ptr += b * bias_b + h * bias_h + first_t * bias_t
    i, j = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S)
    first, last = _keys_of(begin_t + i, queries, keys, window, CAUSAL)
    begin = 0
    end = tl.minimum(begin_t + BLOCK_T, keys) if CAUSAL else keys
    if WINDOWED:
        begin = tl.maximum(begin_t - window + 1, 0) // BLOCK_S * BLOCK_S
    out_ptr += b * out_b + h * out_h
    largest_ptr += (head // group).to(tl.int64) * values
    in_q, in_v = tl.arange(0, WIDTH), tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    q, grad = None, None
    if COLUMNS == 0:
        q = _load(q_ptr, begin_t, i, q_t, queries, in_q, q_d, width)
        grad = _load(grad_ptr, begin_t, i, grad_t, queries, in_v, grad_d, values)
    zero = tl.zeros([BLOCK_T], tl.float32)
    top = zero - INF
    plain_sum, sum_, plain_mean, mean, raw_most = zero, zero, zero, zero, zero
    made = tl.zeros([BLOCK_T, VALUES], tl.float32)
    for start in range(begin, end, BLOCK_S):
        k = None
        if COLUMNS == 0:
            k = _load(k_ptr, start, j, k_s, keys, in_q, k_d, width)
        v = _load(v_ptr, start, j, v_s, keys, in_v, v_d, values)
        raw = scale * _products(
            q, q_ptr, begin_t, i, q_t, q_d, queries, k, k_ptr, start, j, k_s, k_d, keys, width,
            WIDEN, COLUMNS,
        )  # fmt: skip
        dp = _products(
            grad, grad_ptr, begin_t, i, grad_t, grad_d, queries, v, v_ptr, start, j, v_s, v_d,
            keys, values, WIDEN, COLUMNS,
        )  # fmt: skip
        slope = _tanh(raw / softcap) if CAPPED else raw
        s = softcap * slope if CAPPED else raw
        keep_at, bias_at = keep_ptr, bias_ptr
        if keep_ptr is not None:
            keep_at = keep_ptr + start
        if bias_ptr is not None:
            bias_at = bias_ptr + start
        s, inside = _masked(
            s, i[:, None], j[None, :], j[None, :], (first - start)[:, None],
            (last - start)[:, None], queries - begin_t, columns - start, keep_at, keep_t, bias_at,
            bias_t, WINDOWED,
        )  # fmt: skip
        raw_most = _largest(tl.where(inside, tl.abs(raw), 0.0), raw_most)
        higher = tl.maximum(top, tl.max(s, 1))
        # -inf - -inf is NaN
        finite = tl.where(higher == -INF, 0.0, higher)
        plain, tempered = _exponentials(s - finite[:, None], rate, POWER)
        plain_less, less = _exponentials(top - finite, rate, POWER)
        made = _add(plain, v, made * plain_less[:, None], WIDEN, COLUMNS)
        plain_sum = plain_sum * plain_less + tl.sum(plain, 1)
        plain_mean = plain_mean * plain_less + tl.sum(plain * dp, 1)
        sum_ = sum_ * less + tl.sum(tempered, 1)
        mean = mean * less + tl.sum(tempered * dp, 1)
        top = higher
    plain_scale, scale_ = _inverse(plain_sum), _inverse(sum_)
    # of P v from out, relative to the largest |v| of the column
    made *= plain_scale[:, None]
    expected = _load(out_ptr, begin_t, i, out_t, queries, in_v, out_d, values).to(tl.float32)
    most = tl.load(largest_ptr + in_v, mask=in_v < values, other=1.0).to(tl.float32)
    # NaN without a sign
    apart = tl.abs((made - expected) * tl.div_rn(1.0, most)[None, :])
    far = _largest(tl.where(made != expected, apart, 0.0), zero)
    known = begin_t + i < queries
    row = head.to(tl.int64) * queries + begin_t + i
    rows_ptr += row
    total_rows = tl.cast(total_rows, tl.int64)
    tl.store(rows_ptr + (FAR + tl.program_id(1)) * total_rows, far, mask=known)
    if tl.program_id(1) == 0:
        tl.store(rows_ptr, tl.where(top == -INF, 0.0, top), mask=known)
        tl.store(rows_ptr + total_rows, plain_scale, mask=known)
        tl.store(rows_ptr + 2 * total_rows, scale_, mask=known)
        tl.store(rows_ptr + 3 * total_rows, plain_mean * plain_scale, mask=known)
        tl.store(rows_ptr + 4 * total_rows, mean * scale_, mask=known)
        tl.store(checks_ptr + row * 4 + 1, raw_most, mask=known)


@kernel(do_not_specialize=["queries", "keys", "window", "total_rows"])
def _attention_queries_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, keep_ptr, bias_ptr, rows_ptr, checks_ptr, dq_ptr,
    heads, group, queries, keys, width, values, window, total_rows, parts, scale, softcap, rate,
    grad_b, grad_h, grad_t, grad_d, q_b, q_h, q_t, q_d, k_b, k_g, k_s, k_d, v_b, v_g, v_s, v_d,
    keep_b, keep_h, keep_t, bias_b, bias_h, bias_t, columns,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, POWER: tl.constexpr,
    WIDEN: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_T queries of a head, in the columns of program_id(1), and their other checks."""
    blocks = tl.cdiv(queries, BLOCK_T)
    head = tl.program_id(0) // blocks
    # under causality the last ones have most keys: they begin first
    begin_t = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_T
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    g = (head % heads // group).to(tl.int64)
    grad_ptr += b * grad_b + h * grad_h
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + g * k_g
    v_ptr += b * v_b + g * v_g
    first_t = tl.cast(begin_t, tl.int64)
    if keep_ptr is not None:
        keep_ptr += b * keep_b + h * keep_h + first_t * keep_t
    if bias_ptr is not None:
        bias_ptr += b * bias_b + h * bias_h + first_t * bias_t
    i, j = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S)
    first, last = _keys_of(begin_t + i, queries, keys, window, CAUSAL)
    begin = 0
    end = tl.minimum(begin_t + BLOCK_T, keys) if CAUSAL else keys
    if WINDOWED:
        begin = tl.maximum(begin_t - window + 1, 0) // BLOCK_S * BLOCK_S
    in_q, in_v = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, VALUES)
    q, grad = None, None
    if COLUMNS == 0:
        q = _load(q_ptr, begin_t, i, q_t, queries, in_q, q_d, width)
        grad = _load(grad_ptr, begin_t, i, grad_t, queries, in_v, grad_d, values)
    known = begin_t + i < queries
    row = head.to(tl.int64) * queries + begin_t + i
    rows_ptr += row
    total_rows = tl.cast(total_rows, tl.int64)
    top = tl.load(rows_ptr, mask=known, other=0.0)
    plain_scale = tl.load(rows_ptr + total_rows, mask=known, other=0.0)
    scale_ = tl.load(rows_ptr + 2 * total_rows, mask=known, other=0.0)
    plain_mean = tl.load(rows_ptr + 3 * total_rows, mask=known, other=0.0)
    mean = tl.load(rows_ptr + 4 * total_rows, mask=known, other=0.0)
    changed, squares = tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    dq = tl.zeros([BLOCK_T, WIDTH], tl.float32)
    for start in range(begin, end, BLOCK_S):
        k = _load(k_ptr, start, j, k_s, keys, in_q, k_d, width)
        v = None
        if COLUMNS == 0:
            v = _load(v_ptr, start, j, v_s, keys, in_v, v_d, values)
        raw = scale * _products(
            q, q_ptr, begin_t, i, q_t, q_d, queries, k, k_ptr, start, j, k_s, k_d, keys, width,
            WIDEN, COLUMNS,
        )  # fmt: skip
        dp = _products(
            grad, grad_ptr, begin_t, i, grad_t, grad_d, queries, v, v_ptr, start, j, v_s, v_d,
            keys, values, WIDEN, COLUMNS,
        )  # fmt: skip
        slope = _tanh(raw / softcap) if CAPPED else raw
        s = softcap * slope if CAPPED else raw
        keep_at, bias_at = keep_ptr, bias_ptr
        if keep_ptr is not None:
            keep_at = keep_ptr + start
        if bias_ptr is not None:
            bias_at = bias_ptr + start
        s, inside = _masked(
            s, i[:, None], j[None, :], j[None, :], (first - start)[:, None],
            (last - start)[:, None], queries - begin_t, columns - start, keep_at, keep_t, bias_at,
            bias_t, WINDOWED,
        )  # fmt: skip
        plain, tempered = _exponentials(s - top[:, None], rate, POWER)
        ds = tempered * scale_[:, None] * (dp - mean[:, None])
        plain = plain * plain_scale[:, None] * (dp - plain_mean[:, None])
        squares += tl.sum(plain * plain, 1)
        if POWER != 1:
            changed += tl.sum((ds - plain) * (ds - plain), 1)
        if CAPPED:
            ds *= 1 - slope * slope
        dq = _add(ds, k, dq, WIDEN, COLUMNS)
    _store(
        dq_ptr + head.to(tl.int64) * queries * width, scale * dq, begin_t, i, queries, in_q, width
    )
    if tl.program_id(1) == 0:
        far = tl.zeros([BLOCK_T], tl.float32)
        for part in range(0, parts):
            found = tl.load(rows_ptr + (FAR + part) * total_rows, mask=known, other=0.0)
            far = _largest(found[:, None], far)
        to = checks_ptr + row * 4
        tl.store(to, far, mask=known)
        if POWER == 1:
            # NaN - NaN
            changed = tl.where(squares == squares, 0.0, squares)
        tl.store(to + 2, changed, mask=known)
        tl.store(to + 3, squares, mask=known)


@kernel(do_not_specialize=["queries", "keys", "window", "total_rows"])
def _attention_keys_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, keep_ptr, bias_ptr, rows_ptr, dk_ptr, dv_ptr,
    heads, group, queries, keys, width, values, window, total_rows, scale, softcap, rate,
    grad_b, grad_h, grad_t, grad_d, q_b, q_h, q_t, q_d, k_b, k_g, k_s, k_d, v_b, v_g, v_s, v_d,
    keep_b, keep_h, keep_t, bias_b, bias_h, bias_t, columns,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, POWER: tl.constexpr,
    WIDEN: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    WIDTH: tl.constexpr, VALUES: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_S keys, in the columns of program_id(1)."""
    blocks = tl.cdiv(keys, BLOCK_S)
    shared = heads // group
    head = tl.program_id(0) // blocks
    begin_s = tl.program_id(0) % blocks * BLOCK_S
    b, g = (head // shared).to(tl.int64), head % shared
    k_ptr += b * k_b + g.to(tl.int64) * k_g
    v_ptr += b * v_b + g.to(tl.int64) * v_g
    i, j = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S)
    in_q = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    in_v = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    k, v = None, None
    if COLUMNS == 0:
        k = _load(k_ptr, begin_s, j, k_s, keys, in_q, k_d, width)
    if COLUMNS == 0 and DK:
        v = _load(v_ptr, begin_s, j, v_s, keys, in_v, v_d, values)
    total_rows = tl.cast(total_rows, tl.int64)
    # blocks of queries that may attend to these keys by their places
    begin = begin_s // BLOCK_T if CAUSAL else 0
    end = queries
    if WINDOWED:
        end = tl.minimum(queries, begin_s + BLOCK_S - 1 + window)
    count = tl.maximum(tl.cdiv(end, BLOCK_T) - begin, 0)
    first, last = _queries_of(begin_s + j, queries, keys, window, WINDOWED)
    dk = tl.zeros([BLOCK_S, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK_S, VALUES], tl.float32)
    # one loop rather than two, so that loads run ahead over the ends of heads
    for step in range(0, group * count):
        h = (g * group + step // count).to(tl.int64)
        start = (begin + step % count) * BLOCK_T
        q_at, grad_at = q_ptr + (b * q_b + h * q_h), grad_ptr + (b * grad_b + h * grad_h)
        q = _load(q_at, start, i, q_t, queries, in_q, q_d, width)
        grad = _load(grad_at, start, i, grad_t, queries, in_v, grad_d, values)
        raw = scale * _products(
            k, k_ptr, begin_s, j, k_s, k_d, keys, q, q_at, start, i, q_t, q_d, queries, width,
            WIDEN, COLUMNS,
        )  # fmt: skip
        slope = _tanh(raw / softcap) if CAPPED else raw
        s = softcap * slope if CAPPED else raw
        first_t = tl.cast(start, tl.int64)
        keep_at, bias_at = keep_ptr, bias_ptr
        if keep_ptr is not None:
            keep_at += b * keep_b + h * keep_h + first_t * keep_t + begin_s
        if bias_ptr is not None:
            bias_at += b * bias_b + h * bias_h + first_t * bias_t + begin_s
        s, _ = _masked(
            s, i[None, :], j[:, None], i[None, :], (first - start)[:, None],
            (last - start)[:, None], queries - start, columns - begin_s, keep_at, keep_t, bias_at,
            bias_t, CAUSAL,
        )  # fmt: skip
        row, known = rows_ptr + ((b * heads + h) * queries + start) + i, i < queries - start
        top = tl.load(row, mask=known, other=0.0)
        plain, tempered = _exponentials(s - top[None, :], rate, POWER)
        if DV:
            plain_scale = tl.load(row + total_rows, mask=known, other=0.0)
            dv = _add(plain * plain_scale[None, :], grad, dv, WIDEN, COLUMNS)
        if DK:
            scale_ = tl.load(row + 2 * total_rows, mask=known, other=0.0)
            mean = tl.load(row + 4 * total_rows, mask=known, other=0.0)
            dp = _products(
                v, v_ptr, begin_s, j, v_s, v_d, keys, grad, grad_at, start, i, grad_t, grad_d,
                queries, values, WIDEN, COLUMNS,
            )  # fmt: skip
            ds = tempered * scale_[None, :] * (dp - mean[None, :])
            if CAPPED:
                ds *= 1 - slope * slope
            dk = _add(ds, q, dk, WIDEN, COLUMNS)
    head = head.to(tl.int64) * keys
    if DK:
        _store(dk_ptr + head * width, scale * dk, begin_s, j, keys, in_q, width)
    if DV:
        _store(dv_ptr + head * values, dv, begin_s, j, keys, in_v, values)


class Form(NamedTuple):
    """What a call's pinned tiles depend on.

    Attributes:
        size: columns of q, k and v, padded to a power of two.
        whole: rows are loaded whole.
        large: `is_deep` and `is_even`.
        masked: with keep or bias. capped: with a softcap.
    """

    size: int
    whole: bool
    large: bool
    masked: bool
    capped: bool


def tile_of(kind: str, form: Form) -> dict[str, int]:
    """The pinned tile of "sums", "queries" or "keys": of what a program has, and of what it meets,
    as much as registers hold."""
    size, whole, large, masked, capped = form
    if not whole:
        wide = large and (kind == "sums" or (kind == "queries" and size <= PART))
        own, met = 64, 32 if wide else 16
    elif not large:
        own, met = 64, 16
    elif size <= 128:
        alone = kind == "queries" and not capped
        # keys under a cap spill 8 bytes with Triton 3.6 where they meet 64 queries
        capped_keys = kind == "keys" and capped
        own, met = 128, 64 if not masked and (size <= 64 or alone) and not capped_keys else 32
    else:
        # of more queries the sums spill 168 bytes with Triton 3.6
        own = 64 if kind == "sums" else 128
        met = 32 if kind == "queries" and not masked else 16
    t, s = (met, own) if kind == "keys" else (own, met)
    return {"BLOCK_T": t, "BLOCK_S": s, "num_warps": 8, "num_stages": 2}


def columns_of(kind: str, size: int, whole: bool) -> int:
    """Columns of a result that a program makes, of `size`, where registers do not hold them all."""
    return size if whole else min(size, PART if kind == "sums" else 2 * PART)


def at_once(form: Form) -> bool:
    """Whether registers hold dk and dv: else each is made by itself, for a fourth more products."""
    fits = form.size <= (64 if form.capped else 128)
    return form.whole and form.large and not form.masked and fits


def _in_rows(mask: torch.Tensor) -> torch.Tensor:
    """The mask, or a copy, with rows of a multiple of 16 that can be read 16 bytes at a time:
    one by one, their addresses would take half of the registers."""
    if is_even(mask):
        return mask
    for axis in range(3):
        if mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    keys = mask.shape[3]
    copy = mask.new_zeros(*mask.shape[:3], ceil_div(keys, 16) * 16)
    copy[..., :keys] = mask
    return copy


def attention_gradients(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    keep: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    causal: bool,
    window: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mikernels::attention_gradients` for operands of any strides."""
    (batch, heads, queries, width), (groups, keys, values) = q.shape, v.shape[1:]
    operands = grad, q, k, v
    # contiguous, whatever the operands are
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    checks = torch.empty(batch, heads, queries, 4, dtype=torch.float32, device=q.device)
    if 0 in (batch, heads, queries, keys, values):
        return dq.zero_(), dk.zero_(), dv.zero_(), checks.zero_()
    full, even, deep = q.dtype == torch.float32, is_even(*operands, out), is_deep(q.device)
    # 16 columns are the least of a matrix product
    sizes = [max(16, power_of_two(n)) for n in (width, values)]
    whole = not full and even and max(sizes) <= (WIDEST if deep else WIDEST // 2)
    masked = keep is not None or bias is not None
    form = Form(max(sizes), whole, deep and even, masked, softcap > 0)
    flags = {
        "CAUSAL": causal,
        "WINDOWED": window > 0,
        "CAPPED": softcap > 0,
        # of the usual temperatures one exponential does
        "POWER": int(temperature) if temperature in (1, 2) else 0,
        "WIDEN": WIDEN,
        "COLUMNS": 0 if whole else columns(full, even, deep),
    }
    strides = [s for t in operands for s in t.stride()]
    for mask in (keep, bias):
        mask = None if mask is None else _in_rows(mask)
        operands += (mask,)
        strides += [0] * 3 if mask is None else mask.expand(batch, heads, queries, -1).stride()[:3]
    # the masks' columns
    strides.append(ceil_div(keys, 16) * 16)
    largest = torch.linalg.vector_norm(v, torch.inf, 2)
    # a window beyond all places is none
    window = min(window, queries + keys)
    numbers = heads, heads // groups, queries, keys, width, values, window, batch * heads * queries
    factors = scale, softcap, 1 / temperature

    def options(kind: str) -> tuple[dict[str, Any], int, int]:
        """A kernel's constants, and in how many parts columns of q and of v are made."""
        part = [columns_of(kind, n, whole) for n in sizes]
        found = flags | tile_of(kind, form) | {"WIDTH": part[0], "VALUES": part[1]}
        return found, ceil_div(width, part[0]), ceil_div(values, part[1])

    tile, _, parts = options("sums")
    rows = torch.empty(FAR.value + parts, numbers[-1], dtype=torch.float32, device=q.device)
    blocks = ceil_div(queries, tile["BLOCK_T"]) * batch * heads
    _attention_sums_kernel[(blocks, parts)](
        *operands, out, largest, rows, checks, *numbers, *factors, *strides, *out.stride(), **tile
    )
    tile, of_width, _ = options("queries")
    blocks = ceil_div(queries, tile["BLOCK_T"]) * batch * heads
    _attention_queries_kernel[(blocks, max(1, of_width))](
        *operands, rows, checks, dq, *numbers, parts, *factors, *strides, **tile
    )
    tile, of_width, of_values = options("keys")
    blocks = ceil_div(keys, tile["BLOCK_S"]) * batch * groups
    made = {(True, False): of_width, (False, True): of_values}
    if at_once(form):
        made = {(True, True): max(of_width, of_values)}
    for (key, value), count in made.items():
        if count:
            _attention_keys_kernel[(blocks, count)](
                *operands, rows, dk, dv, *numbers, *factors, *strides, DK=key, DV=value, **tile
            )
    return dq, dk, dv, checks


def _case(kind: str, dtype: str, size: int, masked: bool, capped: bool, *targets: str) -> Case:
    """With a window, and neither of the temperatures for which one exponential does; of dk and dv
    the first, unless they are made at once."""
    kernel = {
        "sums": _attention_sums_kernel,
        "queries": _attention_queries_kernel,
        "keys": _attention_keys_kernel,
    }[kind]
    full = dtype == "fp32"
    form = Form(size, not full, targets[0] in DEEP, masked, capped)
    axes = {"grad": "bht", "q": "bht", "k": "bgs", "v": "bgs"}
    axes |= {"out": "bht"} if kind == "sums" else {}
    strides = [f"{t}_{a}" for t in axes for a in axes[t]]
    strides += [*(f"{t}_{a}" for t in ("keep", "bias") for a in "bht"), "columns"]
    sizes = ("heads", "group", "queries", "keys", "width", "values", "window", "total_rows")
    types = dict.fromkeys((*sizes, *strides, *(["parts"] if kind == "queries" else [])), "i32")
    types |= dict.fromkeys(("scale", "softcap", "rate"), "fp32")
    types |= {t: f"*{dtype}" for t in kernel.jit.arg_names if t.endswith("_ptr")}
    types |= dict.fromkeys(types.keys() & {"rows_ptr", "checks_ptr"}, "*fp32")
    constants = {f"{t}_d": 1 for t in axes}
    constants |= {"CAUSAL": True, "WINDOWED": True, "CAPPED": capped, "POWER": 0, "WIDEN": False}
    constants |= dict.fromkeys(("WIDTH", "VALUES"), columns_of(kind, size, form.whole))
    constants["COLUMNS"] = 0 if form.whole else columns(full, True, form.large)
    types["keep_ptr"] = "*i1"
    if not masked:
        del types["keep_ptr"], types["bias_ptr"]
        constants |= {"keep_ptr": None, "bias_ptr": None}
    if kind == "keys":
        constants |= {"DK": True, "DV": at_once(form)}
    tile = tile_of(kind, form)
    launch = {key: tile.pop(key) for key in ("num_warps", "num_stages")}
    name = f"{kind} {dtype} {size}{' masked' * masked}{' capped' * capped}, {targets[0]}"
    divisible = ("width", "values", *strides)
    return Case(
        name, kernel, types, constants | tile, **launch, divisible=divisible, matrix=True,
        targets=targets,
    )  # fmt: skip


def cases() -> list[Case]:
    """Those of the pinned tiles that leave the fewest registers."""
    return [
        _case("sums", "bf16", 128, True, True, "sm_90"),
        _case("sums", "bf16", 256, False, True, "sm_90"),
        _case("sums", "bf16", 256, True, True, "sm_90"),
        _case("sums", "bf16", 128, True, True, "sm_80", "sm_89", "gfx942"),
        _case("sums", "fp32", 128, True, True, "sm_90"),
        _case("queries", "bf16", 128, False, False, "sm_90"),
        _case("queries", "bf16", 256, False, True, "sm_90"),
        _case("keys", "bf16", 64, False, True, "sm_90"),
        _case("keys", "bf16", 128, False, False, "sm_90", "sm_100"),
        _case("keys", "bf16", 256, True, True, "sm_90"),
        _case("keys", "bf16", 128, True, True, "gfx942"),
        _case("keys", "fp32", 128, True, True, "sm_80", "sm_89"),
    ]
