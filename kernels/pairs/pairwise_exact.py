# SPDX-License-Identifier: Apache-2.0
"""Exact scores of pairs, by groups of columns or by blocks: fp64 sums, rounded once to fp32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from ..common.launch import kernel
from ..common.offline import Case, with_odd_sizes
from ..select.order import NOTHING, order_key

# columns of a group: one upper bound, or as many exact scores
GROUP = 64
EXACT = {"BLOCK": 64, "num_warps": 8}
# pairs of a block
PAIRS = 1 << 21
# the key of NaN
FIRST = 0x7FFFFFFF


@kernel(do_not_specialize=["m", "groups", "segments", "positions"])
def _pairwise_exact_kernel(
    a_ptr, b_ptr, row_scale_ptr, col_scale_ptr, row_rank_ptr, col_rank_ptr, chosen_ptr, scores_ptr,
    keys_ptr, m, groups, segments, positions, d, a_s, a_p, a_n, a_d, b_s, b_p, b_m, b_d,
    ABS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores of one group, summed in fp64 and rounded once, and keys of their strengths."""
    entry = tl.program_id(0).to(tl.int64)
    chosen = tl.load(chosen_ptr + entry)
    row = chosen // groups
    col = chosen % groups * GROUP + tl.arange(0, GROUP)
    inside = col < m
    row_scale = tl.full([1], 1.0, tl.float64)
    col_scale = tl.full([GROUP], 1.0, tl.float64)
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + row + tl.arange(0, 1)).to(tl.float64)
    if col_scale_ptr is not None:
        col_scale = tl.load(col_scale_ptr + col, mask=inside, other=0.0).to(tl.float64)
    rows = b_ptr + col[:, None] * b_m
    sums = tl.zeros([GROUP, BLOCK], tl.float64)
    for segment in range(0, segments):
        s = tl.cast(segment // positions, tl.int64)
        p = tl.cast(segment % positions, tl.int64)
        for first in range(0, d, BLOCK):
            column = first + tl.arange(0, BLOCK)
            at = column.to(tl.int64)
            x = tl.load(
                a_ptr + (s * a_s + p * a_p + row * a_n) + at * a_d, mask=column < d, other=0.0
            )
            address = rows + (s * b_s + p * b_p) + at[None, :] * b_d
            y = tl.load(address, mask=inside[:, None] & (column < d)[None, :], other=0.0)
            x = x.to(tl.float32).to(tl.float64) * row_scale
            product = y.to(tl.float32).to(tl.float64) * col_scale[:, None] * x[None, :]
            # beyond the last column is 0, which an infinite scale would make NaN
            sums += tl.where((column < d)[None, :], product, 0.0)
    score = tl.sum(sums, 1).to(tl.float32)
    strength = score
    if ABS:
        strength = tl.abs(score)
    if row_rank_ptr is not None:
        rank = tl.load(col_rank_ptr + col, mask=inside, other=0)
        inside = inside & (tl.load(row_rank_ptr + row) < rank)
    to = entry * GROUP + tl.arange(0, GROUP)
    tl.store(scores_ptr + to, score)
    tl.store(keys_ptr + to, tl.where(inside, order_key(strength, 0), NOTHING))


def keys_of(strengths: torch.Tensor) -> torch.Tensor:
    """`order.order_key` of fp32 strengths."""
    bits = strengths.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    keys = torch.where(bits < 0, ~magnitude, bits).masked_fill(magnitude == 0, 0)
    return keys.masked_fill(strengths.isnan(), FIRST)


@dataclass(frozen=True)
class Pairs:
    """The operands. Scales and ranks are contiguous."""

    a: torch.Tensor
    b: torch.Tensor
    row_scale: torch.Tensor | None
    col_scale: torch.Tensor | None
    row_rank: torch.Tensor | None
    col_rank: torch.Tensor | None
    magnitude: bool

    @property
    def columns(self) -> int:
        return self.a.shape[0] * self.a.shape[1] * self.a.shape[3]


Scores = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def exact_scores(p: Pairs, first: int, groups: int, chosen: torch.Tensor) -> Scores:
    """Keys, scores and places of all pairs of groups, numbered from row `first` on."""
    m, shape = p.b.shape[2], (len(chosen), GROUP)
    chosen = chosen + first * groups
    keys = torch.empty(shape, dtype=torch.int32, device=p.a.device)
    scores = torch.empty(shape, dtype=torch.float32, device=p.a.device)
    if len(chosen):
        segments, positions = p.a.shape[0] * p.a.shape[1], p.a.shape[1]
        _pairwise_exact_kernel[(len(chosen),)](
            p.a, p.b, p.row_scale, p.col_scale, p.row_rank, p.col_rank, chosen, scores, keys,
            m, groups, segments, positions, p.a.shape[3], *p.a.stride(), *p.b.stride(),
            ABS=p.magnitude, GROUP=GROUP, **EXACT,
        )  # fmt: skip
    places = chosen // groups * m + chosen % groups * GROUP
    places = places[:, None] + torch.arange(GROUP, device=p.a.device)
    return keys.view(-1), scores.view(-1), places.view(-1)


def product_scores(p: Pairs, rows: slice, cols: slice) -> Scores:
    a, b = p.a[:, :, rows], p.b[:, :, cols]
    if a.shape[1] == 1:
        # whichever of the two there are more of is taken many at a time
        a, b = a.transpose(0, 1), b.transpose(0, 1)
    n, m, d = a.shape[2], b.shape[2], a.shape[3]
    total = torch.zeros(n, m, dtype=torch.float64, device=a.device)
    columns = max(1, min(d, PAIRS // (n + m)))
    positions = max(1, PAIRS // (n + m) // columns)
    for s in range(a.shape[0]):
        for position in range(0, a.shape[1], positions):
            for column in range(0, d, columns):
                here = slice(position, position + positions), slice(column, column + columns)
                left, right = (
                    x[s, here[0], :, here[1]].transpose(0, 1).reshape(x.shape[2], -1).double()
                    for x in (a, b)
                )
                if p.row_scale is not None:
                    left = left * p.row_scale[rows, None].double()
                if p.col_scale is not None:
                    right = right * p.col_scale[cols, None].double()
                total.addmm_(left, right.T)
    scores = total.float()
    keys = keys_of(scores.abs() if p.magnitude else scores)
    if p.row_rank is not None and p.col_rank is not None:
        keys = keys.where(p.row_rank[rows, None] < p.col_rank[cols], NOTHING.value)
    places = torch.arange(rows.start, rows.start + n, device=a.device)[:, None] * p.b.shape[2]
    places = places + torch.arange(cols.start, cols.start + m, device=a.device)
    return keys.view(-1), scores.view(-1), places.view(-1)


def cases() -> list[Case]:
    found = []
    strides = ("a_s", "a_p", "a_n", "b_s", "b_p", "b_m")
    types = dict.fromkeys(("m", "groups", "segments", "positions", "d", *strides), "i32")
    types |= {"chosen_ptr": "*i64", "scores_ptr": "*fp32", "keys_ptr": "*i32"}
    types |= dict.fromkeys(("row_rank_ptr", "col_rank_ptr"), "*i64")
    for name in ("fp32", "bf16", "fp16"):
        pointers = ("a_ptr", "b_ptr", "row_scale_ptr", "col_scale_ptr")
        found.append(
            Case(
                f"exact {name}",
                _pairwise_exact_kernel,
                types | dict.fromkeys(pointers, f"*{name}"),
                {"a_d": 1, "b_d": 1, "ABS": True, "GROUP": GROUP, "BLOCK": EXACT["BLOCK"]},
                num_warps=EXACT["num_warps"],
                divisible=("d", *strides),
            )
        )
    return with_odd_sizes(found)
