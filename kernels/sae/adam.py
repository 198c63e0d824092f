# SPDX-License-Identifier: Apache-2.0
"""Row-fused Adam: one read and one write of every number.

Three kernels for one formula (`mikernels/ops/sae/adam.py`), chosen by shape alone:

row    a constrained row fits in registers: projection, update and norm need one read.
wide   a constrained row does not: three sweeps of it, the last two mostly from L2.
flat   rows without constraint are no rows: blocks of the flat matrix, so that a bias of 1M entries,
       one row, keeps the whole GPU busy as well.

lr, step and clip are read on the device. Sums run in fp64, as on the CPU: 7 such operations beside
28 bytes of memory.
"""

from __future__ import annotations

import ctypes

import torch
import triton
import triton.language as tl

from ..common.launch import ceil_div, kernel, power_of_two
from ..common.offline import Case
from .adam_sumsq import TILE, WHOLE, check_operands, product_sum, warps_of

# block of a flat matrix: 8 elements per thread, two 16-byte loads of fp32
FLAT, FLAT_WARPS = 1024, 4


@kernel()
def _coefficients_kernel(
    lr_ptr, step_ptr, out_ptr, beta1_high, beta1_low, beta2_high, beta2_low
):  # fmt: skip
    """out: lr / (1 - beta1^t) and (1 - beta2^t)^-1/2 in fp32, from powers in fp64."""
    t = tl.load(step_ptr).to(tl.int64)
    # a number reaches a kernel as fp32; two of them are 48 bits, where 1 - beta needs them
    zero = tl.full((), 0.0, tl.float64)
    square1, square2 = zero + beta1_high + beta1_low, zero + beta2_high + beta2_low
    power1, power2 = zero + 1, zero + 1
    while t > 0:
        power1 = tl.where((t & 1) == 1, power1 * square1, power1)
        power2 = tl.where((t & 1) == 1, power2 * square2, power2)
        square1 *= square1
        square2 *= square2
        t = t >> 1
    step_size = tl.load(lr_ptr).to(tl.float64) / (1 - power1)
    tl.store(out_ptr, step_size.to(tl.float32))
    tl.store(out_ptr + 1, (1 / tl.sqrt(1 - power2)).to(tl.float32))


@triton.jit
def next_moments(g, m, v, rest1, beta2, rest2):
    """rest = 1 - beta, rounded from fp64: in fp32 1 - 0.999 is off by 1.3e-5."""
    return m + rest1 * (g - m), beta2 * v + rest2 * g * g


@triton.jit
def moved(p, m, v, coefficients_ptr, eps):
    step_size, correction = tl.load(coefficients_ptr), tl.load(coefficients_ptr + 1)
    return p - tl.div_rn(step_size * m, tl.sqrt_rn(v) * correction + eps)


@triton.jit
def shrinkage(squares):
    """1 / norm, and 1 for a zero row, which stays."""
    return tl.where(squares > 0, 1 / tl.sqrt(tl.where(squares > 0, squares, 1.0)), 1.0)


