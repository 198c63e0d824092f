# SPDX-License-Identifier: Apache-2.0
"""decode_levels: see mikernels/ops/sae/decode_levels.py.

One program holds a block of columns of all L errors of one token. It gathers the token's rows of w
as `decode` does, adds each to the prefixes from its feature's level on, and mixes what it holds:
every row is read once, and the errors are never in memory. Slots at 0 load nothing; an index
outside 0..F-1 loads nothing and gives NaN, and a level outside counts as the nearest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import ceil_div, kernel, power_of_two
from ..common.offline import Case
from .decode import SCAN, UNROLL

# numbers that a program holds: 16 a thread of 4 warps
HELD, WARPS = 2048, 4


def tile(count: int) -> dict[str, int]:
    levels = power_of_two(count)
    return {"LEVELS": levels, "BLOCK": min(512, max(32, HELD // levels))}


@triton.jit
def add_slots(
    total, rank, values, indices, levels, w_ptr, begin, end, d, n_features, column, inside, offset,
    stride_vk, stride_ik, stride_wf, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total [L, BLOCK] and the rows of slots begin..end, in the prefixes from their levels on."""
    for first in range(begin, end, UNROLL):
        for j in tl.static_range(UNROLL):
            slot = first + j
            valid = slot < end
            value = tl.load(values + slot * stride_vk, mask=valid, other=0.0).to(tl.float32)
            index = tl.load(indices + slot * stride_ik, mask=valid, other=0)
            known = (index >= 0) & (index < n_features)
            level = tl.load(levels + index, mask=known & (value != 0), other=0)
            value = tl.broadcast_to(value, [BLOCK])
            # an inactive slot adds nothing, whatever its row holds
            active = inside & (value != 0)
            there = active & (column < tl.where(known, d, 0))
            w = tl.load(w_ptr + index * stride_wf + offset, mask=there, other=float("nan"))
            term = tl.where(active, value * w.to(tl.float32), 0.0)
            total += tl.where((rank >= level)[:, None], term[None, :], 0.0)
    return total


@kernel(do_not_specialize=["n", "k", "n_features", "count"])
def _decode_levels_kernel(
    values_ptr, indices_ptr, rows_ptr, w_ptr, bias_ptr, x_ptr, levels_ptr, mix_ptr, mixed_ptr,
    error_ptr, squares_ptr, n, k, d, n_features, count, stride_vn, stride_vk, stride_in, stride_ik,
    stride_wf, stride_wd, stride_b, stride_xn, stride_xd, stride_mg, stride_mp,
    UNROLL: tl.constexpr, SCAN: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    offset = column.to(tl.int64) * stride_wd
    rank = tl.arange(0, LEVELS)
    total = tl.zeros([LEVELS, BLOCK], tl.float32)
    if rows_ptr is None:
        total = add_slots(
            total, rank, values_ptr + row * stride_vn, indices_ptr + row * stride_in, levels_ptr,
            w_ptr, 0, k, d, n_features, column, inside, offset, stride_vk, stride_ik, stride_wf,
            UNROLL, BLOCK,
        )  # fmt: skip
    else:
        # k is the number of slots; offsets of anyone's making stay within it
        begin = tl.minimum(tl.maximum(tl.load(rows_ptr + row), 0), k)
        end = tl.minimum(tl.maximum(tl.load(rows_ptr + row + 1), begin), k)
        total = add_slots(
            total, rank, values_ptr, indices_ptr, levels_ptr, w_ptr, begin, end, d, n_features,
            column, inside, offset, stride_vk, stride_ik, stride_wf, UNROLL, BLOCK,
        )  # fmt: skip
        if row == n - 1:
            for first in range(end, k, SCAN):
                at = first + tl.arange(0, SCAN)
                value = tl.load(values_ptr + at * stride_vk, mask=at < k, other=0.0)
                idle = value.to(tl.float32) == 0
                if tl.min(idle.to(tl.int32)) == 0:
                    total = add_slots(
                        total, rank, values_ptr, indices_ptr, levels_ptr, w_ptr, first,
                        tl.minimum(first + SCAN, k), d, n_features, column, inside, offset,
                        stride_vk, stride_ik, stride_wf, UNROLL, BLOCK,
                    )  # fmt: skip
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column * stride_b, mask=inside, other=0.0).to(tl.float32)
        total += bias[None, :]
    address = x_ptr + row * stride_xn + column.to(tl.int64) * stride_xd
    total -= tl.load(address, mask=inside, other=0.0).to(tl.float32)[None, :]
    used = rank < count
    squares = tl.sum(total * total, 1)
    place = (rank.to(tl.int64) * n + row) * tl.num_programs(1) + tl.program_id(1)
    tl.store(squares_ptr + place, squares, mask=used)
    error = tl.sum(tl.where((rank == count - 1)[:, None], total, 0.0), 0)
    tl.store(error_ptr + row * d + column, error, mask=inside)
    for g in range(0, count):
        share = tl.load(mix_ptr + g * stride_mg + rank * stride_mp, mask=used, other=0.0)
        share = share.to(tl.float32)[:, None]
        mixed = tl.sum(tl.where(share != 0, share * total, 0.0), 0)
        tl.store(mixed_ptr + (g * n.to(tl.int64) + row) * d + column, mixed, mask=inside)


