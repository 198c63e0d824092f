# SPDX-License-Identifier: Apache-2.0
"""Second half of `pair_products_`: parts of a sum, added up in order, each with its weights."""

from __future__ import annotations

import torch
import triton.language as tl

from ..common.launch import ceil_div, kernel
from ..common.offline import Case
from ..common.products import WIDEN, multiply, product_case

# parts are read PARTS at a time; a program weights them for BLOCK_Q replicates
SUM = {"PARTS": 16, "BLOCK": 128, "num_warps": 4, "num_stages": 2}
BLOCK_Q = 16


@kernel(do_not_specialize=["n", "m", "q_count", "parts", "splits", "weights_s", "prefix_m"])
def _pair_sum_kernel(
    parts_ptr, weights_ptr, prefix_ptr, out_ptr, n, m, q_count, parts, splits,
    weights_q, weights_s, prefix_m, out_q, out_n, out_m,
    SYMMETRIC: tl.constexpr, WIDEN: tl.constexpr, BLOCK_Q: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[q, i, j] += sum over parts of weights[q, part // splits] part[i, j]."""
    blocks = tl.cdiv(m, BLOCK)
    i = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    q = (tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    inside = j < m
    if prefix_ptr is not None:
        inside = inside & (i < tl.load(prefix_ptr + j * prefix_m, mask=inside, other=0))
    source = i * m + j
    if SYMMETRIC:  # the lower triangle was not computed
        source = tl.minimum(i, j) * m + tl.maximum(i, j)
    total = tl.zeros([BLOCK_Q, BLOCK], tl.float32)
    for first in range(0, parts, PARTS):
        part = (first + tl.arange(0, PARTS)).to(tl.int64)
        at = parts_ptr + part[:, None] * n * m + source[None, :]
        x = tl.load(at, mask=(part < parts)[:, None] & inside[None, :], other=0.0)
        if weights_ptr is not None:
            at = weights_ptr + q[:, None] * weights_q + (part // splits)[None, :] * weights_s
            mask = (q < q_count)[:, None] & (part < parts)[None, :]
            weights = tl.load(at, mask=mask, other=0.0)
            total = multiply(weights, x, total, WIDEN)
        else:
            total += tl.sum(x, 0)[None, :]
    to = out_ptr + q[:, None] * out_q + i * out_n + j[None, :] * out_m
    mask = (q < q_count)[:, None] & inside[None, :]
    tl.store(to, tl.load(to, mask=mask, other=0.0) + total, mask=mask)


def add_parts(
    parts: torch.Tensor,
    weights: torch.Tensor | None,
    prefix: torch.Tensor | None,
    symmetric: bool,
    out: torch.Tensor,
) -> None:
    """Adds parts [examples, splits, n, m] to out [Q, n, m], with weights [Q, examples]."""
    (examples, splits, n, m), q = parts.shape, out.shape[0]
    block_q = 1 if weights is None else BLOCK_Q
    _pair_sum_kernel[(n * ceil_div(m, SUM["BLOCK"]), ceil_div(q, block_q))](
        parts, weights, prefix, out, n, m, q, examples * splits, splits,
        *((0, 0) if weights is None else weights.stride()),
        0 if prefix is None else prefix.stride(0), *out.stride(),
        SYMMETRIC=symmetric, WIDEN=WIDEN, BLOCK_Q=block_q, **SUM,
    )  # fmt: skip


def cases() -> list[Case]:
    types = dict.fromkeys(("parts_ptr", "out_ptr"), "*fp32")
    names = "n", "m", "q_count", "parts", "splits", "weights_q", "weights_s", "prefix_m"
    types |= dict.fromkeys((*names, "out_q", "out_n"), "i32")
    weighted = types | {"weights_ptr": "*fp32", "prefix_ptr": "*i64"}
    constants = {"out_m": 1, "SYMMETRIC": False, "WIDEN": False, "BLOCK_Q": BLOCK_Q}
    found = product_case(
        "fp32 weights", _pair_sum_kernel, weighted, constants, lambda deep: dict(SUM), False
    )
    bare = {"weights_ptr": None, "prefix_ptr": None, "SYMMETRIC": True, "BLOCK_Q": 1}
    blocks = {"PARTS": SUM["PARTS"], "BLOCK": SUM["BLOCK"]}
    return [*found, Case("fp32", _pair_sum_kernel, types, constants | bare | blocks, num_stages=2)]
