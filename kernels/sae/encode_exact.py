# SPDX-License-Identifier: Apache-2.0
"""Device code of encode: the tokens whose screened selection is not certain.

They wait in a queue. As many programs as fit the device share them: with few tokens, each token's
features are split among several (`shares_of`), whose lists of the k best are merged afterwards.
Features are scored exactly where the second screen has left a bit (`encode_again`), all of them
for tokens that it had no room for. Of those scores a list takes what is above its floor, at first
the k-th score of the candidates, and is cut to its k best when it is full. So a program holds a few
thousand scores whatever F is, also where all features tie.

Tokens of zeros have the same scores: one of them stands in the queue, the others copy its codes.
"""

import triton
import triton.language as tl

from ..common.launch import kernel
from ..common.offline import Case, with_odd_sizes
from ..select.order import NOTHING, order_key, places
from ..select.row_topk_passes import kth_by_passes
from .encode_settle import ALL_ZERO, UNCERTAIN, exact_scores, relu_of

QUEUE = 2048
EXACT = {"SLOTS": 16, "BLOCK": 128, "SEGMENT": 2048}
EXACT_WARPS = 8
MERGE = 2048
# shares of a token's features: more would take longer to merge than to score
MOST_SHARES = tl.constexpr(128)
COPIERS = 64


def list_size(k: int) -> int:
    """Places of a program's list: k best, and what may come before it is cut to them again."""
    return k + 2 * EXACT["SEGMENT"]


@kernel(do_not_specialize=["n"])
def _encode_queue_kernel(states_ptr, counts_ptr, queue_ptr, zeros_ptr, n, BLOCK: tl.constexpr):
    """Lists uncertain tokens and, apart, those of zeros, of which the first is uncertain too."""
    waiting = tl.full((), 0, tl.int32)
    zeros = tl.full((), 0, tl.int32)
    for first in range(0, n, BLOCK):
        token = first + tl.arange(0, BLOCK)
        state = tl.load(states_ptr + token, mask=token < n, other=0)
        zero = (state == ALL_ZERO).to(tl.int32)
        rank = zeros + tl.cumsum(zero, 0) - 1
        tl.store(zeros_ptr + rank, token, mask=zero > 0)
        zeros += tl.sum(zero)
        wait = ((state == UNCERTAIN) | ((zero > 0) & (rank == 0))).to(tl.int32)
        place = waiting + tl.cumsum(wait, 0) - 1
        tl.store(queue_ptr + place, token, mask=wait > 0)
        waiting += tl.sum(wait)
    tl.store(counts_ptr, waiting)
    tl.store(counts_ptr + 1, zeros)


