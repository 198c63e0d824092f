# SPDX-License-Identifier: Apache-2.0
"""block_norms: see mikernels/ops/pairs/block_norms.py.

A tile of a product holds several pairs of matrices: rows are those of a few a[i], each padded to a
power of two, columns those of a few b[j]. The squares of a tile are summed by pair where they are;
matrices with more rows or columns than a tile pass through it part by part.
"""

from __future__ import annotations

from functools import partial

import torch
import triton.language as tl

from ..common.launch import ceil_div, kernel, power_of_two
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

LARGE = {"BLOCK_N": 128, "BLOCK_M": 128, "num_warps": 8, "num_stages": 3}
# where 16 bytes cannot be read at a time, addresses take the registers of half a tile
ODD = {"BLOCK_N": 64, "BLOCK_M": 64, "num_warps": 4, "num_stages": 3}


# not what decides how wide a load can be
@kernel(do_not_specialize=["n", "m", "r"])
def _block_norms_kernel(
    a_ptr, b_ptr, out_ptr, n, m, r, s, d, a_n, a_r, a_d, b_m, b_d, b_s,
    R: tl.constexpr, S: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[i, j] for BLOCK_N // R matrices of a and BLOCK_M // S of b."""
    tile_n, tile_m = tile_at(tl.program_id(0), tl.cdiv(n, BLOCK_N // R), tl.cdiv(m, BLOCK_M // S))
    first_i, first_j = tile_n * (BLOCK_N // R), tile_m * (BLOCK_M // S)
    row, col = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    i, j = first_i + row // R, first_j + col // S
    total = tl.zeros([BLOCK_N // R, BLOCK_M // S], tl.float32)
    # rows beyond the last repeat it, and are left out of the sum
    a_rows = a_ptr + tl.minimum(i, n - 1).to(tl.int64) * a_n
    b_cols = b_ptr + tl.minimum(j, m - 1).to(tl.int64) * b_m
    parts_s = tl.cdiv(s, S)
    for part in range(0, tl.cdiv(r, R) * parts_s):
        row_in, col_in = part // parts_s * R + row % R, part % parts_s * S + col % S
        x_rows = a_rows + tl.minimum(row_in, r - 1).to(tl.int64) * a_r
        y_cols = b_cols + col_in.to(tl.int64) * b_s
        product = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for first in range(0, d, BLOCK_D):
            e = first + tl.arange(0, BLOCK_D)
            at = e.to(tl.int64)
            x = tl.load(x_rows[:, None] + at[None, :] * a_d, mask=(e < d)[None, :], other=0.0)
            # masked, not repeated: neighbours are read together
            inside = (e < d)[:, None] & (col_in < s)[None, :]
            y = tl.load(y_cols[None, :] + at[:, None] * b_d, mask=inside, other=0.0)
            product = multiply(x, y, product, WIDEN)
        product = tl.where((row_in < r)[:, None] & (col_in < s)[None, :], product, 0.0)
        squares = tl.reshape(product * product, [BLOCK_N, BLOCK_M // S, S])
        squares = tl.reshape(tl.sum(squares, 2), [BLOCK_N // R, R, BLOCK_M // S])
        total += tl.sum(squares, 1)
    i = first_i + tl.arange(0, BLOCK_N // R)
    j = first_j + tl.arange(0, BLOCK_M // S)
    inside = (i < n)[:, None] & (j < m)[None, :]
    tl.store(out_ptr + i.to(tl.int64)[:, None] * m + j[None, :], tl.sqrt_rn(total), mask=inside)


def padded(size: int, most: int) -> int:
    """Rows of a tile that a matrix of `size` rows takes: a power of two."""
    return min(power_of_two(size), most)


def tile_of(full: bool, even: bool, deep: bool) -> dict[str, int]:
    """The pinned tile; with 64 columns, bf16 spilled 24 bytes on sm_120."""
    tile = (WIDE if full else LARGE) if even else ODD
    return tile | {"BLOCK_D": min(32, columns(full, even, deep))}


def block_norms(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`mikernels::block_norms` for a [n, r, d] and b [m, d, s] of any strides."""
    (n, r, d), (m, _, s) = a.shape, b.shape
    out = torch.empty(n, m, dtype=torch.float32, device=a.device)
    if 0 in (n, m, r, s, d):
        return out.zero_()
    tile = tile_of(a.dtype == torch.float32, is_even(a, b), is_deep(a.device))
    rows, cols = padded(r, tile["BLOCK_N"]), padded(s, tile["BLOCK_M"])
    tiles_n = ceil_div(n, tile["BLOCK_N"] // rows)
    tiles_m = ceil_div(m, tile["BLOCK_M"] // cols)
    _block_norms_kernel[(tiles_n * tiles_m,)](
        a, b, out, n, m, r, s, d, *a.stride(), *b.stride(), R=rows, S=cols, WIDEN=WIDEN, **tile
    )
    return out


def cases() -> list[Case]:
    strides = ("a_n", "a_r", "b_m", "b_d")
    sizes = dict.fromkeys(("n", "m", "r", "s", "d", *strides), "i32") | {"out_ptr": "*fp32"}
    ones = {"a_d": 1, "b_s": 1, "WIDEN": False}
    found = []
    for name, r, s in (
        ("fp32", 64, 64),
        ("fp32", 4, 16),
        ("bf16", 64, 64),
        ("bf16", 1, 128),
        ("fp16", 64, 64),
    ):
        for even in (True, False):
            full = name == "fp32"
            tile = tile_of(full, even, False)
            blocks = {"R": min(r, tile["BLOCK_N"]), "S": min(s, tile["BLOCK_M"])}
            found += product_case(
                f"{name} {r} x {s}{'' if even else ', odd sizes'}",
                _block_norms_kernel,
                sizes | dict.fromkeys(("a_ptr", "b_ptr"), f"*{name}"),
                ones | blocks,
                partial(tile_of, full, even),
                full,
                divisible=("s", "d", *strides) if even else (),
            )
    return found
