# SPDX-License-Identifier: Apache-2.0
"""Encode with group maxima in the epilogue of the product: scores are never written.

The same screen as in `encode`, in another order: a matrix product keeps the maximum of every G
upper bounds, `row_topk` takes the m groups of highest maxima, and only those are multiplied again,
grouped by features (m G / F of the work, 2 to 7 %). In place of N x F scores there are N x F / G
maxima, and w_enc is read as it is, not packed. It beats panels where the product runs at their
rate: a plain Triton product must reach 92 % of cuBLAS's at d = 2304, 85 % at d = 768 (predicted).
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from . import encode
from .encode_screen import EXTRA
from .gradients import by_feature
from .offline import Case
from .row_topk import select_into

# Hopper's and Blackwell's shared memory holds three stages of a 128 x 256 tile; Ampere's registers
# and CDNA's 64 KB hold half of it
LARGE = {"BLOCK_N": 128, "BLOCK_F": 256, "BLOCK_D": 64}
SMALL = {"BLOCK_N": 128, "BLOCK_F": 128, "BLOCK_D": 32}
AGAIN = {"BLOCK_N": 128, "BLOCK_D": 32}
LAUNCH = {"num_warps": 8, "num_stages": 3}
SMALL_LAUNCH = {"num_warps": 8, "num_stages": 2}
AGAIN_LAUNCH = {"num_warps": 4, "num_stages": 2}
# Triton's interpreter multiplies the bit patterns of bf16 numbers
EXTRAN = os.environ.get("TRITON_INTERPRET") == "1"
# tiles of tokens that share a tile of features in the second-level cache
SWIZZLE = tl.constexpr(8)


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
def _product(x, w, total, EXTRAN: tl.constexpr):
    if EXTRAN:
        return tl.dot(x.to(tl.float32), w.to(tl.float32), total, input_precision="ieee")
    return tl.dot(x, w, total)


@triton.jit
def _bounds(
    x_ptr, extra_x_ptr, w_ptr, extra_w_ptr, scale_ptr, token, valid, feature, d, f, stride_x,
    stride_wf, stride_wd, stride_s,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, EXTRAN: tl.constexpr,
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
        total = _product(x, w, total, EXTRAN)
    column = tl.arange(0, EXTRA)
    address = extra_x_ptr + token[:, None].to(tl.int64) * EXTRA + column[None, :]
    x = tl.load(address, mask=valid[:, None], other=0.0)
    address = extra_w_ptr + feature[None, :].to(tl.int64) * EXTRA + column[:, None]
    w = tl.load(address, mask=(feature < f)[None, :], other=0.0)
    total = _product(x, w, total, EXTRAN)
    total = tl.where(total == total, total, float("inf"))
    return tl.where((feature < f)[None, :], total, float("-inf"))


@triton.jit(do_not_specialize=["n", "f"])
def _encode_group_max_kernel(
    x_ptr, extra_x_ptr, w_ptr, extra_w_ptr, scale_ptr, maxima_ptr, n, d, f,
    stride_x, stride_wf, stride_wd, stride_s, stride_m,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    EXTRAN: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles_f = tl.cdiv(f, BLOCK_F)
    per_band = SWIZZLE * tiles_f
    band = tl.program_id(0) // per_band
    height = tl.minimum(tiles_n - band * SWIZZLE, SWIZZLE)
    tile_n = band * SWIZZLE + (tl.program_id(0) % per_band) % height
    tile_f = (tl.program_id(0) % per_band) // height
    token = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    bounds = _bounds(
        x_ptr, extra_x_ptr, w_ptr, extra_w_ptr, scale_ptr, token, token < n, feature, d, f,
        stride_x, stride_wf, stride_wd, stride_s, BLOCK_N, BLOCK_F, BLOCK_D, EXTRAN,
    )  # fmt: skip
    maxima = tl.max(tl.reshape(bounds, [BLOCK_N, BLOCK_F // GROUP, GROUP]), 2)
    group = tile_f * (BLOCK_F // GROUP) + tl.arange(0, BLOCK_F // GROUP)
    address = maxima_ptr + token[:, None].to(tl.int64) * stride_m + group[None, :]
    inside = (token < n)[:, None] & (group * GROUP < f)[None, :]
    tl.store(address, maxima, mask=inside)


@triton.jit(do_not_specialize=["groups", "m", "f"])
def _encode_groups_again_kernel(
    x_ptr, extra_x_ptr, w_ptr, extra_w_ptr, scale_ptr, group_of_ptr, first_of_ptr, offsets_ptr,
    order_ptr, bounds_ptr, groups, m, d, f, stride_x, stride_wf, stride_wd, stride_s,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EXTRAN: tl.constexpr,
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
            stride_x, stride_wf, stride_wd, stride_s, BLOCK_N, GROUP, BLOCK_D, EXTRAN,
        )  # fmt: skip
        address = bounds_ptr + slot[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        tl.store(address, bounds.to(tl.bfloat16), mask=valid[:, None])


def product(device: torch.device) -> tuple[dict[str, int], dict[str, int]]:
    """The pinned tile of the product and its launch."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    if nvidia and torch.cuda.get_device_capability(device) >= (9, 0):
        return LARGE, LAUNCH
    return SMALL, SMALL_LAUNCH


def group_size(f: int) -> int:
    return 64 if f >= 65536 else 32