@triton.jit
def shares_of(count, programs):
    return tl.maximum(tl.minimum(programs // count, MOST_SHARES), 1)


@triton.jit
def _cut(s_ptr, h_ptr, features_ptr, held, k, BLOCK: tl.constexpr):
    """Moves the k best of a list to its front, in order; returns the key of the last.

    Between this and whatever else touches the list the caller has barriers.
    """
    kth, ties = kth_by_passes(s_ptr, held, k, 0, BLOCK)
    above_before = tl.full((), 0, tl.int32)
    ties_before = tl.full((), 0, tl.int32)
    for first in range(0, held, BLOCK):
        place = first + tl.arange(0, BLOCK)
        s = tl.load(s_ptr + place, mask=place < held, other=0.0)
        h = tl.load(h_ptr + place, mask=place < held, other=0.0)
        feature = tl.load(features_ptr + place, mask=place < held, other=0)
        keys = tl.where(place < held, order_key(s, 0), NOTHING)
        taken, slot = places(keys, kth, ties, above_before, ties_before)
        # nothing moves backwards, so what a later round reads is still there
        tl.debug_barrier()
        tl.store(s_ptr + slot, s, mask=taken)
        tl.store(h_ptr + slot, h, mask=taken)
        tl.store(features_ptr + slot, feature, mask=taken)
        above_before += tl.sum((keys > kth).to(tl.int32))
        ties_before += tl.sum((keys == kth).to(tl.int32))
    return kth


@kernel(do_not_specialize=["f", "k", "capacity", "size"])
def _encode_exact_kernel(
    x_ptr, w_ptr, b_enc_ptr, b_dec_ptr, scale_ptr, counts_ptr, queue_ptr, floors_ptr, masks_ptr,
    s_ptr, h_ptr, features_ptr, todo_ptr, held_ptr, values_ptr, indices_ptr,
    d, f, k, capacity, size,
    stride_xn, stride_xd, stride_wf, stride_wd, stride_be, stride_bd, stride_s, stride_masks,
    RELU: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """The k best of a share of the features of one token after the other."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    count = tl.load(counts_ptr)
    s_list = s_ptr + program * size
    h_list = h_ptr + program * size
    features = features_ptr + program * size
    todo = todo_ptr + program * SEGMENT
    shares = shares_of(tl.maximum(count, 1), programs)
    span = tl.cdiv(f, shares * 32) * 32
    for item in range(tl.program_id(0), count * shares, programs):
        # programs that run at a time score the same features, for different tokens
        number = item % count
        begin = item // count * span
        end = tl.minimum(begin + span, f)
        row = tl.load(queue_ptr + number).to(tl.int64)
        floor = tl.load(floors_ptr + row)
        held = tl.full((), 0, tl.int32)
        for first in range(begin, end, SEGMENT):
            feature = first + tl.arange(0, SEGMENT)
            word = masks_ptr + number.to(tl.int64) * stride_masks + feature // 32
            known = tl.where(number < capacity, end, 0)
            bits = tl.load(word, mask=feature < known, other=-1)
            wanted = (feature < end) & (((bits >> (feature % 32)) & 1) != 0)
            rank = tl.cumsum(wanted.to(tl.int32), 0) - 1
            # `todo` of the segment or item before has been read
            tl.debug_barrier()
            tl.store(todo + rank, feature, mask=wanted)
            # and so has its list, or been cut
            tl.debug_barrier()
            count_here = tl.sum(wanted.to(tl.int32))
            for start in range(0, count_here, SLOTS):
                slot = start + tl.arange(0, SLOTS)
                chosen = tl.load(todo + slot, mask=slot < count_here, other=0)
                h, s = exact_scores(
                    x_ptr + row * stride_xn, w_ptr, b_enc_ptr, b_dec_ptr, scale_ptr,
                    chosen.to(tl.int64), d,
                    stride_xd, stride_wf, stride_wd, stride_be, stride_bd, stride_s, BLOCK,
                )  # fmt: skip
                above = (slot < count_here) & (order_key(s, 0) > floor)
                place = held + tl.cumsum(above.to(tl.int32), 0) - 1
                tl.store(s_list + place, s, mask=above)
                tl.store(h_list + place, h, mask=above)
                tl.store(features + place, chosen, mask=above)
                held += tl.sum(above.to(tl.int32))
            # a list that another segment could fill, or one that is done
            if held > tl.where(first + SEGMENT < end, size - SEGMENT, k):
                tl.debug_barrier()
                floor = _cut(s_list, h_list, features, held, k, SEGMENT)
                held = k
        # a program has several items only where none is a share
        if shares == 1:
            tl.debug_barrier()
            for start in range(0, k, SEGMENT):
                slot = start + tl.arange(0, SEGMENT)
                h = tl.load(h_list + slot, mask=slot < k, other=0.0)
                if RELU:
                    h = relu_of(h)
                tl.store(values_ptr + row * k + slot, h, mask=slot < k)
                chosen = tl.load(features + slot, mask=slot < k, other=0)
                tl.store(indices_ptr + row * k + slot, chosen, mask=slot < k)
        else:
            tl.store(held_ptr + item, held)


@triton.jit
def _joined(s_ptr, held_ptr, number, count, shares, k, size, first, BLOCK: tl.constexpr):
    """(keys, places) of entries first.. of a token's lists, as if one followed the other."""
    entry = first + tl.arange(0, BLOCK)
    item = entry // k * count + number
    held = tl.load(held_ptr + item, mask=entry < shares * k, other=0)
    place = item.to(tl.int64) * size + entry % k
    inside = entry % k < held
    s = tl.load(s_ptr + place, mask=inside, other=0.0)
    return tl.where(inside, order_key(s, 0), NOTHING), place


@kernel(do_not_specialize=["k", "size", "programs"])
def _encode_merge_kernel(
    counts_ptr, queue_ptr, s_ptr, h_ptr, features_ptr, held_ptr, values_ptr, indices_ptr,
    k, size, programs, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The k best of all shares of a token."""
    count = tl.load(counts_ptr)
    shares = shares_of(tl.maximum(count, 1), programs)
    if (tl.program_id(0) < count) & (shares > 1):
        number = tl.program_id(0)
        row = tl.load(queue_ptr + number).to(tl.int64)
        kth = tl.full((), -(2**31), tl.int32)
        bit = tl.full((), -(2**31), tl.int32)
        for _ in range(32):
            candidate = kth ^ bit
            at_least = tl.zeros([BLOCK], tl.int32)
            for first in range(0, shares * k, BLOCK):
                keys, _p = _joined(s_ptr, held_ptr, number, count, shares, k, size, first, BLOCK)
                at_least += (keys >= candidate).to(tl.int32)
            kth = tl.where(tl.sum(at_least) >= k, candidate, kth)
            bit = (bit >> 1) & 0x7FFFFFFF
        strictly = tl.zeros([BLOCK], tl.int32)
        for first in range(0, shares * k, BLOCK):
            keys, _p = _joined(s_ptr, held_ptr, number, count, shares, k, size, first, BLOCK)
            strictly += (keys > kth).to(tl.int32)
        ties = k - tl.sum(strictly)
        above_before = tl.full((), 0, tl.int32)
        ties_before = tl.full((), 0, tl.int32)
        for first in range(0, shares * k, BLOCK):
            keys, place = _joined(s_ptr, held_ptr, number, count, shares, k, size, first, BLOCK)
            taken, slot = places(keys, kth, ties, above_before, ties_before)
            h = tl.load(h_ptr + place, mask=taken, other=0.0)
            if RELU:
                h = relu_of(h)
            tl.store(values_ptr + row * k + slot, h, mask=taken)
            feature = tl.load(features_ptr + place, mask=taken, other=0)
            tl.store(indices_ptr + row * k + slot, feature, mask=taken)
            above_before += tl.sum((keys > kth).to(tl.int32))
            ties_before += tl.sum((keys == kth).to(tl.int32))


@kernel(do_not_specialize=["k"])
def _encode_copy_kernel(counts_ptr, zeros_ptr, values_ptr, indices_ptr, k, BLOCK: tl.constexpr):
    """The codes of the first token of zeros, for all the others."""
    zeros = tl.load(counts_ptr + 1)
    if zeros > 1:
        source = tl.load(zeros_ptr).to(tl.int64) * k
        for start in range(0, k, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            value = tl.load(values_ptr + source + slot, mask=slot < k, other=0.0)
            index = tl.load(indices_ptr + source + slot, mask=slot < k, other=0)
            for number in range(1 + tl.program_id(0), zeros, tl.num_programs(0)):
                to = tl.load(zeros_ptr + number).to(tl.int64) * k
                tl.store(values_ptr + to + slot, value, mask=slot < k)
                tl.store(indices_ptr + to + slot, index, mask=slot < k)


def cases() -> list[Case]:
    found = []
    ones = dict.fromkeys(("stride_xd", "stride_wd", "stride_be", "stride_bd", "stride_s"), 1)
    lists = {"s_ptr": "*fp32", "h_ptr": "*fp32", "features_ptr": "*i32", "held_ptr": "*i32"}
    lists |= {"counts_ptr": "*i32", "queue_ptr": "*i32", "k": "i32", "size": "i32"}
    for name in ("fp32", "bf16", "fp16"):
        operands = dict.fromkeys(("x_ptr", "w_ptr", "b_enc_ptr", "b_dec_ptr"), f"*{name}")
        out = {"values_ptr": f"*{name}", "indices_ptr": "*i64"}
        sizes = dict.fromkeys(("d", "f", "capacity"), "i32")
        strides = dict.fromkeys(("stride_xn", "stride_wf", "stride_masks"), "i32")
        pointers = dict.fromkeys(("floors_ptr", "masks_ptr", "todo_ptr"), "*i32")
        found.append(
            Case(
                f"exact {name}",
                _encode_exact_kernel,
                operands | out | lists | sizes | strides | pointers,
                ones | {"scale_ptr": None, "RELU": True} | EXACT,
                num_warps=EXACT_WARPS,
                divisible=("stride_xn", "stride_wf", "d"),
            )
        )
        found.append(
            Case(
                f"merge {name}",
                _encode_merge_kernel,
                lists | out | {"programs": "i32"},
                {"RELU": True, "BLOCK": MERGE},
                num_warps=8,
            )
        )
    queue = dict.fromkeys(("states_ptr", "counts_ptr", "queue_ptr", "zeros_ptr"), "*i32")
    found.append(Case("queue", _encode_queue_kernel, queue | {"n": "i32"}, {"BLOCK": QUEUE}, 8))
    copied = {"counts_ptr": "*i32", "zeros_ptr": "*i32", "values_ptr": "*fp32"}
    copied |= {"indices_ptr": "*i64", "k": "i32"}
    found.append(Case("copy", _encode_copy_kernel, copied, {"BLOCK": 64}))
    return with_odd_sizes(found)
