# SPDX-License-Identifier: Apache-2.0
"""edge_mix: see mikernels/ops/pairs/edges.py.

A program is a position's readers, or some of them, and a block of columns: the transposed mask
times that block of the writers. The programs of a block of columns follow one another, so that the
writers come from the second-level cache after the first of them.
"""

from __future__ import annotations

from functools import partial

import torch
import triton.language as tl

from ..common.launch import ceil_div, kernel
from ..common.offline import Case
from ..common.products import NVIDIA, WIDEN, columns, is_deep, is_even, multiply, product_case

SMALL = {"BLOCK_R": 64, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3}
# more readers: delta is read half as often
LARGE = {"BLOCK_R": 128, "BLOCK_D": 128, "num_warps": 8, "num_stages": 3}


@kernel(do_not_specialize=["positions", "writers", "readers"])
def _edge_mix_kernel(
    base_ptr, delta_ptr, mask_ptr, out_ptr, positions, writers, readers, d,
    base_s, base_p, base_r, base_d, delta_s, delta_p, delta_w, delta_d, mask_w, mask_r,
    WIDEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    bands = tl.cdiv(readers, BLOCK_R)
    blocks = tl.cdiv(d, BLOCK_D)
    item = tl.program_id(0) // (bands * blocks)
    s, p = (item // positions).to(tl.int64), (item % positions).to(tl.int64)
    r = tl.program_id(0) % bands * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(0) // bands % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    at = column.to(tl.int64)[None, :]
    mask_rows = mask_ptr + r.to(tl.int64)[:, None] * mask_r
    rows = delta_ptr + (s * delta_s + p * delta_p) + at * delta_d
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(0, writers, BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        w64 = w.to(tl.int64)
        edges = tl.load(
            mask_rows + w64[None, :] * mask_w,
            mask=(r < readers)[:, None] & (w < writers)[None, :], other=0.0,
        )  # fmt: skip
        delta = tl.load(
            rows + w64[:, None] * delta_w,
            mask=(w < writers)[:, None] & (column < d)[None, :], other=0.0,
        )  # fmt: skip
        total = multiply(edges, delta, total, WIDEN)
    inside = (r < readers)[:, None] & (column < d)[None, :]
    r64 = r.to(tl.int64)[:, None]
    if base_ptr is not None:
        base = base_ptr + (s * base_s + p * base_p) + r64 * base_r + at * base_d
        total += tl.load(base, mask=inside, other=0.0).to(tl.float32)
    to = out_ptr + (item.to(tl.int64) * readers + r64) * d + at
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=inside)


def tile_of(large: bool, full: bool, even: bool, deep: bool) -> dict[str, int]:
    """A pinned tile: registers are short for one address per number."""
    depth = columns(full, even, deep) if even else 16
    return (LARGE if large else SMALL) | {"BLOCK_W": depth}


def edge_mix(base: torch.Tensor | None, delta: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`mikernels::edge_mix` for base [B, P, 1 or R, d], delta [B, P, W, d] and mask [W, R]."""
    (examples, positions, writers, d), readers = delta.shape, mask.shape[1]
    out = delta.new_empty(examples, positions, readers, d)
    if out.numel() == 0:
        return out
    strides = (0, 0, 0, 0) if base is None else base.expand(out.shape).stride()
    full = delta.dtype == torch.float32
    even = is_even(delta) if base is None else is_even(delta, base)
    large = even and not full and readers > 64 and torch.version.hip is None
    tile = tile_of(large, full, even, is_deep(delta.device))
    tiles = ceil_div(readers, tile["BLOCK_R"]) * ceil_div(d, tile["BLOCK_D"])
    _edge_mix_kernel[(examples * positions * tiles,)](
        base, delta, mask, out, positions, writers, readers, d, *strides, *delta.stride(),
        *mask.stride(), WIDEN=WIDEN, **tile,
    )  # fmt: skip
    return out


def cases() -> list[Case]:
    strides = "base_s", "base_p", "base_r", "delta_s", "delta_p", "delta_w"
    names = "positions", "writers", "readers", "d", *strides, "mask_w"
    types = dict.fromkeys(names, "i32")
    found = []
    for title in ("fp32", "bf16", "fp16", "large bf16", "fp32, odd sizes", "bf16, odd sizes"):
        kind, even, large = title[-4:], "odd" not in title, "large" in title
        kind = kind if even else title[:4]
        pointers = ("base_ptr", "delta_ptr", "mask_ptr", "out_ptr")
        found += product_case(
            title,
            _edge_mix_kernel,
            types | dict.fromkeys(pointers, f"*{kind}"),
            {"base_d": 1, "delta_d": 1, "mask_r": 1, "WIDEN": False},
            partial(tile_of, large, kind == "fp32", even),
            kind == "fp32",
            divisible=("d", *strides) if even else (),
            **({"targets": NVIDIA} if large else {}),
        )
    return found
