# SPDX-License-Identifier: Apache-2.0
"""Device code of encode: a token's candidates scored exactly, its selection, and if it is certain.

Not all candidates need a dot product. The k of highest bound get one; the least of those scores is
at most the k-th score, and of the others only those count whose bound reaches it: of c = 128 some
74 at G2. The selection is certain when the least bound of the candidates, which no feature that was
left out exceeds, stays below the k-th score.
"""

import triton
import triton.language as tl

from ..common.launch import kernel
from ..common.offline import Case, with_odd_sizes
from ..select.order import NOTHING, kth_key, least_key, order_key, places
from .encode_screen import NAN, RELATIVE, SLACK, ZERO, scaled

SETTLE = {"SLOTS": 16, "BLOCK": 128}
# what becomes of a token
CERTAIN, UNCERTAIN, ALL_ZERO = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def settle_warps(block: int) -> int:
    """8 candidates per thread, but no fewer than keep the rows of w_enc coming."""
    return max(4, min(16, block // 256))


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


@triton.jit
def _score_all(
    x_ptr, w_ptr, b_enc_ptr, b_dec_ptr, scale_ptr, candidates, todo, s_ptr, h_ptr, count, d,
    stride_xd, stride_wf, stride_wd, stride_be, stride_bd, stride_s,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores of the candidates whose places are todo[:count]; returns the least one's key."""
    tl.debug_barrier()
    least = tl.full((), 0x7FFFFFFF, tl.int32)
    for first in range(0, count, SLOTS):
        number = first + tl.arange(0, SLOTS)
        valid = number < count
        place = tl.load(todo + number, mask=valid, other=0)
        feature = tl.load(candidates + place).to(tl.int64)
        h, s = exact_scores(
            x_ptr, w_ptr, b_enc_ptr, b_dec_ptr, scale_ptr, feature, d,
            stride_xd, stride_wf, stride_wd, stride_be, stride_bd, stride_s, BLOCK,
        )  # fmt: skip
        tl.store(s_ptr + place, s, mask=valid)
        tl.store(h_ptr + place, h, mask=valid)
        least = tl.minimum(least, tl.min(tl.where(valid, order_key(s, 0), 0x7FFFFFFF)))
    tl.debug_barrier()
    return least


@kernel(do_not_specialize=["c", "k", "complete"])
def _encode_settle_kernel(
    x_ptr, w_ptr, b_enc_ptr, b_dec_ptr, scale_ptr, exponents_ptr, bounds_ptr, candidates_ptr,
    s_ptr, h_ptr, values_ptr, indices_ptr, states_ptr, floors_ptr, thresholds_ptr,
    d, c, k, complete,
    stride_xn, stride_xd, stride_wf, stride_wd, stride_be, stride_bd, stride_s,
    RELU: tl.constexpr, LIST: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of an uncertain token floors_ptr gets the key that a winner's is above, and thresholds_ptr
    the score, in the unit of the screen, that its bound reaches.
    """
    row = tl.program_id(0).to(tl.int64)
    e = tl.load(exponents_ptr + row)
    values = values_ptr + row * k
    indices = indices_ptr + row * k
    slot = tl.arange(0, LIST)
    state = CERTAIN
    floor = NOTHING
    threshold = float("-inf")
    if e == NAN:
        # every score is NaN: all tie, and the first k are selected
        tl.store(values + slot, tl.full([LIST], float("nan"), tl.float32), mask=slot < k)
        tl.store(indices + slot, slot, mask=slot < k)
    elif e == ZERO:
        state = ALL_ZERO
    else:
        candidates = candidates_ptr + row * 2 * c
        scores = s_ptr + row * c
        heights = h_ptr + row * c
        # the part of the list where a panel's winners arrived is free now
        todo = candidates_ptr + row * 2 * c + c
        inside = slot < c
        bound = tl.load(bounds_ptr + row * 2 * c + slot, mask=inside, other=0.0).to(tl.float32)
        # fp16 leaves 13 bits of a key unused
        bound_keys = tl.where(inside, order_key(bound, 13), NOTHING)
        high = kth_key(bound_keys, k, least_key(bound_keys), 13)
        high_ties = k - tl.sum((bound_keys > high).to(tl.int32))
        first, place = places(bound_keys, high, high_ties, 0, 0)
        tl.store(todo + place, slot, mask=first)
        least = _score_all(
            x_ptr + row * stride_xn, w_ptr, b_enc_ptr, b_dec_ptr, scale_ptr, candidates, todo,
            scores, heights, k, d,
            stride_xd, stride_wf, stride_wd, stride_be, stride_bd, stride_s, SLOTS, BLOCK,
        )  # fmt: skip
        reach = scaled(score_of(least), e)
        below = bound + tl.abs(bound) * RELATIVE + SLACK < reach
        more = inside & (first == 0) & (below == 0)
        rank = tl.cumsum(more.to(tl.int32), 0) - 1
        tl.store(todo + rank, slot, mask=more)
        _score_all(
            x_ptr + row * stride_xn, w_ptr, b_enc_ptr, b_dec_ptr, scale_ptr, candidates, todo,
            scores, heights, tl.sum(more.to(tl.int32)), d,
            stride_xd, stride_wf, stride_wd, stride_be, stride_bd, stride_s, SLOTS, BLOCK,
        )  # fmt: skip
        scored = first | more
        s = tl.load(scores + slot, mask=scored, other=0.0)
        keys = tl.where(scored, order_key(s, 0), NOTHING)
        kth = kth_key(keys, k, least, 0)
        ties = k - tl.sum((keys > kth).to(tl.int32))
        taken, at = places(keys, kth, ties, 0, 0)
        h = tl.load(heights + slot, mask=taken, other=0.0)
        if RELU:
            h = relu_of(h)
        tl.store(values + at, h, mask=taken)
        tl.store(indices + at, tl.load(candidates + slot, mask=taken, other=0), mask=taken)
        # bounds below fp16's range were stored as -inf
        edge = score_of(tl.min(tl.where(inside, bound_keys, 0x7FFFFFFF)))
        edge = tl.maximum(edge, -65504.0)
        threshold = scaled(score_of(kth), e)
        certain = (edge + tl.abs(edge) * RELATIVE + SLACK < threshold) & (edge < float("inf"))
        state = tl.where(certain | (complete != 0), CERTAIN, UNCERTAIN)
        floor = kth - 1
    tl.store(states_ptr + row, state)
    tl.store(floors_ptr + row, floor)
    tl.store(thresholds_ptr + row, threshold)


def cases() -> list[Case]:
    found = []
    ones = dict.fromkeys(("stride_xd", "stride_wd", "stride_be", "stride_bd", "stride_s"), 1)
    for name in ("fp32", "bf16", "fp16"):
        operands = dict.fromkeys(("x_ptr", "w_ptr", "b_enc_ptr", "b_dec_ptr", "scale_ptr"), name)
        types = {key: f"*{dtype}" for key, dtype in operands.items()}
        types |= dict.fromkeys(("exponents_ptr", "candidates_ptr"), "*i32")
        types |= dict.fromkeys(("states_ptr", "floors_ptr"), "*i32")
        types |= dict.fromkeys(("s_ptr", "h_ptr", "thresholds_ptr"), "*fp32")
        types |= {"bounds_ptr": "*fp16", "values_ptr": f"*{name}", "indices_ptr": "*i64"}
        types |= dict.fromkeys(("d", "c", "k", "complete", "stride_xn", "stride_wf"), "i32")
        found += [
            Case(
                f"settle {name} {block}",
                _encode_settle_kernel,
                types,
                ones | {"RELU": True, "LIST": block} | SETTLE,
                num_warps=settle_warps(block),
                divisible=("stride_xn", "stride_wf", "d"),
            )
            for block in (64, 256, 2048)
        ]
    return with_odd_sizes(found)
