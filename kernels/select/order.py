# SPDX-License-Identifier: Apache-2.0
"""The order of selection in integers, and the steps that every exact selection is made of.

A score's key is an int32 that orders as selection does: value descending, NaN above +inf, -0 equal
to +0. Ties go to the lower index because tiles are scanned in index order.
"""

import os

import torch
import triton
import triton.language as tl

# low key bits that a dtype never uses: its scores are equal exactly if their keys are
UNUSED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
NOTHING = tl.constexpr(-(2**31))  # below the key of -inf


@triton.jit
def order_key(x, UNUSED: tl.constexpr):
    """int32 keys of fp32 scores; integer tests, so that no flush of denormals can matter."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, ~magnitude, bits)
    key = tl.where(magnitude == 0, 0, key)
    key = tl.where(magnitude > 0x7F800000, 0x7FFFFFFF, key)
    return (key >> UNUSED) << UNUSED


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_key(x, UNUSED: tl.constexpr):
    """The largest key of each row of scores [n, m], whose padding is -inf.

    One max.NaN per score and a key per row: 224 instructions where a key per score takes 512 (the
    whole read of bf16 groups of 64, sm_90).
    """
    if INTERPRETED:  # the interpreter would call `_larger` in Python, score by score
        return tl.max(order_key(x.to(tl.float32), UNUSED), 1)
    return order_key(tl.reduce(x.to(tl.float32), 1, _larger), UNUSED)


@triton.jit
def least_key(keys):
    """The smallest key that is one."""
    return tl.min(tl.where(keys == NOTHING, 0x7FFFFFFF, keys))


@triton.jit
def kth_key(keys, k, low, UNUSED: tl.constexpr):
    """The k-th largest key, which is at least `low`.

    Bit by bit, one count each, from the highest bit in which `low` and the largest key differ: of
    bf16's 16 bits some 9, of fp32's 32 some 25.
    """
    high = tl.max(keys)
    differ = high ^ low
    differ |= differ >> 1
    differ |= differ >> 2
    differ |= differ >> 4
    differ |= differ >> 8
    differ |= differ >> 16
    # in biased order, where bits compare as they are: the bits above are those of the k-th key
    found = ((high ^ -(2**31)) & ~differ) ^ -(2**31)
    stop = (1 << UNUSED) >> 1
    bit = differ ^ ((differ >> 1) & 0x7FFFFFFF)
    bit = tl.where(differ == 0, stop, bit)
    while bit != stop:
        candidate = found ^ bit
        enough = tl.sum((keys >= candidate).to(tl.int32)) >= k
        found = tl.where(enough, candidate, found)
        bit = (bit >> 1) & 0x7FFFFFFF
    return found


@triton.jit
def places(keys, kth, ties, above_before, ties_before):
    """Which keys of a flat tile are selected, and the slot of each in index order.

    `ties` is how many keys equal to the k-th are wanted in all; `above_before` and `ties_before`
    count those of earlier tiles. Returns (taken, slot).
    """
    above = (keys > kth).to(tl.int32)
    equal = (keys == kth).to(tl.int32)
    # one scan for both counts; a tile has fewer than 2^15 keys
    both = tl.cumsum(above + (equal << 16), 0)
    rank_above = above_before + (both & 0xFFFF) - above
    rank_equal = ties_before + (both >> 16) - equal
    taken = (above > 0) | ((equal > 0) & (rank_equal < ties))
    return taken, rank_above + tl.minimum(rank_equal, ties)
