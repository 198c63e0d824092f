# SPDX-License-Identifier: Apache-2.0
"""edge_heads_: see mikernels/ops/pairs/edge_heads.py.

The rows `dz w_o` of some heads at some positions are formed in fp32, in at most SCRATCH bytes that
every block of them reuses, and go to `pair_products_` from there. Forming them inside that kernel
would repeat it for every tile of readers: d_head more operations for each 64.
"""

from __future__ import annotations

from functools import partial

import torch
import triton.language as tl

from ..common.launch import ceil_div, kernel
from ..common.offline import Case
from ..common.products import WIDEN, columns, is_deep, is_even, multiply, product_case
from .pair_products import pair_products_

ROWS = {"BLOCK_N": 64, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3}
LARGE = {"BLOCK_N": 64, "BLOCK_D": 128, "num_warps": 4, "num_stages": 3}
# pieces of fp32 numbers
TALL = {"BLOCK_N": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}
SCRATCH = 64 << 20
# w_o is read once for all positions of a block, gradients, which are fewer, for all of its heads
LEAST_HEADS, MOST_HEADS = 16, 128


@kernel(do_not_specialize=["items", "positions"])
def _head_rows_kernel(
    dz_ptr, w_ptr, rows_ptr, items, positions, heads, width, d,
    dz_s, dz_p, dz_h, dz_e, w_h, w_e, w_d, WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """rows[item, h] = dz[s, p, h] w_o[h] for items (s, p); a program is one head."""
    h = (tl.program_id(0) % heads).to(tl.int64)
    blocks = tl.cdiv(d, BLOCK_D)
    tile = tl.program_id(0) // heads
    item = tile // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tile % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    s, p = (item // positions).to(tl.int64), (item % positions).to(tl.int64)
    dz_rows = dz_ptr + h * dz_h + (s * dz_s + p * dz_p)[:, None]
    w_columns = w_ptr + h * w_h + column.to(tl.int64)[None, :] * w_d
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, width, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        at = e.to(tl.int64)
        dz_mask = (item < items)[:, None] & (e < width)[None, :]
        dz = tl.load(dz_rows + at[None, :] * dz_e, mask=dz_mask, other=0.0)
        w_mask = (e < width)[:, None] & (column < d)[None, :]
        w = tl.load(w_columns + at[:, None] * w_e, mask=w_mask, other=0.0)
        total = multiply(dz, w, total, WIDEN)
    to = rows_ptr + (item.to(tl.int64)[:, None] * heads + h) * d + column[None, :]
    tl.store(to, total, mask=(item < items)[:, None] & (column < d)[None, :])


def _form(dz: torch.Tensor, w_o: torch.Tensor, rows: torch.Tensor) -> None:
    """rows [S, P, H, d] of dz [S, P, H, d_head]."""
    examples, positions, heads, width = dz.shape
    d, items = w_o.shape[2], examples * positions
    tile = tile_of(dz.dtype == torch.float32, is_even(dz, w_o), is_deep(dz.device))
    tiles = ceil_div(items, tile["BLOCK_N"]) * ceil_div(d, tile["BLOCK_D"])
    _head_rows_kernel[(tiles * heads,)](
        dz, w_o, rows, items, positions, heads, width, d, *dz.stride(), *w_o.stride(), WIDEN=WIDEN,
        **tile,
    )  # fmt: skip


def tile_of(full: bool, even: bool, deep: bool) -> dict[str, int]:
    """A pinned tile: registers are short for fp32 (full), and for one address per number."""
    tile = (TALL if full else LARGE) if even else ROWS
    return tile | {"BLOCK_E": columns(full, even, deep)}


def blocks(examples: int, positions: int, heads: int, d: int, full: bool) -> tuple[int, int, int]:
    """Heads, examples and positions of a block: all positions, if that leaves a few heads.

    16-bit products take no longer than memory does: their rows are to stay in the cache.
    """
    room = SCRATCH // 4 // (1 if full else 2)
    n = min(max(LEAST_HEADS, room // (examples * positions * d)), MOST_HEADS)
    n = ceil_div(heads, ceil_div(heads, n))
    items = max(1, room // (n * d))
    # whole examples, or positions of one
    return n, min(max(1, items // positions), examples), min(items, positions)


def edge_heads_(
    dz: torch.Tensor,
    w_o: torch.Tensor,
    grad: torch.Tensor,
    weights: torch.Tensor | None,
    prefix: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """`mikernels::edge_heads_`."""
    (examples, positions, heads, width), d = dz.shape, w_o.shape[2]
    if 0 in (examples, positions, width, d, out.numel()):
        return
    n, s_step, p_step = blocks(examples, positions, heads, d, dz.dtype == torch.float32)
    scratch = torch.empty(s_step * p_step * n * d, dtype=torch.float32, device=dz.device)
    for first in range(0, heads, n):
        h = slice(first, first + n)
        left = None if prefix is None else prefix - first
        for s in (slice(i, i + s_step) for i in range(0, examples, s_step)):
            mine = None if weights is None else weights[:, s]
            for p in (slice(i, i + p_step) for i in range(0, positions, p_step)):
                block = dz[s, p, h]
                shape = *block.shape[:3], d
                rows = scratch[: block.shape[:3].numel() * d].view(shape)
                _form(block, w_o[h], rows)
                pair_products_(rows, grad[s, p], None, mine, left, False, out[:, h])


def cases() -> list[Case]:
    strides = "dz_s", "dz_p", "dz_h", "w_h", "w_e"
    names = "items", "positions", "heads", "width", "d", *strides
    types = dict.fromkeys(names, "i32") | {"rows_ptr": "*fp32"}
    found = []
    for title in ("fp32", "bf16", "fp16", "fp32, odd sizes", "bf16, odd sizes"):
        kind, even = title[:4], "odd" not in title
        found += product_case(
            title,
            _head_rows_kernel,
            types | {"dz_ptr": f"*{kind}", "w_ptr": f"*{kind}"},
            {"dz_e": 1, "w_d": 1, "WIDEN": False},
            partial(tile_of, kind == "fp32", even),
            kind == "fp32",
            divisible=("width", "d", *strides) if even else (),
        )
    return found
