# SPDX-License-Identifier: Apache-2.0
"""positional_dot_: see mikernels/ops/pairs/positional_dot.py.

Vectors are sorted by position; a program is a tile of vectors at one position and of gradients
there, with a loop over columns. The host does not know how vectors are spread over positions, so
the grid is as large as it can get, and programs without a tile return at once. For positions
outside 0..P-1 results are undefined, but nothing outside the tensors is read.
"""

from __future__ import annotations

import torch
import triton.language as tl

from ..common.launch import ceil_div, kernel
from ..common.offline import Case
from ..common.products import WIDEN, columns, is_even, multiply, product_case
from ..sae.gradients import by_feature

# with 64 vectors the addresses in `out` would spill; a position often has fewer
TILE = {"BLOCK_N": 32, "BLOCK_B": 64, "num_warps": 4, "num_stages": 3}


@kernel(do_not_specialize=["batch", "positions"])
def _positional_dot_kernel(
    grads_ptr, vectors_ptr, scale_ptr, position_of_ptr, first_of_ptr, offsets_ptr, order_ptr,
    out_ptr, batch, positions, d, grads_b, grads_p, grads_d, vectors_n, vectors_d, scale_n,
    out_n, out_b, WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    bands = tl.cdiv(batch, BLOCK_B)
    tile = tl.program_id(0) // bands
    position = tl.load(position_of_ptr + tile)
    if position < positions:
        begin = tl.load(offsets_ptr + position)
        end = tl.load(offsets_ptr + position + 1)
        number = tile - tl.load(first_of_ptr + position)
        place = begin + number * BLOCK_N + tl.arange(0, BLOCK_N)
        here = place < end
        i = tl.load(order_ptr + place, mask=here, other=0)
        b = tl.program_id(0) % bands * BLOCK_B + tl.arange(0, BLOCK_B)
        b64 = b.to(tl.int64)[None, :]
        rows = vectors_ptr + i[:, None] * vectors_n
        columns = grads_ptr + position * grads_p + b64 * grads_b
        total = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
        for first in range(0, d, BLOCK_D):
            e = first + tl.arange(0, BLOCK_D)
            at = e.to(tl.int64)
            vectors_mask = here[:, None] & (e < d)[None, :]
            x = tl.load(rows + at[None, :] * vectors_d, mask=vectors_mask, other=0.0)
            grads_mask = (e < d)[:, None] & (b < batch)[None, :]
            y = tl.load(columns + at[:, None] * grads_d, mask=grads_mask, other=0.0)
            total = multiply(x, y, total, WIDEN)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + i * scale_n, mask=here, other=0.0)
            total *= scale.to(tl.float32)[:, None]
        to = out_ptr + i[:, None] * out_n + b64 * out_b
        inside = here[:, None] & (b < batch)[None, :]
        tl.store(to, tl.load(to, mask=inside, other=0.0) + total, mask=inside)


def tile_of(full: bool, even: bool) -> dict[str, int]:
    """The pinned tile. So few rows pass through registers on Hopper too: never deep."""
    return TILE | {"BLOCK_D": columns(full, even, deep=False)}


def positional_dot_(
    grads: torch.Tensor,
    vectors: torch.Tensor,
    positions: torch.Tensor,
    scale: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """`mikernels::positional_dot_`: adds to out [n, B]."""
    (batch, count, d), n = grads.shape, vectors.shape[0]
    if 0 in (batch, count, d, n):
        return
    full, even = grads.dtype == torch.float32, is_even(grads, vectors)
    tile = tile_of(full, even)
    size = tile["BLOCK_N"]
    offsets, order = by_feature(positions, count)
    tiles = (offsets.diff() + (size - 1)) // size
    last = tiles.cumsum(0)
    programs = min(count, n) + n // size
    numbers = torch.arange(programs, device=grads.device)
    position_of = torch.searchsorted(last, numbers, right=True)
    _positional_dot_kernel[(programs * ceil_div(batch, tile["BLOCK_B"]),)](
        grads, vectors, scale, position_of, last - tiles, offsets, order, out, batch, count, d,
        *grads.stride(), *vectors.stride(), 0 if scale is None else scale.stride(0),
        *out.stride(), WIDEN=WIDEN, **tile,
    )  # fmt: skip


def cases() -> list[Case]:
    strides = "grads_b", "grads_p", "vectors_n"
    lists = "position_of_ptr", "first_of_ptr", "offsets_ptr", "order_ptr"
    types = dict.fromkeys(lists, "*i64") | {"out_ptr": "*fp32"}
    types |= dict.fromkeys(("batch", "positions", "d", *strides, "out_n"), "i32")
    ones = dict.fromkeys(("grads_d", "vectors_d", "scale_n", "out_b"), 1)
    found = []
    for title in ("fp32", "bf16", "fp16", "fp32, odd sizes", "bf16, odd sizes"):
        kind, even = title[:4], "odd" not in title
        pointers = dict.fromkeys(("grads_ptr", "vectors_ptr", "scale_ptr"), f"*{kind}")
        found += product_case(
            title,
            _positional_dot_kernel,
            types | pointers,
            ones | {"WIDEN": False},
            lambda deep, full=kind == "fp32", even=even: tile_of(full, even),
            kind == "fp32",
            divisible=("d", *strides) if even else (),
        )
    return found
