# SPDX-License-Identifier: Apache-2.0
"""What kernels that multiply matrices share: the product, its tiles, their operands and cases."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

from .offline import Case

# Triton's interpreter multiplies the bit patterns of bf16 numbers
WIDEN = os.environ.get("TRITON_INTERPRET") == "1"
# tiles of rows that share a tile of columns in the second-level cache
SWIZZLE = tl.constexpr(8)
NVIDIA = "sm_80", "sm_90", "sm_100"


@triton.jit
def multiply(x, y, total, WIDEN: tl.constexpr):
    """total + x y for x and y of one dtype, in fp32, never in TF32."""
    if WIDEN:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), total, input_precision="ieee")
    return tl.dot(x, y, total, input_precision="ieee")


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


def product_case(
    title: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    tile: dict[str, int],
    matrix: bool,
    **more: Any,
) -> list[Case]:
    """A case, or two: for products in fp32, CDNA alone has matrix instructions."""
    launch = {key: tile[key] for key in ("num_warps", "num_stages")}
    constants = constants | {key: size for key, size in tile.items() if key not in launch}
    if matrix:
        return [Case(title, kernel, types, constants, **launch, matrix=True, **more)]
    return [
        Case(title + name, kernel, types, constants, **launch, matrix=m, targets=targets, **more)
        for name, targets, m in (("", NVIDIA, False), (" on CDNA", ("gfx942",), True))
    ]