@kernel()
def _adam_flat_kernel(
    param_ptr, grad_ptr, m_ptr, v_ptr, coefficients_ptr, clip_ptr, n,
    rest1, beta2, rest2, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    p = tl.load(param_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    g *= tl.load(clip_ptr).to(tl.float32)
    m, v = next_moments(g, m, v, rest1, beta2, rest2)
    p = moved(p, m, v, coefficients_ptr, eps)
    tl.store(m_ptr + at, m, mask=inside)
    tl.store(v_ptr + at, v, mask=inside)
    tl.store(param_ptr + at, p.to(param_ptr.dtype.element_ty), mask=inside)


@kernel()
def _adam_row_kernel(
    param_ptr, grad_ptr, m_ptr, v_ptr, coefficients_ptr, clip_ptr, d,
    rest1, beta2, rest2, eps,
    PROJECT: tl.constexpr, UNIT_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < d
    at = tl.program_id(0).to(tl.int64) * d + column
    p = tl.load(param_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    if PROJECT:
        g -= product_sum(g, p).to(tl.float32) * p
    g *= tl.load(clip_ptr).to(tl.float32)
    m, v = next_moments(g, m, v, rest1, beta2, rest2)
    p = moved(p, m, v, coefficients_ptr, eps)
    if UNIT_NORM:
        # beyond the row 0 / eps, which is NaN for eps = 0
        rest = tl.where(inside, p, 0.0)
        p *= shrinkage(product_sum(rest, rest)).to(tl.float32)
    tl.store(m_ptr + at, m, mask=inside)
    tl.store(v_ptr + at, v, mask=inside)
    tl.store(param_ptr + at, p.to(param_ptr.dtype.element_ty), mask=inside)


@kernel()
def _adam_wide_kernel(
    param_ptr, grad_ptr, m_ptr, v_ptr, coefficients_ptr, clip_ptr, d,
    rest1, beta2, rest2, eps,
    PROJECT: tl.constexpr, UNIT_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * d
    clip = tl.load(clip_ptr).to(tl.float32)
    along = tl.full((), 0.0, tl.float64)
    if PROJECT:
        for start in range(0, d, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < d
            p = tl.load(param_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(grad_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
            along += product_sum(g, p)
    squares = tl.full((), 0.0, tl.float64)
    for start in range(0, d, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < d
        at = row + column
        p = tl.load(param_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
        g = clip * (g - along.to(tl.float32) * p)
        m, v = next_moments(g, m, v, rest1, beta2, rest2)
        tl.store(m_ptr + at, m, mask=inside)
        tl.store(v_ptr + at, v, mask=inside)
        rest = tl.where(inside, moved(p, m, v, coefficients_ptr, eps), 0.0)
        squares += product_sum(rest, rest)
    shrink = shrinkage(squares).to(tl.float32)
    tl.debug_barrier()
    # the same arithmetic again: a parameter kept in its own dtype in between would round twice
    for start in range(0, d, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < d
        at = row + column
        p = tl.load(param_ptr + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
        p = moved(p, m, v, coefficients_ptr, eps)
        if UNIT_NORM:
            p *= shrink
        tl.store(param_ptr + at, p.to(param_ptr.dtype.element_ty), mask=inside)


def adam_rows_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    step: torch.Tensor,
    clip: torch.Tensor,
    project: bool,
    unit_norm: bool,
) -> None:
    check_operands("adam_rows_", param, grad)
    for state in (exp_avg, exp_avg_sq):
        if state.shape != param.shape or state.dtype != torch.float32 or not state.is_contiguous():
            raise RuntimeError(
                f"adam_rows_: exp_avg and exp_avg_sq must be contiguous float32 "
                f"{list(param.shape)}, got {state.dtype} {list(state.shape)}"
            )
    if param.numel() == 0:
        return
    rows, d = param.shape
    coefficients = torch.empty(2, dtype=torch.float32, device=param.device)
    _coefficients_kernel[(1,)](lr, step, coefficients, *halves(beta1), *halves(beta2), num_warps=1)
    operands = param, grad.contiguous(), exp_avg, exp_avg_sq, coefficients, clip
    constants = 1 - beta1, beta2, 1 - beta2, eps
    if not project and not unit_norm:
        grid = (ceil_div(param.numel(), FLAT),)
        _adam_flat_kernel[grid](*operands, param.numel(), *constants, FLAT, num_warps=FLAT_WARPS)
        return
    # at odd widths every element has its own addresses, and 8192 of them spill
    whole = d <= (WHOLE if d % 16 == 0 else WHOLE // 2)
    block = power_of_two(d) if whole else TILE
    by_row = _adam_row_kernel if whole else _adam_wide_kernel
    by_row[(rows,)](*operands, d, *constants, project, unit_norm, block, num_warps=warps_of(block))


def halves(value: float) -> tuple[float, float]:
    """Two fp32 numbers whose sum is an fp64 number, to 48 bits."""
    high = ctypes.c_float(value).value
    return high, value - high


def cases() -> list[Case]:
    numbers = dict.fromkeys(("rest1", "beta2", "rest2", "eps"), "fp32")
    fixed = {"m_ptr": "*fp32", "v_ptr": "*fp32", "coefficients_ptr": "*fp32", **numbers}
    halved = dict.fromkeys(("beta1_high", "beta1_low", "beta2_high", "beta2_low"), "fp32")
    flags = {"PROJECT": True, "UNIT_NORM": True}
    found = []
    for lr, step in (("fp32", "i64"), ("fp64", "i64"), ("fp32", "fp32")):
        types = {"lr_ptr": f"*{lr}", "step_ptr": f"*{step}", "out_ptr": "*fp32", **halved}
        name = f"coefficients {lr} {step}"
        found.append(Case(name, _coefficients_kernel, types, num_warps=1))
    for param, grad, widths in (
        ("fp32", "fp32", (577, 768, 2304, 4095, 8192)),
        ("bf16", "fp32", (2304, 4095)),
        ("bf16", "bf16", (768,)),
        ("fp16", "fp32", (768,)),
    ):
        types = {"param_ptr": f"*{param}", "grad_ptr": f"*{grad}", "clip_ptr": "*fp64", **fixed}
        name = f"{param} from {grad}"
        flat = types | {"n": "i64"}
        found.append(Case(f"flat {name}", _adam_flat_kernel, flat, {"BLOCK": FLAT}, FLAT_WARPS))
        types["d"] = "i32"
        for d in widths:
            constants = flags | {"BLOCK": power_of_two(d)}
            warps = warps_of(constants["BLOCK"])
            even = ("d",) if d % 16 == 0 else ()
            row = f"row {name} d={d}"
            found.append(Case(row, _adam_row_kernel, types, constants, warps, divisible=even))
        wide = flags | {"BLOCK": TILE}
        found.append(Case(f"wide {name}", _adam_wide_kernel, types, wide, warps_of(TILE)))
    return found
