# SPDX-License-Identifier: Apache-2.0
"""Top-k encode without the tokens x features matrix: screen, select, rescore, settle.

16-bit inputs go another way (`encode_plain`). For the others, and for ranks with a scale:

1. Panels of features: the bf16 product of packed operands (`encode_screen`) gives upper bounds of
   all scores, `row_topk` keeps the c highest of every token, panel after panel, in one read.
2. The c candidates are scored exactly and the k best selected; the least of their upper bounds
   tells whether a feature that was left out could belong there.
3. Tokens where it could (`encode_exact`) are done again without the screen. Usually none;
   where there were some, later calls keep more candidates (`encode_kept`).

No step waits for the device, so a CUDA graph can hold them all. Scratch is planned to SCRATCH
bytes, to which row_topk adds at most 64 MB, and shrinks when the device is full.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from ..common.products import part
from ..select.row_topk import TILE, select_into, warps
from .encode_exact import EXACT, EXACT_WARPS, _encode_exact_kernel
from .encode_kept import kept_of
from .encode_plain import encode_plain
from .encode_screen import (
    EXTRA,
    PACK,
    PACK_WARPS,
    RESCORE,
    RESCORE_WARPS,
    _encode_pack_kernel,
    _encode_rescore_kernel,
    _encode_settle_kernel,
    packed_width,
)
from .encode_winners import (
    MOST_FEATURES,
    MOST_TOKENS,
    SCRATCH,
    Winners,
    full_sums,
    within_memory,
)

# scores in these dtypes are rounded by 2^-9 or 2^-12, as eager's are: to settle the order below
# that costs more (at G2 some 3 of 11 ms, predicted) than it tells
PLAIN = (torch.bfloat16, torch.float16)
# programs of encode_exact, each with a scratch of 8 bytes per feature
EXACT_PROGRAMS = 256


def candidates(k: int, d: int, n_features: int, rounded: bool) -> int:
    """How many features a token keeps for exact scoring.

    For scores that fall off as normal ones do, the bound (relative to their spread) is worth
    exp(0.0115 sqrt(d)) times as many features: bf16's rounding of both operands is 0.0023 |x| |v|
    or 0.0023 sqrt(d) spreads, and 5 (4, and a quarter more) is the rate at which they thin out per
    spread. bf16 operands that are not rounded leave the rounding of the bounds themselves. More
    candidates cost a dot product each, too few an exact pass over the token.
    """
    factor = math.exp(0.0115 * math.sqrt(d)) if rounded else 1.1
    return min(n_features, -(-(int(k * factor) + 32) // 8) * 8)


def rounds(x: torch.Tensor, b_dec: torch.Tensor | None, scale: torch.Tensor | None) -> bool:
    """Whether bf16 holds less than the operands do."""
    return x.dtype != torch.bfloat16 or b_dec is not None or scale is not None


@dataclass(frozen=True)
class Plan:
    """Tokens that go through all panels together, tokens and features of one product."""

    tokens: int
    rows: int
    features: int
    exact_programs: int


def plan(n: int, f: int, width: int, c: int, scratch: int) -> Plan:
    """Sizes whose tensors fit in `scratch` bytes, as far as one panel of 16 x 256 allows."""
    features = MOST_FEATURES
    while features > 256 and 2 * width * features > 0.31 * scratch:
        features //= 2
    # packed x, candidates, exact h and s
    token_bytes = 2 * width + Winners.token_bytes(c) + c * 8
    tokens = min(n, max(16, int(0.33 * scratch) // token_bytes))
    tokens = -(-n // -(-n // tokens))
    rows = min(tokens, MOST_TOKENS, max(16, int(0.21 * scratch) // (2 * features)))
    programs = max(1, int(0.15 * scratch) // (8 * f))
    return Plan(tokens, rows, min(f, features), min(tokens, EXACT_PROGRAMS, programs))


def pack(rows, shift, scale, bias, packed, extra, norms, tokens: bool) -> None:
    """See `_encode_pack_kernel`; packed may be None."""
    n, d = rows.shape
    _encode_pack_kernel[(triton.cdiv(n, PACK["ROWS"]),)](
        rows, shift, scale, bias, packed, extra, norms,
        n, d, packed_width(d) - EXTRA.value, *rows.stride(),
        step(packed), step(extra), step(shift), step(scale), step(bias),
        TOKENS=tokens, num_warps=PACK_WARPS, **PACK,
    )  # fmt: skip


def step(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


class Buffers:
    """The scratch of one call, for chunks of `sizes.tokens` tokens."""

    def __init__(self, device: torch.device, d: int, f: int, c: int, sizes: Plan):
        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        n, width = sizes.tokens, packed_width(d)
        self.x = empty(n, width, dtype=torch.bfloat16)
        self.weights = empty(sizes.features, width, dtype=torch.bfloat16)
        self.bounds = empty(sizes.rows * sizes.features, dtype=torch.bfloat16)
        self.x_norms = empty(n, dtype=torch.float32)
        self.weight_norms = empty(sizes.features, dtype=torch.float32)
        self.winners = Winners(n, c, torch.bfloat16, device)
        self.h, self.s = empty(2, n, c, dtype=torch.float32)
        self.certain = empty(n, dtype=torch.int32)
        self.exact = empty(sizes.exact_programs, 2, f, dtype=torch.float32)


def screen(x, w_enc, b_enc, b_dec, scale, sizes: Plan, b: Buffers) -> tuple[int, torch.Tensor]:
    """Fills b.winners with the features of highest bound.

    Returns their number per token and the largest norm of the weights.
    """
    n, f = x.shape[0], w_enc.shape[0]
    extra = b.x.shape[1] - EXTRA.value
    pack(x, b_dec, None, None, b.x, b.x[:, extra:], b.x_norms, True)
    largest = torch.zeros((), dtype=torch.float32, device=x.device)
    b.winners.begin(n)
    for first in range(0, f, sizes.features):
        end = min(f, first + sizes.features)
        weights, norms = b.weights[: end - first], b.weight_norms[: end - first]
        rows, scales, biases = (part(t, first, end) for t in (w_enc, scale, b_enc))
        pack(rows, None, scales, biases, weights, weights[:, extra:], norms, False)
        largest = torch.maximum(largest, norms.max())
        b.winners.add(_bounds(n, weights, sizes.rows, b), first, end - first)
    return b.winners.close(), largest


def _bounds(n: int, weights, rows: int, b: Buffers) -> Iterator[tuple[int, torch.Tensor]]:
    for row in range(0, n, rows):
        here = b.x[row : min(n, row + rows)]
        bounds = b.bounds[: len(here) * len(weights)].view(len(here), len(weights))
        with full_sums():
            torch.mm(here, weights.T, out=bounds)
        yield row, bounds


def settle(x, w_enc, b_enc, b_dec, scale, k, relu, c, left_out, largest, b: Buffers, out) -> None:
    """Exact scores of the c candidates per token, the selection, and whether it is certain."""
    n, d = x.shape
    f = w_enc.shape[0]
    values, indices = out
    strides = step(b_enc), step(b_dec), step(scale)
    _encode_rescore_kernel[(n, triton.cdiv(c, RESCORE["SLOTS"]))](
        x, w_enc, b_enc, b_dec, scale, b.winners.features, b.h, b.s, d, c,
        *x.stride(), *w_enc.stride(), *strides, step(b.winners.features),
        num_warps=RESCORE_WARPS, **RESCORE,
    )  # fmt: skip
    block = max(16, triton.next_power_of_2(c))
    _encode_settle_kernel[(n,)](
        b.s, b.h, b.winners.scores, b.winners.features, left_out, b.x_norms, largest,
        values, indices, b.certain, c, k, int(c == f), step(b.winners.scores),
        RELU=relu, BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    if c < f:
        _encode_exact_kernel[(min(n, len(b.exact)),)](
            x, w_enc, b_enc, b_dec, scale, b.certain, b.exact, values, indices, n, d, f, k,
            *x.stride(), *w_enc.stride(), *strides, RELU=relu,
            num_warps=EXACT_WARPS, **EXACT,
        )  # fmt: skip


@torch.no_grad()
def encode(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    b_dec: torch.Tensor | None,
    scale: torch.Tensor | None,
    k: int,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mikernels::encode` for x [N, d] and w_enc [F, d] of any strides."""
    (n, d), f = x.shape, w_enc.shape[0]
    out = x.new_empty(n, k), torch.empty(n, k, dtype=torch.int64, device=x.device)
    if n == 0:
        return out
    if x.dtype in PLAIN and scale is None:
        return encode_plain(x, w_enc, b_enc, b_dec, k, relu, out)
    rounded = rounds(x, b_dec, scale)
    c = candidates(k, d, f, rounded)
    if c > TILE:
        return dense(x, w_enc, b_enc, b_dec, scale, k, relu, out)
    kept = kept_of(x.device, f, d, k, rounded)
    c = kept.candidates(c, min(f, TILE))

    def buffers(scratch: int) -> tuple[Plan, Buffers]:
        sizes = plan(n, f, packed_width(d), c, scratch)
        return sizes, Buffers(x.device, d, f, c, sizes)

    sizes, b = within_memory(x.device, buffers)
    uncertain = torch.zeros((), dtype=torch.int64, device=x.device)
    for first in range(0, n, sizes.tokens):
        tokens = x[first : first + sizes.tokens]
        here = tuple(t[first : first + sizes.tokens] for t in out)
        operands = tokens, w_enc, b_enc, b_dec, scale
        found, largest = screen(*operands, sizes, b)
        settle(*operands, k, relu, found, None, largest, b, here)
        uncertain += (b.certain[: len(tokens)] == 0).sum()
    kept.count(uncertain, n)
    return out


def dense(x, w_enc, b_enc, b_dec, scale, k, relu, out) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in chunks of tokens: for k so large that nothing can be screened out."""
    values, indices = out
    f = w_enc.shape[0]
    rows = max(1, SCRATCH // (20 * f))
    for first in range(0, x.shape[0], rows):
        here = slice(first, first + rows)
        centred = x[here].float()
        if b_dec is not None:
            centred = centred - b_dec.float()
        h = centred.double() @ w_enc.double().T
        h = (h if b_enc is None else h + b_enc.double()).float()
        s = h if scale is None else h * scale.float()
        best = torch.empty(s.shape[0], k, dtype=torch.float32, device=x.device)
        select_into(s, k, best, indices[here])
        h = h.gather(1, indices[here])
        values[here] = h.relu() if relu else h
    return out
