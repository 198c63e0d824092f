# SPDX-License-Identifier: Apache-2.0
"""gram_products_: see mikernels/ops/pairs/grad_gram.py.

A program is a tile of pairs of samples and a part of the positions t. For each (t, s), two products
of rows, of inputs and of gradients, are made in registers, multiplied there and added to the tile.
Where tiles are many, or there is one position, the tile is added to `out` at once; where they are
few, positions are shared out, and the parts added up in order. Sums are in fp32.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from ..common.launch import ceil_div, kernel
from ..common.offline import Case
from ..common.products import (
    WIDE,
    WIDEN,
    columns,
    is_deep,
    is_even,
    multiply,
    product_case,
    tile_at,
)
from .pair_products import add_tile
from .pair_products_sum import add_parts

# where 16 bytes cannot be read at a time, addresses take the registers of half a tile
ODD = {"BLOCK_N": 64, "BLOCK_M": 64, "num_warps": 8, "num_stages": 3}
# programs that fill the largest GPU, and bytes of parts
PROGRAMS, SCRATCH = 256, 64 << 20


@triton.jit
def _tile(
    x_rows, y_cols, x_d, y_d, d, WIDEN: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Products of rows at x_rows [n, 1] and y_cols [1, m], d long."""
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in range(0, d, BLOCK_D):
        e = first + tl.arange(0, BLOCK_D)
        at = e.to(tl.int64)
        x = tl.load(x_rows + at[None, :] * x_d, mask=(e < d)[None, :], other=0.0)
        y = tl.load(y_cols + at[:, None] * y_d, mask=(e < d)[:, None], other=0.0)
        total = multiply(x, y, total, WIDEN)
    return total


# not what decides how wide a load can be
@kernel(do_not_specialize=["n", "m", "positions", "positions2", "chunk"])
def _gram_products_kernel(
    acts_ptr, grads_ptr, acts2_ptr, grads2_ptr, to_ptr, n, m, positions, positions2,
    d_in, d_out, chunk, a_n, a_t, a_d, g_n, g_t, g_d, a2_m, a2_t, a2_d, g2_m, g2_t, g2_d,
    to_n, to_m, SYMMETRIC: tl.constexpr, DIRECT: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Part program_id(1), `chunk` positions t. SYMMETRIC: tiles from the diagonal on."""
    tile_n, tile_m = tile_at(tl.program_id(0), tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M))
    wanted = tile_n >= 0
    if SYMMETRIC:
        wanted = tile_n * BLOCK_N < (tile_m + 1) * BLOCK_M
    if wanted:
        i = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        j = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        # samples beyond the last repeat it
        row = tl.minimum(i, n - 1).to(tl.int64)[:, None]
        column = tl.minimum(j, m - 1).to(tl.int64)[None, :]
        begin = tl.program_id(1) * chunk
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for t in range(begin, tl.minimum(begin + chunk, positions)):
            at_t = tl.cast(t, tl.int64)
            for s in range(0, positions2):
                at_s = tl.cast(s, tl.int64)
                acts = _tile(
                    acts_ptr + at_t * a_t + row * a_n, acts2_ptr + at_s * a2_t + column * a2_m,
                    a_d, a2_d, d_in, WIDEN, BLOCK_N, BLOCK_M, BLOCK_D,
                )  # fmt: skip
                total += acts * _tile(
                    grads_ptr + at_t * g_t + row * g_n, grads2_ptr + at_s * g2_t + column * g2_m,
                    g_d, g2_d, d_out, WIDEN, BLOCK_N, BLOCK_M, BLOCK_D,
                )  # fmt: skip
        if not DIRECT:
            to_ptr += tl.program_id(1).to(tl.int64) * n * to_n
        add_tile(total, i, tile_m, to_ptr, None, n, m, 0, to_n, to_m, SYMMETRIC, DIRECT)


def gram_products_(
    acts: torch.Tensor,
    grads: torch.Tensor,
    acts2: torch.Tensor,
    grads2: torch.Tensor,
    symmetric: bool,
    out: torch.Tensor,
) -> None:
    """`mikernels::gram_products_` for operands of any strides."""
    (n, positions, d_in), m, d_out = acts.shape, acts2.shape[0], grads.shape[2]
    if 0 in (n, m, positions, acts2.shape[1], d_in, d_out):
        return
    even = is_even(acts, grads, acts2, grads2)
    tile = tile_of(acts.dtype == torch.float32, even, is_deep(acts.device))
    tiles = ceil_div(n, tile["BLOCK_N"]) * ceil_div(m, tile["BLOCK_M"])
    parts = min(positions, ceil_div(PROGRAMS, tiles), max(1, SCRATCH // (4 * n * m)))
    chunk = ceil_div(positions, parts)
    parts = ceil_div(positions, chunk)
    to = out
    if parts > 1:
        to = torch.empty(1, parts, n, m, dtype=torch.float32, device=acts.device)
    _gram_products_kernel[(tiles, parts)](
        acts, grads, acts2, grads2, to, n, m, positions, acts2.shape[1], d_in, d_out, chunk,
        *acts.stride(), *grads.stride(), *acts2.stride(), *grads2.stride(), *to.stride()[-2:],
        SYMMETRIC=symmetric, DIRECT=parts == 1, WIDEN=WIDEN, **tile,
    )  # fmt: skip
    if parts > 1:
        add_parts(to, None, None, symmetric, out[None])


def tile_of(full: bool, even: bool, deep: bool) -> dict[str, int]:
    """The pinned tile. The two products' errors add up: 32 columns at most."""
    return (WIDE if even else ODD) | {"BLOCK_D": min(32, columns(full, even, deep))}


def cases() -> list[Case]:
    strides = ("a_n", "a_t", "g_n", "g_t", "a2_m", "a2_t", "g2_m", "g2_t")
    types = dict.fromkeys((*strides, "n", "m", "positions", "positions2", "chunk"), "i32")
    types |= dict.fromkeys(("d_in", "d_out", "to_n"), "i32") | {"to_ptr": "*fp32"}
    ones = dict.fromkeys(("a_d", "g_d", "a2_d", "g2_d", "to_m"), 1) | {"WIDEN": False}
    found = []
    for name, symmetric in (("fp32", True), ("bf16", False), ("bf16", True), ("fp16", False)):
        for even in (True, False):
            pointers = ("acts_ptr", "grads_ptr", "acts2_ptr", "grads2_ptr")
            found += product_case(
                f"{name}{' symmetric' if symmetric else ''}{'' if even else ', odd sizes'}",
                _gram_products_kernel,
                types | dict.fromkeys(pointers, f"*{name}"),
                ones | {"SYMMETRIC": symmetric, "DIRECT": symmetric},
                partial(tile_of, name == "fp32", even),
                name == "fp32",
                divisible=("d_in", "d_out", *strides) if even else (),
            )
    return found
