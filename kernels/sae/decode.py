# SPDX-License-Identifier: Apache-2.0
"""Sparse decode: y[n] = sum_j values[n, j] w[indices[n, j]] + bias, by token.

One program holds a block of one token's output and gathers that block of its k rows of w, four at
a time so that as many loads are in flight. Sums run over the slots in stored order, in fp32: the
same bits every time. Slots at 0 load nothing; an index outside 0..F-1 loads nothing and gives NaN.
Of ragged codes a token has its own number of slots; those that are not in use, the last token's,
are looked through a block at a time. With `x`, the program goes on to the residual y - x and its
square, which saves the three passes over [N, d] that eager code makes of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import ceil_div, kernel
from ..common.offline import Case

UNROLL = 4
SCAN = 1024  # slots that are not in use, looked at together
# 16 elements of d per thread: a slot costs a warp some 30 instructions beside its elements' own.
# With 4 warps a program it was they that bound an H200 at G1 in bf16, 0.063 ms, not the rows; now
# 0.033. A block of 512 leaves 2304 and 4096 with few idle lanes.
CONFIG = {"BLOCK": 512, "num_warps": 1}


@triton.jit
def add_slots(
    total, values, indices, w_ptr, begin, end, d, n_features, column, offset, stride_vk, stride_ik,
    stride_wf, UNROLL: tl.constexpr,
):  # fmt: skip
    """total and the rows of slots begin..end, which lie at values and indices."""
    for first in range(begin, end, UNROLL):
        for j in tl.static_range(UNROLL):
            slot = first + j
            valid = slot < end
            value = tl.load(values + slot * stride_vk, mask=valid, other=0.0).to(tl.float32)
            index = tl.load(indices + slot * stride_ik, mask=valid, other=0)
            active = value != 0
            # an inactive slot adds nothing, whatever its row holds
            absent = tl.where(active, float("nan"), 0.0).to(w_ptr.dtype.element_ty)
            reach = tl.where(active & (index >= 0) & (index < n_features), d, 0)
            w = tl.load(w_ptr + index * stride_wf + offset, mask=column < reach, other=absent)
            total += value * w.to(tl.float32)
    return total


# not d: where 16 divides it, a thread reads four numbers of a row at a time, else one
@kernel(do_not_specialize=["k", "n_features"])
def _decode_kernel(
    values_ptr, indices_ptr, rows_ptr, w_ptr, bias_ptr, x_ptr, out_ptr, squares_ptr, k, d,
    n_features, stride_vn, stride_vk, stride_in, stride_ik, stride_wf, stride_wd, stride_b,
    stride_xn, stride_xd, UNROLL: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    offset = column.to(tl.int64) * stride_wd
    total = tl.zeros([BLOCK], tl.float32)
    if rows_ptr is None:
        total = add_slots(
            total, values_ptr + row * stride_vn, indices_ptr + row * stride_in, w_ptr, 0, k,
            d, n_features, column, offset, stride_vk, stride_ik, stride_wf, UNROLL,
        )  # fmt: skip
    else:
        # k is the number of slots; offsets of anyone's making stay within it
        begin = tl.minimum(tl.maximum(tl.load(rows_ptr + row), 0), k)
        end = tl.minimum(tl.maximum(tl.load(rows_ptr + row + 1), begin), k)
        total = add_slots(
            total, values_ptr, indices_ptr, w_ptr, begin, end, d, n_features, column, offset,
            stride_vk, stride_ik, stride_wf, UNROLL,
        )  # fmt: skip
        if row == tl.num_programs(0) - 1:
            for first in range(end, k, SCAN):
                at = first + tl.arange(0, SCAN)
                value = tl.load(values_ptr + at * stride_vk, mask=at < k, other=0.0)
                idle = value.to(tl.float32) == 0
                if tl.min(idle.to(tl.int32)) == 0:
                    total = add_slots(
                        total, values_ptr, indices_ptr, w_ptr, first, tl.minimum(first + SCAN, k),
                        d, n_features, column, offset, stride_vk, stride_ik, stride_wf, UNROLL,
                    )  # fmt: skip
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column * stride_b, mask=inside, other=0.0).to(tl.float32)
    if x_ptr is not None:
        address = x_ptr + row * stride_xn + column.to(tl.int64) * stride_xd
        total -= tl.load(address, mask=inside, other=0.0).to(tl.float32)
        square = tl.sum(tl.where(inside, total * total, 0.0))
        tl.store(squares_ptr + row * tl.num_programs(1) + tl.program_id(1), square)
    tl.store(out_ptr + row * d + column, total, mask=inside)


def _launch(values, indices, row_offsets, w, bias, x, out, squares) -> None:
    n, d = out.shape
    if n == 0 or d == 0:
        return
    strides = *values.stride(), *indices.stride()
    if row_offsets is not None:
        row_offsets, strides = row_offsets.contiguous(), (0, strides[0], 0, strides[1])
    _decode_kernel[(n, ceil_div(d, CONFIG["BLOCK"]))](
        values, indices, row_offsets, w, bias, x, out, squares, values.shape[-1], d, w.shape[0],
        *strides, *w.stride(), 0 if bias is None else bias.stride(0),
        *((0, 0) if x is None else x.stride()), UNROLL=UNROLL, SCAN=SCAN, **CONFIG,
    )  # fmt: skip


def decode(
    values: torch.Tensor,
    indices: torch.Tensor,
    row_offsets: torch.Tensor | None,
    w: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`mikernels::decode` for values and indices, [N, k] or [S], and w [F, d] of any strides."""
    n = values.shape[0] if row_offsets is None else row_offsets.shape[0] - 1
    out = values.new_empty(n, w.shape[1])
    _launch(values, indices, row_offsets, w, bias, None, out, None)
    return out


