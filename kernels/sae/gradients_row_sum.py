# SPDX-License-Identifier: Apache-2.0
"""weighted_row_sum: weights @ rows, see mikernels/ops/sae/gradients.py.

A program sums a piece of the rows over a block of columns, then torch adds up the pieces: two
launches whatever F is, no atomics, the same bits every time, rows of any dtype read once.
"""

from __future__ import annotations

import torch
import triton.language as tl

from ..common.launch import ceil_div, kernel
from ..common.offline import Case
from .gradients_hot import compensated

# rows of a tile and columns of a program: 16 kB of fp32 in flight; twice as many spill at odd sizes
TILE = {"E": 8, "BLOCK_D": 512}
WARPS = 4
LEAST_ROWS = 128  # of a piece
PROGRAMS = 1024  # wanted: 4 at once on each of 132 SMs, twice


@kernel(do_not_specialize=["n_rows", "piece"])
def _row_sum_kernel(
    weights, rows, partial, n_rows, piece, d, weights_f, rows_f, rows_d,
    E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d
    begin = tl.program_id(0).to(tl.int64) * piece
    end = tl.minimum(begin + piece, n_rows)
    total, lost = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for start in range(begin, end, E):
        at = start + tl.arange(0, E)
        c = tl.load(weights + at * weights_f, at < end, other=0).to(tl.float32)
        where = at[:, None] * rows_f + columns.to(tl.int64)[None, :] * rows_d
        tile = tl.load(rows + where, (at < end)[:, None] & inside[None, :], other=0)
        total, lost = compensated(total, lost, tl.sum(c[:, None] * tile.to(tl.float32), 0))
    tl.store(partial + tl.program_id(0).to(tl.int64) * d + columns, total, inside)


def weighted_row_sum(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    n_rows, d = rows.shape
    blocks = ceil_div(d, TILE["BLOCK_D"])
    if n_rows == 0 or d == 0:
        return rows.new_zeros(d, dtype=torch.float32)
    piece = max(LEAST_ROWS, ceil_div(n_rows * blocks, PROGRAMS))
    pieces = ceil_div(n_rows, piece)
    partial = rows.new_empty(pieces, d, dtype=torch.float32)
    _row_sum_kernel[(pieces, blocks)](
        weights, rows, partial, n_rows, piece, d, *weights.stride(), *rows.stride(),
        **TILE, num_warps=WARPS,
    )  # fmt: skip
    return partial.sum(0)


def cases() -> list[Case]:
    found = []
    sizes = dict.fromkeys(("n_rows", "piece", "d", "rows_f"), "i32")
    for weights, rows in (("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "bf16")):
        types = {"weights": f"*{weights}", "rows": f"*{rows}", "partial": "*fp32", **sizes}
        for title, divisible in (("", ("d", "rows_f")), (", odd sizes", ())):
            found.append(
                Case(
                    f"{rows} weighted in {weights}{title}",
                    _row_sum_kernel,
                    types,
                    {"weights_f": 1, "rows_d": 1, **TILE},
                    WARPS,
                    divisible=divisible,
                )
            )
    return found