def decode_levels(
    values: torch.Tensor,
    indices: torch.Tensor,
    row_offsets: torch.Tensor | None,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    levels: torch.Tensor,
    mix: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, d = x.shape
    count = mix.shape[0]
    if count == 0:
        raise ValueError("decode_levels: mix must be [L, L] of at least one level, got [0, 0]")
    mixed = torch.empty(count, n, d, dtype=torch.float32, device=x.device)
    error = torch.empty(n, d, dtype=torch.float32, device=x.device)
    sizes = tile(count)
    blocks = ceil_div(d, sizes["BLOCK"])
    squares = torch.empty(count, n, blocks, dtype=torch.float32, device=x.device)
    if n and d:
        strides = *values.stride(), *indices.stride()
        if row_offsets is not None:
            row_offsets, strides = row_offsets.contiguous(), (0, strides[0], 0, strides[1])
        levels = levels.contiguous().clamp(0, count - 1)
        _decode_levels_kernel[(n, blocks)](
            values, indices, row_offsets, w, bias, x, levels, mix, mixed, error, squares, n,
            values.shape[-1], d, w.shape[0], count, *strides, *w.stride(),
            0 if bias is None else bias.stride(0), *x.stride(), *mix.stride(),
            UNROLL=UNROLL, SCAN=SCAN, num_warps=WARPS, **sizes,
        )  # fmt: skip
    return mixed, error, squares.sum(-1)


def cases() -> list[Case]:
    strides = "stride_vn", "stride_in", "stride_wf", "stride_xn"
    numbers = "n", "k", "d", "n_features", "count", "stride_mg", *strides
    types = dict.fromkeys(numbers, "i32") | dict.fromkeys(("indices_ptr", "levels_ptr"), "*i64")
    names = "x_ptr", "mix_ptr", "mixed_ptr", "error_ptr", "squares_ptr"
    types |= dict.fromkeys(names, "*fp32")
    ones = "stride_vk", "stride_ik", "stride_wd", "stride_b", "stride_xd", "stride_mp"
    found = []
    for name in ("fp32", "bf16", "fp16"):
        given = types | dict.fromkeys(("values_ptr", "w_ptr", "bias_ptr"), f"*{name}")
        for count in (1, 8, 64):
            if name != "fp32" and count != 8:
                continue
            fixed = dict.fromkeys(ones, 1) | {"UNROLL": UNROLL, "SCAN": SCAN} | tile(count)
            even = ("d", *strides)
            for kind, typed, constants, divisible in (
                ("", {}, {"rows_ptr": None}, even),
                (", odd d", {}, {"rows_ptr": None}, ()),
                (", ragged", {"rows_ptr": "*i64"}, {}, even),
            ):
                found.append(
                    Case(
                        f"{name} L={count}{kind}",
                        _decode_levels_kernel,
                        given | typed,
                        fixed | constants,
                        num_warps=WARPS,
                        divisible=divisible,
                    )
                )
    return found
