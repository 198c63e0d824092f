# SPDX-License-Identifier: Apache-2.0
"""Exact row top-k: order (value descending, index ascending), NaN first, -0 == +0.

Three kernels, one rule (`order.places`):

whole    the row fits in registers: bisect for the k-th key, scan, store.
grouped  two phases over contiguous groups of G. The k-th largest of the group maxima is at most the
         k-th score, so the k groups with the largest maxima (ties to the lower group) hold the
         answer: a group left out at a tie comes after k groups that each hold a score as large.
         One read of the row and k G elements; exact for any data, no buffer can overflow.
passes   any k and any F: the row is read again for every bit (`row_topk_passes`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import triton.language as tl

from ..._ops import ops
from ..common.launch import ceil_div, kernel, power_of_two
from ..common.offline import Case
from . import order
from .order import NOTHING, kth_key, largest_key, least_key, order_key, places
from .row_topk_passes import PASS, _row_topk_passes_kernel

# elements that a program holds in registers: 32 per thread at 8 warps
TILE = 8192
MOST_GROUPS = 8192
# bytes of group maxima; rows beyond it go to further launches
SCRATCH = 64 << 20
# k is not to compile anything anew, also as the outputs' stride; n is: where 16 divides it, a
# thread reads 16 bytes at a time, else one score
RUNTIME = ["k", "n_rows", "base", "stride_out"]


@kernel(do_not_specialize=RUNTIME)
def _row_topk_whole_kernel(
    scores_ptr, values_ptr, indices_ptr, n_rows, n, k, base,
    stride_row, stride_out,
    UNUSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < n
    address = scores_ptr + row * stride_row + column
    x = tl.load(address, mask=inside, other=0.0)
    keys = tl.where(inside, order_key(x.to(tl.float32), UNUSED), NOTHING)
    kth = kth_key(keys, k, least_key(keys), UNUSED)
    ties = k - tl.sum((keys > kth).to(tl.int32))
    taken, slot = places(keys, kth, ties, 0, 0)
    out = row * stride_out + slot
    tl.store(values_ptr + out, x, mask=taken)
    tl.store(indices_ptr + out, column + base, mask=taken)


@kernel(do_not_specialize=RUNTIME)
def _row_topk_grouped_kernel(
    scores_ptr, values_ptr, indices_ptr, maxima_ptr, n_rows, n, k, base,
    stride_row, stride_out,
    UNUSED: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    row_number = tl.program_id(0).to(tl.int64)
    scratch = maxima_ptr + row_number * GROUPS
    n_groups = tl.cdiv(n, GROUP)
    row = scores_ptr + row_number * stride_row
    # phase 1: the maximum of every group, one read of the row
    for first in range(0, n_groups, STEP):
        group = first + tl.arange(0, STEP)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = column < n
        x = tl.load(row + column, mask=inside, other=float("-inf"))
        tl.store(scratch + group, largest_key(x, UNUSED), mask=group < n_groups)
    tl.debug_barrier()
    # phase 2: the k groups whose maxima are largest, in index order
    group = tl.arange(0, GROUPS)
    maxima = tl.load(scratch + group, mask=group < n_groups, other=NOTHING)
    tau = kth_key(maxima, k, least_key(maxima), UNUSED)
    ties = k - tl.sum((maxima > tau).to(tl.int32))
    taken, slot = places(maxima, tau, ties, 0, 0)
    tl.debug_barrier()
    tl.store(scratch + slot, group, mask=taken)
    tl.debug_barrier()
    # phase 3: exact selection among those groups
    kept = tl.arange(0, KEPT)
    group = tl.load(scratch + kept, mask=kept < k, other=n_groups)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(row + column, mask=column < n, other=0.0)
    keys = tl.where(column < n, order_key(x.to(tl.float32), UNUSED), NOTHING)
    keys = tl.reshape(keys, [KEPT * GROUP])
    kth = kth_key(keys, k, tau, UNUSED)
    ties = k - tl.sum((keys > kth).to(tl.int32))
    taken, slot = places(keys, kth, ties, 0, 0)
    # addressed and loaded anew: kept in registers since the first load, they would spill
    place = tl.arange(0, KEPT * GROUP)
    column = tl.load(scratch + place // GROUP, mask=taken, other=0) * GROUP + place % GROUP
    x = tl.load(row + column, mask=taken, other=0.0)
    out = row_number * stride_out + slot
    tl.store(values_ptr + out, x, mask=taken)
    tl.store(indices_ptr + out, column + base, mask=taken)


def group_size(n: int, k: int) -> int | None:
    """The G that reads least, n / G + k G elements, within a program's registers; None if none.

    It depends on k through its power of two, so kernels are compiled once for each of those.
    """
    kept = power_of_two(k)

    def selected_from(g: int) -> float:
        return n / g + kept * g

    fitting = [
        g
        for g in (4, 8, 16, 32, 64, 128)
        # estimated: a score that is selected from costs 40 (bf16) to 80 (fp32) instructions, one
        # that is only read 5
        if 2 * selected_from(g) <= n and kept * g <= TILE and ceil_div(n, g) <= MOST_GROUPS
    ]
    return min(fitting, key=selected_from, default=None)


def warps(elements: int) -> int:
    """16 elements per thread; at 32, fp32 rows spill on sm_90."""
    return min(16, max(1, elements // 512))


@functools.lru_cache
def grouped_shape(n: int, k: int) -> Mapping[str, int] | None:
    """The pinned configuration of the grouped kernel; None where it does not apply."""
    group = group_size(n, k)
    if group is None:
        return None
    kept, groups = (power_of_two(c) for c in (k, ceil_div(n, group)))
    return {
        "GROUP": group,
        # 16 KB of loads in flight per program
        "STEP": 4096 // group,
        "GROUPS": groups,
        "KEPT": kept,
        "num_warps": max(8, warps(max(groups, kept * group))),
    }


@functools.cache
def _in_cuda(index: int) -> bool:
    """Whether the extension has CUDA C++'s selection, with code for this device."""
    return hasattr(ops, "row_topk_into_cuda") and ops.cuda_runs(index)


