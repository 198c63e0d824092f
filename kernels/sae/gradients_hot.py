# SPDX-License-Identifier: Apache-2.0
"""Hot features: sums over many slots, cut into shares that several programs take.

A feature with more than a chunk of slots would leave one program behind: one of all 8192 tokens
takes one SM about 1 ms. The sorted slots are cut at multiples of the chunk, whatever the features
are. A block meets at most two hot features: the one of its first slot and the one of its last. So
2 ceil(M / chunk) programs, a number the host knows, cover every hot feature: share 2 b is the part
of block b that belongs to the feature of its first slot, share 2 b + 1 the part of a feature that
begins inside the block and holds its last slot. Partial sums go to a workspace, and the feature's
own program adds them in order of the blocks. No table, no atomics, no host sync, and the same bits
whatever runs first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..common.launch import ceil_div

CHUNK = 512  # slots, a power of two: 100 times the mean of a feature at the reference shapes
# blocks at most, so that the workspace of two sums is 2 x 1024 x 2 x d x 4 bytes: 38 MB at d = 2304
MAX_BLOCKS = 1024

# (name, types, constants) of the argument `tokens` in the offline cases: padded and ragged slots
FORMS: tuple[tuple[str, dict[str, str], dict[str, None]], ...] = (
    ("", {}, {"tokens": None}),
    (" ragged", {"tokens": "*i64"}, {}),
)


def chunk_bits(slots: int) -> int:
    """log2 of the slots of one block, for M slots in all."""
    return (max(CHUNK, ceil_div(slots, MAX_BLOCKS)) - 1).bit_length()


def shares(slots: int, bits: int) -> int:
    """Programs that cover the hot features; 0 if no feature can be hot."""
    chunk = 1 << bits
    return 2 * ceil_div(slots, chunk) if slots > chunk else 0


def is_short(slots: int) -> bool:
    return slots < 2**31


class Slots(NamedTuple):
    """M slots by feature, held within what is there, whoever made offsets, order and tokens.

    Attributes:
        offsets, order: as by_feature's; its own come out as they are.
        tokens: of ragged slots; None if `k` of a token lie side by side.
        bits, shares: log2 of the slots of a block, and the programs that cover the hot features.
    """

    offsets: torch.Tensor
    order: torch.Tensor
    tokens: torch.Tensor | None
    k: int
    count: int
    bits: int
    shares: int


def held(
    values: torch.Tensor,
    offsets: torch.Tensor,
    order: torch.Tensor,
    tokens: torch.Tensor | None,
    n: int,
) -> Slots:
    """Slots of these values, [N, k] or [M] with tokens, whose rows are n.

    Small kernels of torch (1 MB of order at 4096 x 32) rather than comparisons per slot in loops
    that have no register left.
    """
    count = values.numel()
    bits = chunk_bits(count)
    offsets, order = offsets.contiguous(), order.contiguous()
    return Slots(
        offsets.clamp(0, count),
        order.clamp(0, max(count - 1, 0)),
        None if tokens is None else tokens.contiguous().clamp(0, max(n - 1, 0)),
        values.shape[1] if tokens is None else 1,
        count,
        bits,
        shares(count, bits),
    )


def levels_inside(
    rows: torch.Tensor, levels: torch.Tensor | None
) -> tuple[torch.Tensor | None, int]:
    """levels [F] of rows [L, N, d], held within 0..L-1, and L's stride; None, 0 of rows [N, d]."""
    if levels is None:
        return None, 0
    if rows.shape[0] == 0 and levels.numel():
        raise ValueError(f"levels must be none for rows {list(rows.shape)}, got {levels.numel()}")
    return levels.contiguous().clamp(0, max(rows.shape[0] - 1, 0)), rows.stride(0)


@triton.jit
def token_of(slot, k, SHORT: tl.constexpr):
    """slot // k, of padded slots; a 64-bit division takes 4 times as many instructions as a 32-bit
    one."""
    return (slot.to(tl.int32) // k).to(tl.int64) if SHORT else slot // k


@triton.jit
def feature_at(offsets, position, n_features):
    """The largest feature that begins at or before this slot, by bisection."""
    low = position * 0
    high = low + n_features - 1
    while low < high:
        middle = (low + high + 1) // 2
        begins = tl.load(offsets + middle) <= position
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle - 1)
    return low


@triton.jit
def is_hot(begin, end, bits):
    """end - begin > 2 ** bits"""
    return ((end - begin - 1) >> bits) > 0


@triton.jit
def hot_share(share, offsets, n_features, slots, bits):
    """A feature and its slots begin..end that this share sums; none if it is not hot."""
    block_begin = (share // 2).to(tl.int64) << bits
    block_end = tl.minimum((share // 2 + 1).to(tl.int64) << bits, slots.to(tl.int64))
    odd = share % 2 == 1
    feature = feature_at(offsets, tl.where(odd, block_end - 1, block_begin), n_features)
    first = tl.load(offsets + feature)
    last = tl.load(offsets + feature + 1)
    # a feature that spans the block's start belongs to the even share alone
    mine = is_hot(first, last, bits) & ((first > block_begin) | ~odd)
    begin = tl.maximum(first, block_begin)
    return feature, begin, tl.where(mine, tl.minimum(last, block_end), begin)


@triton.jit
def feature_work(feature, offsets, bits):
    """Slots begin..end to sum here, blocks first..last whose partials to add; one is empty."""
    begin = tl.load(offsets + feature)
    end = tl.load(offsets + feature + 1)
    hot = is_hot(begin, end, bits)
    first = begin >> bits
    last = tl.where(hot, ((end - 1) >> bits) + 1, first)
    return begin, tl.where(hot, begin, end), first, last


@triton.jit
def compensated(total, lost, term):
    """total + term, and what that rounding lost, which the next term makes good (Kahan).

    A chain of 64 fp32 additions is some 8 times less accurate; the rows' loads hide the operations.
    """
    term -= lost
    longer = total + term
    lost = (longer - total) - term
    # an infinite or NaN sum has lost nothing
    return longer, tl.where(tl.abs(lost) < float("inf"), lost, 0.0)


@triton.jit
def share_of(block, begin, bits):
    """The share of a block that holds the partial sum of the hot feature that begins at `begin`."""
    return 2 * block + (begin > (block << bits)).to(tl.int64)
