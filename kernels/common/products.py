# SPDX-License-Identifier: Apache-2.0
"""What kernels that multiply matrices share: the product, its tiles, their operands and cases."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from .offline import TARGETS, Case

# Triton's interpreter multiplies the bit patterns of bf16 numbers
WIDEN = os.environ.get("TRITON_INTERPRET") == "1"
# of bf16
LARGEST = tl.constexpr((2 - 2.0**-7) * 2.0**127)
# tiles of rows that share a tile of columns in the second-level cache
SWIZZLE = tl.constexpr(8)
# a tile of fp32 numbers, in pieces: two fit an SM of Hopper's
WIDE = {"BLOCK_N": 128, "BLOCK_M": 64, "num_warps": 8, "num_stages": 3}
NVIDIA = tuple(name for name in TARGETS if name.startswith("sm_"))
DEEP = "sm_90", "sm_100"


@triton.jit
def dot(x, y, total, WIDEN: tl.constexpr):
    """total + x y, summed in the matrix unit: see `multiply` for what that loses."""
    if WIDEN:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def _near(x, WIDEN: tl.constexpr):
    """The nearest bf16 number."""
    if WIDEN:
        # the interpreter's conversion truncates; this one would make 0 of NaN
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        near = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:
        near = x.to(tl.bfloat16)
    return near


@triton.jit
def _pieces(x, WIDEN: tl.constexpr):
    """bf16 numbers with first + 2^-7 second + 2^-14 third = x, to 2^-148 if x is finite."""
    bits = x.to(tl.int32, bitcast=True) & -65536
    # above, the nearest may be inf
    first = tl.where(tl.abs(x) >= LARGEST, bits.to(tl.float32, bitcast=True), x)
    first = _near(first, WIDEN)
    rest = (x - first.to(tl.float32)) * 128
    second = _near(rest, WIDEN)
    # no more than 8 bits are left
    return first, second, _near((rest - second.to(tl.float32)) * 128, WIDEN)


@triton.jit
def multiply(x, y, total, WIDEN: tl.constexpr, PIECES: tl.constexpr = 3):
    """total + x y in fp32, on the matrix unit; for x and y of one dtype, or fp32 and bf16.

    The matrix unit truncates its sum at every instruction, of 16 products on NVIDIA: a long sum of
    positive numbers falls short by half a unit in the last place each time. So it sums one call
    alone, of no more than 64 columns, and what it found is added to `total` in fp32 registers.

    Numbers in fp32 are cut into PIECES of bf16, 2 if x has no more than 16 bits. Products of third
    pieces with others than the first are left out: 2^-23 of |x| |y|, and 2^-147 of either, at most.
    Pieces are scaled, since bf16 ends at 2^-133 and fp32 at 2^-149, by no more than keeps all sums
    of |x| |y| below inf that are. What is below 2^-134 is NaN times inf.
    """
    if x.dtype == tl.float32:
        x0, x1, x2 = _pieces(x, WIDEN)
        if y.dtype == tl.float32:
            y0, y1, y2 = _pieces(y, WIDEN)
            low = tl.dot(x2, y0)
            low = tl.dot(x1, y1, low)
            low = tl.dot(x0, y2, low) * (1 / 128)
            low = tl.dot(x1, y0, low)
            low = tl.dot(x0, y1, low) * (1 / 128)
        else:
            y0 = y.to(x0.dtype)
            if PIECES == 3:
                low = tl.dot(x1, y0, tl.dot(x2, y0) * (1 / 128)) * (1 / 128)
            else:
                low = tl.dot(x1, y0) * (1 / 128)
        # inf and NaN are those of first pieces: inf - inf, or inf times a piece that is 0, is none
        low = tl.where(tl.abs(low) < float("inf"), low, 0.0)
        product = tl.dot(x0, y0, low)
    else:
        if WIDEN:
            x, y = x.to(tl.float32), y.to(tl.float32)
        # the limit concerns fp8, but without one the compiler would sum in `total`
        product = tl.dot(x, y, input_precision="ieee", max_num_imprecise_acc=1)
    return total + product


@triton.jit
def tile_at(number, tiles_n, tiles_m):
    """Row and column of a tile, of tiles_n x tiles_m taken in bands of SWIZZLE rows."""
    per_band = SWIZZLE * tiles_m
    band = number // per_band
    height = tl.minimum(tiles_n - band * SWIZZLE, SWIZZLE)
    return band * SWIZZLE + number % per_band % height, number % per_band // height


@triton.jit
def halves(tile):
    """The left and the right half of the columns."""
    both = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
    return tl.split(tl.permute(both, [0, 2, 1]))


def part(t: torch.Tensor | None, begin: int, end: int) -> torch.Tensor | None:
    """Rows begin..end of an operand that may be absent."""
    return None if t is None else t[begin:end]


def is_even(*operands: torch.Tensor) -> bool:
    """Whether 16 bytes of a row can be read at a time, wherever a tile begins."""
    return all(
        t.stride(-1) == 1
        and all(size % 16 == 0 for size in (t.shape[-1], t.data_ptr(), *t.stride()[:-1]))
        for t in operands
    )


def is_deep(device: torch.device) -> bool:
    """Whether pieces of fp32 numbers go to the matrix unit through shared memory, not registers."""
    if device.type == "cpu":  # interpreted, as on Hopper
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


def columns(full: bool, even: bool, deep: bool) -> int:
    """Columns multiplied at a time, for fp32 numbers (full), where 16 bytes are read at a time
    (even): as many as registers hold, and no more than `multiply` takes."""
    if full:
        return 32 if even and deep else 16
    return 64 if even else 32


def product_case(
    title: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    tile_of: Callable[[bool], dict[str, int]],
    full: bool,
    targets: tuple[str, ...] = tuple(TARGETS),
    **more: Any,
) -> list[Case]:
    """The cases of a kernel that multiplies: one, or those of the tiles for fp32, tile_of(deep)."""
    found = []
    for deep in (True, False) if full else (False,):
        here = tuple(t for t in targets if not full or deep == (t in DEEP))
        tile = tile_of(deep)
        launch = {key: tile.pop(key) for key in ("num_warps", "num_stages")}
        name = f"{title}, deep" if deep else title
        more |= {"matrix": True, "targets": here}
        found.append(Case(name, kernel, types, constants | tile, **launch, **more))
    return found