def select_into(
    scores: torch.Tensor, k: int, values: torch.Tensor, indices: torch.Tensor, base: int = 0
) -> None:
    """The k best of every row of scores [N, F] by index, into [N, k] of one row stride.

    `base` is added to the indices, whose dtype is that of `indices`. By CUDA C++ where it was
    built (G1, H200: 0.153 ms in fp32, Triton's 0.208; and less to do on the host), else by Triton.
    """
    if scores.is_cuda and _in_cuda(scores.device.index):
        ops.row_topk_into_cuda(scores, k, values, indices, base)
    else:
        _select_by_triton(scores, k, values, indices, base)


def _select_by_triton(
    scores: torch.Tensor, k: int, values: torch.Tensor, indices: torch.Tensor, base: int
) -> None:
    n_rows, n = scores.shape
    if n_rows == 0:
        return
    if n > 1 and scores.stride(1) != 1:
        scores = scores.contiguous()
    unused = order.UNUSED_BITS[scores.dtype]
    ends = n_rows, n, k, base, scores.stride(0), values.stride(0)
    shape = grouped_shape(n, k)
    if shape is None and n <= TILE:
        block = max(16, power_of_two(n))
        _row_topk_whole_kernel[(n_rows,)](
            scores, values, indices, *ends, UNUSED=unused, BLOCK=block, num_warps=warps(block)
        )
        return
    if shape is None:
        _row_topk_passes_kernel[(n_rows,)](
            scores, values, indices, *ends, UNUSED=unused, BLOCK=PASS, num_warps=4
        )
        return
    rows = max(1, SCRATCH // (4 * shape["GROUPS"]))
    scratch = torch.empty(
        min(rows, n_rows), shape["GROUPS"], dtype=torch.int32, device=scores.device
    )
    operands = scores, values, indices
    for first in range(0, n_rows, rows):
        # views take as long as half a launch
        part = operands if n_rows <= rows else [t[first : first + rows] for t in operands]
        _row_topk_grouped_kernel[(len(part[0]),)](*part, scratch, *ends, UNUSED=unused, **shape)


def row_topk(scores: torch.Tensor, k: int, sorted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`mikernels::row_topk` for scores [N, F]."""
    values = scores.new_empty(scores.shape[0], k)
    indices = torch.empty(values.shape, dtype=torch.int64, device=scores.device)
    _select_by_triton(scores, k, values, indices, 0)
    if not sorted:
        return values, indices
    rank = values.float().view(torch.int32).to(torch.int64)
    rank = torch.where(rank < 0, -(rank & 0x7FFFFFFF), rank).masked_fill(values.isnan(), 2**31)
    # distinct integers: (value descending, slot ascending) without trust in a sort's ties
    rank = rank * k - torch.arange(k, device=scores.device)
    by_rank = rank.argsort(dim=-1, descending=True)
    return values.gather(-1, by_rank), indices.gather(-1, by_rank)


def cases() -> list[Case]:
    types = dict.fromkeys(("n_rows", "n", "k", "base"), "i32")
    types |= {"stride_row": "i32", "stride_out": "i32", "indices_ptr": "*i64"}
    shapes = (
        (16384, 144),
        (24576, 32),
        (131072, 64),
        (131072, 256),
        (1 << 20, 64),
        (65536, 512),
        (131071, 64),
        (65535, 512),
    )
    found = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        typed = types | {"scores_ptr": f"*{name}", "values_ptr": f"*{name}"}
        fixed = {"UNUSED": order.UNUSED_BITS[dtype]}

        def add(kernel, title, n, constants, num_warps, more=None, typed=typed, fixed=fixed):
            # rows that also lie at odd strides may spill, up to 88 bytes per thread
            aligned = ("stride_row", "n") if n % 16 == 0 else ("stride_row",)
            types, constants = typed | (more or {}), fixed | constants
            case = Case(title, kernel, types, constants, num_warps, divisible=aligned)
            found.append(case)

        for n in (512, 2048, TILE, TILE - 1):
            block = power_of_two(n)
            title = f"whole {name} {n}"
            add(_row_topk_whole_kernel, title, n, {"BLOCK": block}, warps(block))
        for n, k in shapes:
            shape = grouped_shape(n, k)
            assert shape is not None
            constants = {size: c for size, c in shape.items() if size != "num_warps"}
            title, more = f"grouped {name} F={n} k={k}", {"maxima_ptr": "*i32"}
            add(_row_topk_grouped_kernel, title, n, constants, shape["num_warps"], more)
    return found
