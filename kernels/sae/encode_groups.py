# SPDX-License-Identifier: Apache-2.0
"""Encode with group maxima in the epilogue of the product: scores are never written.

The same screen as in `encode`, in another order: a matrix product keeps the maximum of every G
upper bounds, `row_topk` takes the m groups of highest maxima, and only those are multiplied again,
grouped by features (m G / F of the work, 2 to 7 %). In place of N x F scores there are N x F / G
maxima, and w_enc is read as it is, not packed. It beats panels where the product runs at their
rate: a plain Triton product must reach 92 % of cuBLAS's at d = 2304, 85 % at d = 768 (predicted).
"""

from __future__ import annotations

import torch
import triton

from ..common.products import WIDEN
from ..select.row_topk import select_into
from . import encode
from .encode_group_max import (
    AGAIN,
    AGAIN_LAUNCH,
    LARGE,
    LAUNCH,
    ODD_AGAIN,
    SMALL,
    SMALL_LAUNCH,
    _encode_group_max_kernel,
    _encode_groups_again_kernel,
)
from .encode_screen import EXTRA
from .gradients import by_feature


def is_even(w_enc: torch.Tensor) -> bool:
    """Whether the rows of the weights begin and end at multiples of 16."""
    return w_enc.shape[1] % 16 == 0 and w_enc.stride(0) % 16 == 0 and w_enc.stride(1) == 1


def product(device: torch.device, even: bool) -> tuple[dict[str, int], dict[str, int]]:
    """The pinned tile of the product and its launch."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    if even and nvidia and torch.cuda.get_device_capability(device) >= (9, 0):
        return LARGE, LAUNCH
    return SMALL, SMALL_LAUNCH


def group_size(f: int) -> int:
    return 64 if f >= 65536 else 32


def tokens_at_once(n: int, d: int, groups: int, group: int, m: int, c: int) -> int:
    """x^, maxima, the bounds computed again, slots by group, what settling takes: in SCRATCH."""
    token_bytes = 2 * d + 8 * groups + m * (2 * group + 40) + 60 * c
    return min(n, max(16, encode.SCRATCH // token_bytes))


@torch.no_grad()
def encode_groups(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    b_dec: torch.Tensor | None,
    scale: torch.Tensor | None,
    k: int,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `encode.encode` computes for fp32 inputs, bit for bit; 16-bit ones are rescored too."""
    (n, d), f = x.shape, w_enc.shape[0]
    out = x.new_empty(n, k), torch.empty(n, k, dtype=torch.int64, device=x.device)
    if n == 0:
        return out
    group = group_size(f)
    groups = triton.cdiv(f, group)
    c = encode.candidates(k, d, f, encode.rounds(x, b_dec, scale))
    m = min(groups, c)
    extra_w = torch.zeros(f, EXTRA.value, dtype=torch.bfloat16, device=x.device)
    norms = torch.empty(f, dtype=torch.float32, device=x.device)
    encode.pack(w_enc, None, scale, b_enc, None, extra_w, norms, False)
    largest = norms.max()
    tokens = tokens_at_once(n, d, groups, group, m, c)
    sizes = encode.Plan(tokens, 0, 0, min(tokens, 32))
    b = encode.Buffers(x.device, d, f, c, sizes)
    for first in range(0, n, tokens):
        here = slice(first, first + tokens)
        operands = x[here], w_enc, b_enc, b_dec, scale
        left_out = _screen(*operands[:2], *operands[3:], extra_w, group, groups, c, m, b)
        encode.settle(*operands, k, relu, c, left_out, largest, b, tuple(t[here] for t in out))
    return out


def _screen(x, w_enc, b_dec, scale, extra_w, group, groups, c, m, b) -> torch.Tensor | None:
    """Fills b.winners; returns the bound of the groups left out, if any."""
    (n, d), f = x.shape, w_enc.shape[0]
    extra_x = torch.zeros(n, EXTRA.value, dtype=torch.bfloat16, device=x.device)
    encode.pack(x, b_dec, None, None, b.x, extra_x, b.x_norms, True)
    operands = b.x, extra_x, w_enc, extra_w, scale
    strides = b.x.stride(0), *w_enc.stride(), encode.step(scale)
    maxima = torch.empty(n, groups, dtype=torch.float32, device=x.device)
    even = is_even(w_enc)
    tile, launch = product(x.device, even)
    grid = triton.cdiv(n, tile["BLOCK_N"]) * triton.cdiv(f, tile["BLOCK_F"])
    _encode_group_max_kernel[(grid,)](
        *operands, maxima, n, d, f, *strides, groups, GROUP=group, WIDEN=WIDEN, **tile, **launch
    )
    best = torch.empty(n, m, dtype=torch.float32, device=x.device)
    chosen = torch.empty(n, m, dtype=torch.int64, device=x.device)
    select_into(maxima, m, best, chosen)
    offsets, order = by_feature(chosen.reshape(-1), groups)
    # chunks of BLOCK_N tokens of one group; group_of is `groups` for the programs left over
    again = AGAIN if even else ODD_AGAIN
    chunks = (offsets.diff() + (again["BLOCK_N"] - 1)) // again["BLOCK_N"]
    last = chunks.cumsum(0)
    programs = groups + n * m // again["BLOCK_N"]
    numbers = torch.arange(programs, device=x.device)
    group_of = torch.searchsorted(last, numbers, right=True)
    bounds = torch.empty(n, m * group, dtype=torch.bfloat16, device=x.device)
    _encode_groups_again_kernel[(programs,)](
        *operands, group_of, last - chunks, offsets, order, bounds, groups, m, d, f, *strides,
        GROUP=group, WIDEN=WIDEN, **again, **AGAIN_LAUNCH,
    )  # fmt: skip
    kept = torch.empty(n, c, dtype=torch.bfloat16, device=x.device)
    places = torch.empty(n, c, dtype=torch.int64, device=x.device)
    select_into(bounds, c, kept, places)
    b.winners.scores[:n, :c] = kept
    b.winners.features[:n, :c] = chosen.gather(1, places // group) * group + places % group
    return None if m == groups else best.amin(1)