def decode_error(
    values: torch.Tensor,
    indices: torch.Tensor,
    row_offsets: torch.Tensor | None,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mikernels::decode_error`: y - x [N, d] and |y - x|^2 [N], both fp32."""
    n, d = x.shape
    error = torch.empty(n, d, dtype=torch.float32, device=x.device)
    blocks = max(1, ceil_div(d, CONFIG["BLOCK"]))
    squares = torch.empty(n, blocks, dtype=torch.float32, device=x.device)
    _launch(values, indices, row_offsets, w, bias, x, error, squares)
    return error, squares.sum(1) if d else squares.new_zeros(n)


def cases() -> list[Case]:
    strides = ("stride_vn", "stride_in", "stride_wf")
    types = dict.fromkeys(("k", "d", "n_features", *strides), "i32") | {"indices_ptr": "*i64"}
    found = []
    for name in ("fp32", "bf16", "fp16"):
        pointers = dict.fromkeys(("values_ptr", "w_ptr", "bias_ptr", "out_ptr"), f"*{name}")
        ones = dict.fromkeys(("stride_vk", "stride_ik", "stride_wd", "stride_b"), 1)
        fixed = ones | {"UNROLL": UNROLL, "SCAN": SCAN, "BLOCK": CONFIG["BLOCK"]}
        plain = {"x_ptr": None, "squares_ptr": None, "stride_xn": 1, "stride_xd": 1}
        residual = {"x_ptr": f"*{name}", "squares_ptr": "*fp32", "stride_xn": "i32"}
        for kind, typed, constants in (
            ("decode", {}, plain),
            ("decode_error", residual | {"out_ptr": "*fp32"}, {"stride_xd": 1}),
        ):
            even = ("d", *strides, *(("stride_xn",) if typed else ()))
            for title, divisible in ((f"{kind} {name}", even), (f"{kind} {name}, odd d", ())):
                found.append(
                    Case(
                        title,
                        _decode_kernel,
                        types | pointers | typed,
                        fixed | constants | {"rows_ptr": None},
                        num_warps=CONFIG["num_warps"],
                        divisible=divisible,
                    )
                )
            found.append(
                Case(
                    f"{kind} {name}, ragged",
                    _decode_kernel,
                    types | pointers | typed | {"rows_ptr": "*i64"},
                    fixed | constants,
                    num_warps=CONFIG["num_warps"],
                    divisible=even,
                )
            )
    return found
