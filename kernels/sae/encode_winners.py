# SPDX-License-Identifier: Apache-2.0
"""The c best scores of every token, panel of features after panel, with the threshold carried on.

A token's c best so far are a list in memory, ascending by feature. The next panel has only to give
what is above the least of them: after p panels that is c / p scores of the next one, where a
selection of its own would give c. So the search for a panel's c-th score, and most of what follows
it, falls away from the second panel on. What is above is found as in `row_topk`: by the maxima of
groups, or, of a short row, in registers; then c of at most 2 c are kept, ties to the earlier.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
import triton.language as tl

from ..common.launch import kernel, power_of_two
from ..common.offline import Case
from ..select import order
from ..select.order import NOTHING, kth_key, largest_key, least_key, order_key, places
from ..select.row_topk import grouped_shape, warps

T = TypeVar("T")

SCRATCH = 256 << 20
LEAST_SCRATCH = 4 << 20
# a row of more scores, or more than 2 MOST_WINNERS to be merged, would not stay in registers
WHOLE, MOST_WINNERS = 4096, 2048


@triton.jit
def _merge(scores, features, c, held, arrived, UNUSED: tl.constexpr, LIST: tl.constexpr):
    """Keeps the c best of the list's c places and of the `arrived` scores behind them."""
    tl.debug_barrier()
    place = tl.arange(0, 2 * LIST)
    inside = place < c + arrived
    x = tl.load(scores + place, mask=inside, other=0.0)
    feature = tl.load(features + place, mask=inside, other=-1)
    keys = tl.where(feature >= 0, order_key(x.to(tl.float32), UNUSED), NOTHING)
    kth = NOTHING
    if held + arrived > c:
        kth = kth_key(keys, c, least_key(keys), UNUSED)
    # places not filled yet are last in order; they move behind what is held
    ties = c - tl.sum((keys > kth).to(tl.int32))
    taken, slot = places(keys, kth, ties, 0, 0)
    tl.debug_barrier()
    tl.store(scores + slot, x, mask=taken)
    tl.store(features + slot, feature, mask=taken)


@triton.jit
def _held(scores, features, c, UNUSED: tl.constexpr, LIST: tl.constexpr):
    """(how many a list holds, the key that another score must be above)."""
    place = tl.arange(0, LIST)
    feature = tl.load(features + place, mask=place < c, other=-1)
    x = tl.load(scores + place, mask=feature >= 0, other=0.0)
    keys = tl.where(feature >= 0, order_key(x.to(tl.float32), UNUSED), NOTHING)
    floor = tl.min(tl.where(place < c, keys, 0x7FFFFFFF))
    return tl.sum((feature >= 0).to(tl.int32)), floor