def tokens_at_once(n: int, d: int, groups: int, group: int, m: int, c: int) -> int:
    """x^, maxima, the bounds computed again, slots by group, what settling takes: in SCRATCH."""
    token_bytes = 2 * d + 8 * groups + m * (2 * group + 40) + 60 * c
    return min(n, max(16, encode.SCRATCH // token_bytes))


@torch.no_grad()
def encode_groups(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    b_dec: torch.Tensor | None,
    scale: torch.Tensor | None,
    k: int,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `encode.encode` computes, bit for bit."""
    (n, d), f = x.shape, w_enc.shape[0]
    out = x.new_empty(n, k), torch.empty(n, k, dtype=torch.int64, device=x.device)
    if n == 0:
        return out
    group = group_size(f)
    groups = triton.cdiv(f, group)
    c = encode.candidates(k, d, f, encode.rounds(x, b_dec, scale))
    m = min(groups, c)
    extra_w = torch.zeros(f, EXTRA.value, dtype=torch.bfloat16, device=x.device)
    norms = torch.empty(f, dtype=torch.float32, device=x.device)
    encode.pack(w_enc, None, scale, b_enc, None, extra_w, norms, False)
    largest = norms.max()
    tokens = tokens_at_once(n, d, groups, group, m, c)
    sizes = encode.Plan(tokens, 0, 0, min(tokens, 32))
    b = encode.Buffers(x.device, d, f, c, sizes)
    for first in range(0, n, tokens):
        here = slice(first, first + tokens)
        operands = x[here], w_enc, b_enc, b_dec, scale
        left_out = _screen(*operands[:2], *operands[3:], extra_w, group, groups, c, m, b)
        encode.settle(*operands, k, relu, c, left_out, largest, b, tuple(t[here] for t in out))
    return out


def _screen(x, w_enc, b_dec, scale, extra_w, group, groups, c, m, b) -> torch.Tensor | None:
    """Fills b.winners; returns the bound of the groups left out, if any."""
    (n, d), f = x.shape, w_enc.shape[0]
    extra_x = torch.zeros(n, EXTRA.value, dtype=torch.bfloat16, device=x.device)
    encode.pack(x, b_dec, None, None, b.x, extra_x, b.x_norms, True)
    operands = b.x, extra_x, w_enc, extra_w, scale
    strides = b.x.stride(0), *w_enc.stride(), encode.step(scale)
    maxima = torch.empty(n, groups, dtype=torch.float32, device=x.device)
    tile, launch = product(x.device)
    grid = triton.cdiv(n, tile["BLOCK_N"]) * triton.cdiv(f, tile["BLOCK_F"])
    _encode_group_max_kernel[(grid,)](
        *operands, maxima, n, d, f, *strides, groups, GROUP=group, EXTRAN=EXTRAN, **tile, **launch
    )
    best = torch.empty(n, m, dtype=torch.float32, device=x.device)
    chosen = torch.empty(n, m, dtype=torch.int64, device=x.device)
    select_into(maxima, m, best, chosen)
    offsets, order = by_feature(chosen.reshape(-1), groups)
    # chunks of BLOCK_N tokens of one group; group_of is `groups` for the programs left over
    chunks = (offsets.diff() + (AGAIN["BLOCK_N"] - 1)) // AGAIN["BLOCK_N"]
    last = chunks.cumsum(0)
    programs = groups + n * m // AGAIN["BLOCK_N"]
    numbers = torch.arange(programs, device=x.device)
    group_of = torch.searchsorted(last, numbers, right=True)
    bounds = torch.empty(n, m * group, dtype=torch.bfloat16, device=x.device)
    _encode_groups_again_kernel[(programs,)](
        *operands, group_of, last - chunks, offsets, order, bounds, groups, m, d, f, *strides,
        GROUP=group, EXTRAN=EXTRAN, **AGAIN, **AGAIN_LAUNCH,
    )  # fmt: skip
    kept = torch.empty(n, c, dtype=torch.bfloat16, device=x.device)
    places = torch.empty(n, c, dtype=torch.int64, device=x.device)
    select_into(bounds, c, kept, places)
    b.winners.scores[:n, :c] = kept
    b.winners.features[:n, :c] = chosen.gather(1, places // group) * group + places % group
    return None if m == groups else best.amin(1)


def cases() -> list[Case]:
    found = []
    for name in ("fp32", "bf16", "fp16"):
        operands = {"x_ptr": "*bf16", "extra_x_ptr": "*bf16", "w_ptr": f"*{name}"}
        operands |= {"extra_w_ptr": "*bf16", "stride_x": "i32", "stride_wf": "i32"}
        fixed = {"scale_ptr": None, "stride_wd": 1, "stride_s": 1, "EXTRAN": False}
        for group in (32, 64):
            for tile, launch, targets in (
                (LARGE, LAUNCH, ("sm_90", "sm_100")),
                (SMALL, SMALL_LAUNCH, ("sm_80", "gfx942")),
            ):
                found.append(
                    Case(
                        f"group max {name} G={group} {tile['BLOCK_F']}",
                        _encode_group_max_kernel,
                        operands
                        | {"maxima_ptr": "*fp32"}
                        | dict.fromkeys(("n", "d", "f", "stride_m"), "i32"),
                        fixed | {"GROUP": group} | tile,
                        **launch,
                        matrix=True,
                        divisible=("stride_x", "stride_wf", "d"),
                        targets=targets,
                    )
                )
            pointers = ("group_of_ptr", "first_of_ptr", "offsets_ptr", "order_ptr")
            found.append(
                Case(
                    f"again {name} G={group}",
                    _encode_groups_again_kernel,
                    operands
                    | dict.fromkeys(pointers, "*i64")
                    | {"bounds_ptr": "*bf16"}
                    | dict.fromkeys(("groups", "m", "d", "f"), "i32"),
                    fixed | {"GROUP": group} | AGAIN,
                    **AGAIN_LAUNCH,
                    matrix=True,
                    divisible=("stride_x", "stride_wf", "d"),
                )
            )
    return found
