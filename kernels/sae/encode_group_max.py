# SPDX-License-Identifier: Apache-2.0
"""Device code of `encode_groups`: the product that keeps maxima, and parts of it again."""

import triton
import triton.language as tl

from ..common.launch import kernel
from ..common.offline import Case
from ..common.products import multiply, tile_at
from .encode_screen import EXTRA

# Hopper's and Blackwell's shared memory holds three stages of a 128 x 256 tile; Ampere's registers
# and CDNA's 64 KB hold half of it
LARGE = {"BLOCK_N": 128, "BLOCK_F": 256, "BLOCK_D": 64}
SMALL = {"BLOCK_N": 128, "BLOCK_F": 128, "BLOCK_D": 32}
AGAIN = {"BLOCK_N": 128, "BLOCK_D": 32}
# where d or a stride is no multiple of 16, each number has an address, and more of them spill
ODD_AGAIN = {"BLOCK_N": 64, "BLOCK_D": 32}
LAUNCH = {"num_warps": 8, "num_stages": 3}
SMALL_LAUNCH = {"num_warps": 8, "num_stages": 2}
AGAIN_LAUNCH = {"num_warps": 4, "num_stages": 2}


@triton.jit
def _weights(w_ptr, scale_ptr, feature, column, inside, stride_wf, stride_wd, stride_s, f):
    """bf16 of scale w, transposed [d, features], rounded as the packed operand is."""
    address = w_ptr + feature[None, :].to(tl.int64) * stride_wf
    address += column[:, None].to(tl.int64) * stride_wd
    w = tl.load(address, mask=inside[:, None] & (feature < f)[None, :], other=0.0)
    if scale_ptr is not None:
        factor = tl.load(scale_ptr + feature * stride_s, mask=feature < f, other=0.0)
        w = w.to(tl.float32) * factor.to(tl.float32)[None, :]
    return w.to(tl.bfloat16)


