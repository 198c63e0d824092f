# SPDX-License-Identifier: Apache-2.0
"""The sum of squares of projected gradients, for clipping: one read, in fp64.

A partial sum a row (or a block, where rows do not matter), then torch's sum of those: no atomics,
the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import ceil_div, kernel, power_of_two
from ..common.offline import Case

# a row of at most this many elements is held in registers; a wider one is swept in tiles
WHOLE, TILE = 8192, 4096
# block of a flat matrix
FLAT = 4096


def warps_of(block: int) -> int:
    """16 elements per thread: a row and its moments take about 100 registers."""
    return max(1, min(16, block // 512))


@triton.jit
def product_sum(a, b):
    return tl.sum(a.to(tl.float64) * b.to(tl.float64))


@kernel()
def _sumsq_flat_kernel(grad_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grad_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), product_sum(g, g))


@kernel()
def _sumsq_rows_kernel(
    grad_ptr, param_ptr, out_ptr, d, WHOLE_ROW: tl.constexpr, BLOCK: tl.constexpr
):
    """Of the difference g - <g, p> p itself: expanding it cancels when g is almost along p."""
    row = tl.program_id(0).to(tl.int64) * d
    column = tl.arange(0, BLOCK)
    if WHOLE_ROW:
        inside = column < d
        g = tl.load(grad_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(param_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
        g -= product_sum(g, p).to(tl.float32) * p
        total = product_sum(g, g)
    else:
        along = tl.full((), 0.0, tl.float64)
        for start in range(0, d, BLOCK):
            at = start + column
            g = tl.load(grad_ptr + row + at, mask=at < d, other=0.0).to(tl.float32)
            p = tl.load(param_ptr + row + at, mask=at < d, other=0.0).to(tl.float32)
            along += product_sum(g, p)
        total = tl.full((), 0.0, tl.float64)
        for start in range(0, d, BLOCK):
            at = start + column
            g = tl.load(grad_ptr + row + at, mask=at < d, other=0.0).to(tl.float32)
            p = tl.load(param_ptr + row + at, mask=at < d, other=0.0).to(tl.float32)
            g -= along.to(tl.float32) * p
            total += product_sum(g, g)
    tl.store(out_ptr + tl.program_id(0), total)


def check_operands(op: str, param: torch.Tensor, grad: torch.Tensor) -> None:
    """What the kernels read is there: a matrix, and a gradient of its shape."""
    if param.dim() != 2 or grad.shape != param.shape or not param.is_contiguous():
        raise RuntimeError(
            f"{op}: expected a contiguous parameter [R, C] and a gradient of its shape, got "
            f"{list(param.shape)} with strides {list(param.stride())} and {list(grad.shape)}"
        )
    if grad.dtype not in (param.dtype, torch.float32) or param.dtype == torch.float64:
        raise RuntimeError(
            f"{op}: impl='triton' takes a float32, bfloat16 or float16 parameter and a gradient of "
            f"its dtype or float32, got {param.dtype} and {grad.dtype}; use impl='reference'"
        )


def grad_sumsq(grad: torch.Tensor, param: torch.Tensor, project: bool) -> torch.Tensor:
    check_operands("grad_sumsq", param, grad)
    rows, d = param.shape
    count = rows if project else ceil_div(param.numel(), FLAT)
    partial = torch.empty(count, dtype=torch.float64, device=param.device)
    grad = grad.contiguous()
    if param.numel() == 0:
        partial.zero_()
    elif project:
        whole = d <= WHOLE
        block = power_of_two(d) if whole else TILE
        _sumsq_rows_kernel[(rows,)](
            grad, param, partial, d, whole, block, num_warps=warps_of(block)
        )
    else:
        _sumsq_flat_kernel[(count,)](grad, partial, param.numel(), FLAT, num_warps=warps_of(FLAT))
    return partial.sum()


def cases() -> list[Case]:
    found = []
    for param, grad, widths in (
        ("fp32", "fp32", (577, 2304, 8191, WHOLE + 1)),
        ("bf16", "fp32", (2304,)),
        ("bf16", "bf16", (2304,)),
        ("fp16", "fp32", (2304,)),
    ):
        types = {"grad_ptr": f"*{grad}", "param_ptr": f"*{param}", "out_ptr": "*fp64", "d": "i32"}
        for d in widths:
            block = power_of_two(d) if d <= WHOLE else TILE
            constants = {"WHOLE_ROW": d <= WHOLE, "BLOCK": block}
            even = ("d",) if d % 16 == 0 else ()
            name, warps = f"rows {param} from {grad} d={d}", warps_of(block)
            found.append(Case(name, _sumsq_rows_kernel, types, constants, warps, divisible=even))
    for grad in ("fp32", "bf16", "fp16"):
        types = {"grad_ptr": f"*{grad}", "out_ptr": "*fp64", "n": "i64"}
        name, warps = f"flat {grad}", warps_of(FLAT)
        found.append(Case(name, _sumsq_flat_kernel, types, {"BLOCK": FLAT}, warps))
    return found
