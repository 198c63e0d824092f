# SPDX-License-Identifier: Apache-2.0
"""pair_products_: see mikernels/ops/pairs/pair_products.py.

A program is a tile of pairs and a part of the sum over (s, p, D). Where tiles are many, the part is
all of the sum and is added to `out` at once; where they are few, or examples have weights, parts go
to a workspace [parts, n, m] that a second kernel adds up in order. Their number depends on shapes
alone, so that the same call gives the same bits. All sums are in fp32.

Numbers in fp32 (a * scale, or the rows of `edge_heads`) against bf16 take two matrix products (a
product of bf16 numbers has 16 bits) or three, those of fp32 six: see `multiply`.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from ..common.launch import ceil_div, kernel
from ..common.offline import Case
from ..common.products import (
    NVIDIA,
    WIDE,
    WIDEN,
    columns,
    halves,
    is_deep,
    is_even,
    multiply,
    product_case,
    tile_at,
)
from .pair_products_sum import add_parts

LARGE = {"BLOCK_N": 128, "BLOCK_M": 128, "num_warps": 8, "num_stages": 3}
# for CDNA's 64 KB of shared memory, and where half of a large tile would be empty
SMALL = {"BLOCK_N": 64, "BLOCK_M": 64, "num_warps": 4, "num_stages": 3}
# programs that fill the largest GPU, and the steps below which a part is not worth its tile
PROGRAMS, LEAST_STEPS = 512, 8
SCRATCH = 64 << 20


@triton.jit
def _store(
    total, i, number, to_ptr, prefix_ptr, n, m, prefix_m, to_n, to_m,
    SYMMETRIC: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """Adds to `out`, the other triangle included, or fills a part of the workspace."""
    j = number * total.shape[1] + tl.arange(0, total.shape[1])
    inside = (i < n)[:, None] & (j < m)[None, :]
    if prefix_ptr is not None:
        limit = tl.load(prefix_ptr + j * prefix_m, mask=j < m, other=0)
        inside = inside & (i[:, None] < limit[None, :])
    if DIRECT and SYMMETRIC:
        inside = inside & (i[:, None] <= j[None, :])
    row, column = i.to(tl.int64)[:, None], j.to(tl.int64)[None, :]
    to = to_ptr + row * to_n + column * to_m
    if DIRECT:
        tl.store(to, tl.load(to, mask=inside, other=0.0) + total, mask=inside)
        if SYMMETRIC:
            inside = inside & (i[:, None] < j[None, :])
            to = to_ptr + column * to_n + row * to_m
            tl.store(to, tl.load(to, mask=inside, other=0.0) + total, mask=inside)
    else:
        tl.store(to, total, mask=inside)


@triton.jit
def add_tile(
    total, i, tile_m, to_ptr, prefix_ptr, n, m, prefix_m, to_n, to_m,
    SYMMETRIC: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """A quarter at a time: the addresses of 64 numbers would fill a thread's registers."""
    more = to_ptr, prefix_ptr, n, m, prefix_m, to_n, to_m, SYMMETRIC, DIRECT
    left, right = halves(total)
    first, second = halves(left)
    third, fourth = halves(right)
    _store(first, i, tile_m * 4, *more)
    _store(second, i, tile_m * 4 + 1, *more)
    _store(third, i, tile_m * 4 + 2, *more)
    _store(fourth, i, tile_m * 4 + 3, *more)


