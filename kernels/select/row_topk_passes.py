# SPDX-License-Identifier: Apache-2.0
"""Selection for any k and any row length: the row is read again for every bit of the k-th key."""

import torch
import triton
import triton.language as tl

from ..common.launch import kernel
from ..common.offline import Case
from . import order
from .order import NOTHING, order_key, places

# scores of one step
PASS = 2048


@triton.jit
def _count(row, n, bound, UNUSED: tl.constexpr, BLOCK: tl.constexpr):
    """How many keys of the row are at least `bound`."""
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(row + column, mask=column < n, other=0.0)
        keys = tl.where(column < n, order_key(x.to(tl.float32), UNUSED), NOTHING)
        total += (keys >= bound).to(tl.int32)
    return tl.sum(total)


@triton.jit
def kth_by_passes(row, n, k, UNUSED: tl.constexpr, BLOCK: tl.constexpr):
    """(the k-th largest key of a row, how many keys equal to it are among the k best)."""
    kth = tl.full((), -(2**31), tl.int32)
    bit = tl.full((), -(2**31), tl.int32)
    for _ in range(32 - UNUSED):
        candidate = kth ^ bit
        enough = _count(row, n, candidate, UNUSED, BLOCK) >= k
        kth = tl.where(enough, candidate, kth)
        bit = (bit >> 1) & 0x7FFFFFFF
    # a key above `kth` is at least the next key that the dtype has
    above = _count(row, n, kth + (1 << UNUSED), UNUSED, BLOCK)
    above = tl.where(kth >= 0x7FFFFFFF - (1 << UNUSED) + 1, 0, above)
    return kth, k - above


@triton.jit
def select_by_passes(
    row, values_ptr, indices_ptr, n, k, base, UNUSED: tl.constexpr, BLOCK: tl.constexpr
):
    """The k best of one row of any length, by 32 - UNUSED counting passes and one to store."""
    kth, ties = kth_by_passes(row, n, k, UNUSED, BLOCK)
    above_before = tl.full((), 0, tl.int32)
    ties_before = tl.full((), 0, tl.int32)
    for first in range(0, n, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(row + column, mask=column < n, other=0.0)
        keys = tl.where(column < n, order_key(x.to(tl.float32), UNUSED), NOTHING)
        taken, slot = places(keys, kth, ties, above_before, ties_before)
        tl.store(values_ptr + slot, x, mask=taken)
        tl.store(indices_ptr + slot, column + base, mask=taken)
        above_before += tl.sum((keys > kth).to(tl.int32))
        ties_before += tl.sum((keys == kth).to(tl.int32))


@kernel(do_not_specialize=["k", "n_rows", "base", "stride_out"])
def _row_topk_passes_kernel(
    scores_ptr, values_ptr, indices_ptr, n_rows, n, k, base,
    stride_row, stride_out,
    UNUSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    out = row * stride_out
    select_by_passes(
        scores_ptr + row * stride_row, values_ptr + out, indices_ptr + out,
        n, k, base, UNUSED, BLOCK,
    )  # fmt: skip


def cases() -> list[Case]:
    types = dict.fromkeys(("n_rows", "n", "k", "base", "stride_row", "stride_out"), "i32")
    return [
        Case(
            f"passes {name}{title}",
            _row_topk_passes_kernel,
            types | {"scores_ptr": f"*{name}", "values_ptr": f"*{name}", "indices_ptr": "*i64"},
            {"UNUSED": order.UNUSED_BITS[dtype], "BLOCK": PASS},
            num_warps=4,
            divisible=divisible,
        )
        for name, dtype in (
            ("fp32", torch.float32),
            ("bf16", torch.bfloat16),
            ("fp16", torch.float16),
        )
        for title, divisible in (("", ("stride_row", "n")), (", odd sizes", ()))
    ]