@kernel(do_not_specialize=["c", "base"])
def _encode_winners_whole_kernel(
    panel_ptr, scores_ptr, features_ptr, n, c, base, stride_row, stride_list,
    UNUSED: tl.constexpr, BLOCK: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scores = scores_ptr + row * stride_list
    features = features_ptr + row * stride_list
    held, floor = _held(scores, features, c, UNUSED, LIST)
    column = tl.arange(0, BLOCK)
    panel = panel_ptr + row * stride_row + column
    x = tl.load(panel, mask=column < n, other=0.0)
    keys = tl.where(column < n, order_key(x.to(tl.float32), UNUSED), NOTHING)
    above = tl.sum((keys > floor).to(tl.int32))
    if above > 0:
        kth = floor
        if above > c:
            kth = kth_key(keys, c, least_key(keys), UNUSED)
        arrived = tl.minimum(above, c)
        ties = arrived - tl.sum((keys > kth).to(tl.int32))
        taken, slot = places(keys, kth, ties, 0, 0)
        # loaded anew: a row of 8,192 kept in registers would spill
        tl.store(scores + c + slot, tl.load(panel, mask=taken, other=0.0), mask=taken)
        tl.store(features + c + slot, column + base, mask=taken)
        _merge(scores, features, c, held, arrived, UNUSED, LIST)


@kernel(do_not_specialize=["c", "base"])
def _encode_winners_grouped_kernel(
    panel_ptr, scores_ptr, features_ptr, maxima_ptr, n, c, base, stride_row, stride_list,
    UNUSED: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr, GROUPS: tl.constexpr,
    KEPT: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    row_number = tl.program_id(0).to(tl.int64)
    scores = scores_ptr + row_number * stride_list
    features = features_ptr + row_number * stride_list
    scratch = maxima_ptr + row_number * GROUPS
    n_groups = tl.cdiv(n, GROUP)
    row = panel_ptr + row_number * stride_row
    # the maximum of every group, one read of the row
    for first in range(0, n_groups, STEP):
        group = first + tl.arange(0, STEP)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.load(row + column, mask=column < n, other=float("-inf"))
        tl.store(scratch + group, largest_key(x, UNUSED), mask=group < n_groups)
    held, floor = _held(scores, features, c, UNUSED, LIST)
    tl.debug_barrier()
    # the groups with a score above the floor, at most the c whose maxima are largest
    group = tl.arange(0, GROUPS)
    maxima = tl.load(scratch + group, mask=group < n_groups, other=NOTHING)
    groups = tl.sum((maxima > floor).to(tl.int32))
    if groups > 0:
        tau = floor
        if groups > c:
            tau = kth_key(maxima, c, least_key(maxima), UNUSED)
        groups = tl.minimum(groups, c)
        ties = groups - tl.sum((maxima > tau).to(tl.int32))
        chosen, rank = places(maxima, tau, ties, 0, 0)
        tl.debug_barrier()
        tl.store(scratch + rank, group, mask=chosen)
        tl.debug_barrier()
        # the scores above the floor in those groups, at most the c best
        kept = tl.arange(0, KEPT)
        of = tl.load(scratch + kept, mask=kept < groups, other=n_groups)
        within = of[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        tile = tl.load(row + within, mask=within < n, other=0.0)
        tile_keys = tl.where(within < n, order_key(tile.to(tl.float32), UNUSED), NOTHING)
        keys = tl.reshape(tile_keys, [KEPT * GROUP])
        above = tl.sum((keys > floor).to(tl.int32))
        kth = floor
        if above > c:
            kth = kth_key(keys, c, tau, UNUSED)
        arrived = tl.minimum(above, c)
        ties = arrived - tl.sum((keys > kth).to(tl.int32))
        taken, slot = places(keys, kth, ties, 0, 0)
        # addressed and loaded anew: kept in registers since the first load, they would spill
        place = tl.arange(0, KEPT * GROUP)
        at = tl.load(scratch + place // GROUP, mask=taken, other=0) * GROUP + place % GROUP
        tl.store(scores + c + slot, tl.load(row + at, mask=taken, other=0.0), mask=taken)
        tl.store(features + c + slot, at + base, mask=taken)
        _merge(scores, features, c, held, arrived, UNUSED, LIST)


@dataclass(frozen=True)
class Shape:
    """The pinned configuration for panels of one width; `groups` is 0 where a row is whole."""

    groups: int
    constants: dict[str, int]
    num_warps: int


@functools.lru_cache(maxsize=256)
def shape_of(width: int, c: int) -> Shape:
    held = max(16, power_of_two(c))
    grouped = grouped_shape(width, c)
    if grouped is None:
        block = max(16, power_of_two(width))
        return Shape(0, {"BLOCK": block, "LIST": held}, warps(max(block, 2 * held)))
    constants = {name: size for name, size in grouped.items() if name != "num_warps"}
    num_warps = max(grouped["num_warps"], warps(2 * held))
    return Shape(grouped["GROUPS"], constants | {"LIST": held}, num_warps)


def panel_width(c: int, most: int) -> int:
    """The widest panel of at most `most` features that c winners can be selected from.

    Unless it is `most`, a multiple of 32: the second screen has a word of bits for as many.
    """
    width = most
    while width > WHOLE and grouped_shape(width, c) is None:
        width = -(-width // 64) * 32
    return width


class Winners:
    """The c best of n tokens.

    Attributes:
        scores, features: `[n, 2 c]`, the winners in the first c columns, ascending by feature.
    """

    def __init__(self, n: int, c: int, dtype: torch.dtype, device: torch.device):
        self.c, self.unused = c, order.UNUSED_BITS[dtype]
        self.scores = torch.empty(n, 2 * c, dtype=dtype, device=device)
        self.features = torch.empty(n, 2 * c, dtype=torch.int32, device=device)

    @staticmethod
    def token_bytes(c: int) -> int:
        return 2 * c * 6

    def begin(self) -> None:
        # -1 is a place not filled yet
        self.features.fill_(-1)

    def add(self, panel: torch.Tensor, row: int, base: int, maxima: torch.Tensor) -> None:
        """Take in the scores [rows, width] of the tokens row.. and of the features base.. ."""
        rows, width = panel.shape
        shape = shape_of(width, self.c)
        lists = self.scores[row:], self.features[row:]
        sizes = width, self.c, base, panel.stride(0), 2 * self.c
        if shape.groups:
            _encode_winners_grouped_kernel[(rows,)](
                panel, *lists, maxima, *sizes,
                UNUSED=self.unused, num_warps=shape.num_warps, **shape.constants,
            )  # fmt: skip
        else:
            _encode_winners_whole_kernel[(rows,)](
                panel, *lists, *sizes,
                UNUSED=self.unused, num_warps=shape.num_warps, **shape.constants,
            )  # fmt: skip


def within_memory(device: torch.device, make: Callable[[int], T], least: int) -> T:
    """make(bytes of scratch), with SCRATCH or, where the device has no room, down to `least`."""
    scratch = SCRATCH
    while True:
        try:
            return make(scratch)
        except torch.OutOfMemoryError as error:
            if scratch <= least:
                raise RuntimeError(
                    f"topk_encode: expected {scratch >> 20} MB of free memory on {device} for "
                    f"scratch, got an allocation failure; free memory there"
                ) from error
            scratch = max(least, scratch // 4)


def cases() -> list[Case]:
    found = []
    types = dict.fromkeys(("n", "c", "base", "stride_row", "stride_list"), "i32")
    types |= {"features_ptr": "*i32"}
    widths = (
        (4096, 2048),
        (4095, 500),
        (16384, 128),
        (8192, 256),
        (32768, 64),
        (32768, 1024),
        (12345, 100),
    )
    kernels = _encode_winners_whole_kernel, _encode_winners_grouped_kernel
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        typed = types | {"panel_ptr": f"*{name}", "scores_ptr": f"*{name}"}
        for width, c in widths:
            shape = shape_of(width, c)
            found.append(
                Case(
                    f"winners {name} {width} c={c}",
                    kernels[shape.groups > 0],
                    typed | ({"maxima_ptr": "*i32"} if shape.groups else {}),
                    {"UNUSED": order.UNUSED_BITS[dtype]} | shape.constants,
                    num_warps=shape.num_warps,
                    divisible=("stride_row", "n") if width % 16 == 0 else (),
                )
            )
    return found