@kernel(do_not_specialize=["n", "m", "positions", "steps", "chunk", "splits", "prefix_m"])
def _pair_products_kernel(
    a_ptr, b_ptr, scale_ptr, prefix_ptr, to_ptr, n, m, d, positions, steps, chunk, splits,
    a_s, a_p, a_n, a_d, b_s, b_p, b_m, b_d, scale_d, prefix_m, to_n, to_m,
    SYMMETRIC: tl.constexpr, DIRECT: tl.constexpr, PIECES: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Part g * splits + c: steps c * chunk.. of group g, which has `steps` blocks of D in all."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles = tl.cdiv(n, BLOCK_N) * tiles_m
    part = tl.program_id(0) // tiles
    tile_n, tile_m = tile_at(tl.program_id(0) % tiles, tl.cdiv(n, BLOCK_N), tiles_m)
    i, j = tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    wanted = tile_n >= 0
    if SYMMETRIC:
        wanted = tile_n * BLOCK_N < (tile_m + 1) * BLOCK_M
    if prefix_ptr is not None:
        limit = tl.load(prefix_ptr + j * prefix_m, mask=j < m, other=0)
        wanted = tile_n * BLOCK_N < tl.max(limit)
    if wanted:
        blocks = tl.cdiv(d, BLOCK_D)
        first_item = part // splits * (steps // blocks)
        begin = part % splits * chunk
        rows = i.to(tl.int64)[:, None] * a_n
        columns = j.to(tl.int64)[None, :] * b_m
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        # one loop rather than three, so that loads run ahead over the ends of rows
        for step in range(begin, tl.minimum(begin + chunk, steps)):
            item = first_item + step // blocks
            s, p = (item // positions).to(tl.int64), (item % positions).to(tl.int64)
            e = step % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
            at = e.to(tl.int64)
            x = tl.load(
                a_ptr + (s * a_s + p * a_p) + rows + at[None, :] * a_d,
                mask=(i < n)[:, None] & (e < d)[None, :], other=0.0,
            )  # fmt: skip
            y = tl.load(
                b_ptr + (s * b_s + p * b_p) + columns + at[:, None] * b_d,
                mask=(e < d)[:, None] & (j < m)[None, :], other=0.0,
            )  # fmt: skip
            if scale_ptr is not None:
                factor = tl.load(scale_ptr + at * scale_d, mask=e < d, other=0.0)
                x = x.to(tl.float32) * factor.to(tl.float32)[None, :]
            if x.dtype != y.dtype and y.dtype == tl.float16:
                # its range is not that of bf16 pieces
                y = y.to(tl.float32)
            total = multiply(x, y, total, WIDEN, PIECES)
        if not DIRECT:
            to_ptr += part.to(tl.int64) * n * to_n
        add_tile(
            total, i, tile_m, to_ptr, prefix_ptr, n, m, prefix_m, to_n, to_m, SYMMETRIC, DIRECT
        )


def tile_of(large: bool, narrow: bool, full: bool, even: bool, deep: bool) -> dict[str, int]:
    """A pinned tile, with the columns of `products.columns`."""
    tile = (WIDE if full else LARGE) if large else SMALL
    return tile | ({"BLOCK_M": 32} if narrow else {}) | {"BLOCK_D": columns(full, even, deep)}


def pair_products_(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: torch.Tensor | None,
    weights: torch.Tensor | None,
    prefix: torch.Tensor | None,
    symmetric: bool,
    out: torch.Tensor,
) -> None:
    """`mikernels::pair_products_`; a may also be fp32 where b is not.

    Weights cost S n m numbers written, and read once for every 16 of the Q, in pieces of SCRATCH;
    a and b are read as without them.
    """
    (examples, positions, n, d), m, q = a.shape, b.shape[2], out.shape[0]
    if 0 in (examples, positions, d, out.numel()):
        return
    # a prefix leaves out other pairs above the diagonal than below
    symmetric = symmetric and prefix is None
    full = scale is not None or a.dtype == torch.float32
    # a product of two bf16 numbers has 16 bits
    pieces = 2 if scale is not None and a.dtype == torch.bfloat16 else 3
    even = is_even(a, b)
    large = even and torch.version.hip is None and n > 64 and (full or m > 64)
    # six products of what is not there would take longer than reading what is
    narrow = even and full and m <= 32
    tile = tile_of(large, narrow, full, even, is_deep(a.device))
    tiles = ceil_div(n, tile["BLOCK_N"]) * ceil_div(m, tile["BLOCK_M"])
    groups = 1 if weights is None else examples
    steps = examples // groups * positions * ceil_div(d, tile["BLOCK_D"])
    most = max(1, SCRATCH // (4 * n * m))
    splits = min(ceil_div(PROGRAMS, tiles * groups), ceil_div(steps, LEAST_STEPS), most)
    chunk = ceil_div(steps, splits)
    splits = ceil_div(steps, chunk)
    direct = weights is None and q == splits == 1
    at_once = min(groups, max(1, most // splits))
    to = out[0]
    if not direct:
        to = torch.empty(at_once, splits, n, m, dtype=torch.float32, device=a.device)
    for first in range(0, groups, at_once):
        count = min(at_once, groups - first)
        here = slice(first, first + count) if groups > 1 else slice(None)
        _pair_products_kernel[(tiles * count * splits,)](
            a[here], b[here], scale, prefix, to, n, m, d, positions, steps, chunk, splits,
            *a.stride(), *b.stride(), 0 if scale is None else scale.stride(0),
            0 if prefix is None else prefix.stride(0), *to.stride()[-2:],
            SYMMETRIC=symmetric, DIRECT=direct, PIECES=pieces, WIDEN=WIDEN, **tile,
        )  # fmt: skip
        if not direct:
            mine = None if weights is None else weights[:, here]
            add_parts(to[:count], mine, prefix, symmetric, out)


def cases() -> list[Case]:
    strides = [f"{t}_{axis}" for t, axes in (("a", "spn"), ("b", "spm")) for axis in axes]
    sizes = ["n", "m", "d", "positions", "steps", "chunk", "splits", *strides, "prefix_m", "to_n"]
    types = dict.fromkeys(sizes, "i32") | {"prefix_ptr": "*i64", "to_ptr": "*fp32"}
    fixed = dict.fromkeys(("a_d", "b_d", "scale_d", "to_m"), 1) | {"WIDEN": False}
    added = {"SYMMETRIC": True, "DIRECT": True, "prefix_ptr": None}
    found = []
    for title, a, b, pieces in (
        ("fp32", "fp32", "fp32", 3),
        ("large fp32 symmetric", "fp32", "fp32", 3),
        ("narrow fp32", "fp32", "fp32", 3),
        ("large narrow fp32", "fp32", "fp32", 3),
        ("fp32, odd sizes", "fp32", "fp32", 3),
        ("bf16", "bf16", "bf16", 3),
        ("bf16, odd sizes", "bf16", "bf16", 3),
        ("large bf16", "bf16", "bf16", 3),
        ("large bf16 symmetric", "bf16", "bf16", 3),
        ("large fp16", "fp16", "fp16", 3),
        ("fp16 scaled", "fp16", "fp16", 3),
        ("bf16 scaled", "bf16", "bf16", 2),
        ("large bf16 scaled symmetric", "bf16", "bf16", 2),
        ("bf16, rows in full", "fp32", "bf16", 3),
        ("large bf16, rows in full", "fp32", "bf16", 3),
    ):
        large, even = "large" in title, "odd" not in title
        full = a == "fp32" or "scaled" in title
        constants = fixed | {"PIECES": pieces}
        constants |= added if "symmetric" in title else {"SYMMETRIC": False, "DIRECT": False}
        pointers = {"a_ptr": f"*{a}", "b_ptr": f"*{b}"}
        if "scaled" in title:
            pointers["scale_ptr"] = f"*{a}"
        else:
            constants["scale_ptr"] = None
        more = {"divisible": ("d", *strides) if even else ()}
        if large:
            more["targets"] = NVIDIA
        found += product_case(
            title,
            _pair_products_kernel,
            types | pointers,
            constants,
            partial(tile_of, large, "narrow" in title, full, even),
            full,
            **more,
        )
    return found