@triton.jit
def _bounds(
    x_ptr, extra_x_ptr, w_ptr, extra_w_ptr, scale_ptr, token, valid, feature, d, f, stride_x,
    stride_wf, stride_wd, stride_s,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Upper bounds [tokens, features] in fp32; NaN is +inf, features beyond F are -inf."""
    total = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for first in range(0, d, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        address = x_ptr + token[:, None].to(tl.int64) * stride_x + column[None, :]
        x = tl.load(address, mask=valid[:, None] & (column < d)[None, :], other=0.0)
        w = _weights(
            w_ptr, scale_ptr, feature, column, column < d, stride_wf, stride_wd, stride_s, f
        )
        total = multiply(x, w, total, WIDEN)
    column = tl.arange(0, EXTRA)
    address = extra_x_ptr + token[:, None].to(tl.int64) * EXTRA + column[None, :]
    x = tl.load(address, mask=valid[:, None], other=0.0)
    address = extra_w_ptr + feature[None, :].to(tl.int64) * EXTRA + column[:, None]
    w = tl.load(address, mask=(feature < f)[None, :], other=0.0)
    total = multiply(x, w, total, WIDEN)
    total = tl.where(total == total, total, float("inf"))
    return tl.where((feature < f)[None, :], total, float("-inf"))


@kernel(do_not_specialize=["n", "f"])
def _encode_group_max_kernel(
    x_ptr, extra_x_ptr, w_ptr, extra_w_ptr, scale_ptr, maxima_ptr, n, d, f,
    stride_x, stride_wf, stride_wd, stride_s, stride_m,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    tile_n, tile_f = tile_at(tl.program_id(0), tl.cdiv(n, BLOCK_N), tl.cdiv(f, BLOCK_F))
    token = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    bounds = _bounds(
        x_ptr, extra_x_ptr, w_ptr, extra_w_ptr, scale_ptr, token, token < n, feature, d, f,
        stride_x, stride_wf, stride_wd, stride_s, BLOCK_N, BLOCK_F, BLOCK_D, WIDEN,
    )  # fmt: skip
    maxima = tl.max(tl.reshape(bounds, [BLOCK_N, BLOCK_F // GROUP, GROUP]), 2)
    group = tile_f * (BLOCK_F // GROUP) + tl.arange(0, BLOCK_F // GROUP)
    address = maxima_ptr + token[:, None].to(tl.int64) * stride_m + group[None, :]
    inside = (token < n)[:, None] & (group * GROUP < f)[None, :]
    tl.store(address, maxima, mask=inside)


@kernel(do_not_specialize=["groups", "m", "f"])
def _encode_groups_again_kernel(
    x_ptr, extra_x_ptr, w_ptr, extra_w_ptr, scale_ptr, group_of_ptr, first_of_ptr, offsets_ptr,
    order_ptr, bounds_ptr, groups, m, d, f, stride_x, stride_wf, stride_wd, stride_s,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The bounds of one group for BLOCK_N of the tokens that kept it."""
    group = tl.load(group_of_ptr + tl.program_id(0)).to(tl.int32)
    # the grid is as large as it can get: the host does not know how the groups are spread
    if group < groups:
        begin = tl.load(offsets_ptr + group)
        end = tl.load(offsets_ptr + group + 1)
        chunk = tl.program_id(0) - tl.load(first_of_ptr + group)
        place = begin + chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = place < end
        slot = tl.load(order_ptr + place, mask=valid, other=0)
        feature = group * GROUP + tl.arange(0, GROUP)
        bounds = _bounds(
            x_ptr, extra_x_ptr, w_ptr, extra_w_ptr, scale_ptr, slot // m, valid, feature, d, f,
            stride_x, stride_wf, stride_wd, stride_s, BLOCK_N, GROUP, BLOCK_D, WIDEN,
        )  # fmt: skip
        address = bounds_ptr + slot[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        tl.store(address, bounds.to(tl.bfloat16), mask=valid[:, None])


def _product_cases(name: str, types: dict, fixed: dict) -> list[Case]:
    every = ("sm_80", "sm_90", "sm_100", "gfx942")
    sizes = types | {"maxima_ptr": "*fp32"} | dict.fromkeys(("n", "d", "f", "stride_m"), "i32")
    return [
        Case(
            f"group max {name}{title}",
            _encode_group_max_kernel,
            sizes,
            fixed | tile,
            **launch,
            matrix=True,
            divisible=divisible,
            targets=targets,
        )
        for title, tile, launch, divisible, targets in (
            (" large", LARGE, LAUNCH, ("stride_x", "stride_wf", "d"), ("sm_90", "sm_100")),
            ("", SMALL, SMALL_LAUNCH, ("stride_x", "stride_wf", "d"), ("sm_80", "gfx942")),
            (", odd sizes", SMALL, SMALL_LAUNCH, ("stride_x",), every),
        )
    ]


def _again_cases(name: str, types: dict, fixed: dict) -> list[Case]:
    pointers = ("group_of_ptr", "first_of_ptr", "offsets_ptr", "order_ptr")
    sizes = types | dict.fromkeys(pointers, "*i64") | {"bounds_ptr": "*bf16"}
    return [
        Case(
            f"again {name}{title}",
            _encode_groups_again_kernel,
            sizes | dict.fromkeys(("groups", "m", "d", "f"), "i32"),
            fixed | tile,
            **AGAIN_LAUNCH,
            matrix=True,
            divisible=divisible,
        )
        for title, tile, divisible in (
            ("", AGAIN, ("stride_x", "stride_wf", "d")),
            (", odd sizes", ODD_AGAIN, ("stride_x",)),
        )
    ]


def cases() -> list[Case]:
    found = []
    for dtype in ("fp32", "bf16", "fp16"):
        types = {"x_ptr": "*bf16", "extra_x_ptr": "*bf16", "w_ptr": f"*{dtype}"}
        types |= {"extra_w_ptr": "*bf16", "stride_x": "i32", "stride_wf": "i32"}
        fixed = {"scale_ptr": None, "stride_wd": 1, "stride_s": 1, "WIDEN": False}
        for group in (32, 64):
            name = f"{dtype} G={group}"
            found += _product_cases(name, types, fixed | {"GROUP": group})
            found += _again_cases(name, types, fixed | {"GROUP": group})
    return found
