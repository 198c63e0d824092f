# SPDX-License-Identifier: Apache-2.0
"""Top-k encode without the tokens x features matrix: screen, select, rescore, settle.

1. Panels of features: the bf16 product of packed operands (`encode_screen`) gives upper bounds of
   all scores, `row_topk` keeps the c highest of every token, panel after panel, in one read.
2. The c candidates are scored exactly and the k best selected; the least of their upper bounds
   tells whether a feature that was left out could belong there.
3. Tokens where it could (`encode_exact`) are done again without the screen. Almost always none.

No step waits for the device, so a CUDA graph can hold them all. Scratch is at most SCRATCH bytes,
whatever N and F, and shrinks when the device is full.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton

from .encode_exact import EXACT, EXACT_WARPS, _encode_exact_kernel
from .encode_screen import (
    PACK,
    PACK_WARPS,
    RESCORE,
    RESCORE_WARPS,
    _encode_pack_kernel,
    _encode_rescore_kernel,
    _encode_settle_kernel,
    packed_width,
)
from .row_topk import TILE, select_into, warps

SCRATCH = 256 << 20
LEAST_SCRATCH = 4 << 20
# a panel is wide enough for cuBLAS to run at its rate, and its scores narrow enough for SCRATCH
MOST_FEATURES, MOST_TOKENS = 32768, 4096
# panels whose candidates wait before they are merged
WAITING = 3
# programs of encode_exact, each with a scratch of 8 bytes a feature
EXACT_PROGRAMS = 128


def candidates(k: int, d: int, n_features: int, rounded: bool) -> int:
    """How many features a token keeps for exact scoring.

    For scores that fall off as normal ones do, the bound (relative to their spread) is worth
    exp(0.0115 sqrt(d)) times as many features: bf16's rounding of both operands is 0.0023 |x| |v|
    or 0.0023 sqrt(d) spreads, and 4 + a share more is the rate at which they thin out per spread.
    bf16 operands that are not rounded leave the rounding of the bounds themselves. More candidates
    cost a dot product each, too few an exact pass over the token.
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
    while features > 256 and 2 * width * features > 0.33 * scratch:
        features //= 2
    # packed x, bounds and features of the waiting candidates, exact h and s
    token_bytes = 2 * width + (WAITING + 1) * c * 6 + c * 22
    tokens = min(n, max(16, int(0.38 * scratch) // token_bytes))
    tokens = -(-n // -(-n // tokens))
    rows = min(tokens, MOST_TOKENS, max(16, int(0.24 * scratch) // (2 * features)))
    programs = max(1, int(0.05 * scratch) // (8 * f))
    return Plan(tokens, rows, min(f, features), min(tokens, EXACT_PROGRAMS, programs))


@contextmanager
def _full_sums() -> Iterator[None]:
    """cuBLAS may not add up parts of a bf16 product in bf16: the bound is for fp32 sums."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def pack(rows, shift, scale, bias, packed, extra, norms, tokens: bool) -> None:
    """See `_encode_pack_kernel`; packed may be None."""
    n, d = rows.shape
    _encode_pack_kernel[(triton.cdiv(n, PACK["ROWS"]),)](
        rows, shift, scale, bias, packed, extra, norms, n, d, packed_width(d), *rows.stride(),
        step(packed), step(extra), step(shift), step(scale), step(bias),
        TOKENS=tokens, num_warps=PACK_WARPS, **PACK,
    )  # fmt: skip


def step(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def part(t: torch.Tensor | None, begin: int, end: int) -> torch.Tensor | None:
    return None if t is None else t[begin:end]


class Buffers:
    """The scratch of one call, for chunks of `sizes.tokens` tokens."""

    def __init__(self, device: torch.device, d: int, f: int, c: int, sizes: Plan):
        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        n, width, waiting = sizes.tokens, packed_width(d), (WAITING + 1) * c
        self.x = empty(n, width, dtype=torch.bfloat16)
        self.weights = empty(sizes.features, width, dtype=torch.bfloat16)
        self.bounds = empty(sizes.rows * sizes.features, dtype=torch.bfloat16)
        self.x_norms = empty(n, dtype=torch.float32)
        self.weight_norms = empty(sizes.features, dtype=torch.float32)
        self.kept = empty(n, waiting, dtype=torch.bfloat16)
        self.features = empty(n, waiting, dtype=torch.int32)
        self.merged = empty(n, c, dtype=torch.bfloat16)
        self.places = empty(n, c, dtype=torch.int64)
        self.h, self.s = empty(2, n, c, dtype=torch.float32)
        self.certain = empty(n, dtype=torch.int32)
        self.exact = empty(sizes.exact_programs, 2, f, dtype=torch.float32)


def allocate(device: torch.device, n: int, d: int, f: int, c: int) -> tuple[Plan, Buffers]:
    """Buffers of SCRATCH bytes or, where the device has no room, of less and less."""
    scratch = SCRATCH
    while True:
        sizes = plan(n, f, packed_width(d), c, scratch)
        try:
            return sizes, Buffers(device, d, f, c, sizes)
        except torch.OutOfMemoryError as error:
            if scratch <= LEAST_SCRATCH:
                raise RuntimeError(
                    f"topk_encode: expected {scratch >> 20} MB of free memory on {device} for "
                    f"scratch, got an allocation failure; free memory there"
                ) from error
            scratch //= 4


def screen(
    x, w_enc, b_enc, b_dec, scale, c: int, sizes: Plan, b: Buffers
) -> tuple[int, torch.Tensor]:
    """Fills b.kept and b.features with the features of highest bound, ascending by feature.

    Returns their number a token and the largest norm of the weights.
    """
    n, f = x.shape[0], w_enc.shape[0]
    extra = b.x.shape[1] - 8
    pack(x, b_dec, None, None, b.x, b.x[:, extra:], b.x_norms, True)
    largest = torch.zeros((), dtype=torch.float32, device=x.device)
    filled = 0
    for first in range(0, f, sizes.features):
        end = min(f, first + sizes.features)
        weights, norms = b.weights[: end - first], b.weight_norms[: end - first]
        rows, scales, biases = (part(t, first, end) for t in (w_enc, scale, b_enc))
        pack(rows, None, scales, biases, weights, weights[:, extra:], norms, False)
        largest = torch.maximum(largest, norms.max())
        if filled + min(c, end - first) > b.kept.shape[1]:
            filled = _merge(n, c, filled, b)
        taken = min(c, end - first)
        for row in range(0, n, sizes.rows):
            bounds = b.bounds[: min(sizes.rows, n - row) * len(weights)].view(-1, len(weights))
            rows_here = slice(row, row + len(bounds))
            with _full_sums():
                torch.mm(b.x[rows_here], weights.T, out=bounds)
            columns = slice(filled, filled + taken)
            out = b.kept[rows_here, columns], b.features[rows_here, columns]
            select_into(bounds, taken, *out, base=first)
        filled += taken
    return (_merge(n, c, filled, b) if filled > c else filled), largest


def _merge(n: int, c: int, filled: int, b: Buffers) -> int:
    merged, places = b.merged[:n], b.places[:n]
    select_into(b.kept[:n, :filled], c, merged, places)
    b.kept[:n, :c] = merged
    b.features[:n, :c] = b.features[:n].gather(1, places)
    return c


def settle(x, w_enc, b_enc, b_dec, scale, k, relu, c, left_out, largest, b: Buffers, out) -> None:
    """Exact scores of the c candidates a token, the selection, and whether it is certain."""
    n, d = x.shape
    f = w_enc.shape[0]
    values, indices = out
    strides = step(b_enc), step(b_dec), step(scale)
    _encode_rescore_kernel[(n, triton.cdiv(c, RESCORE["SLOTS"]))](
        x, w_enc, b_enc, b_dec, scale, b.features, b.h, b.s, d, c,
        *x.stride(), *w_enc.stride(), *strides, step(b.features),
        num_warps=RESCORE_WARPS, **RESCORE,
    )  # fmt: skip
    block = max(16, triton.next_power_of_2(c))
    _encode_settle_kernel[(n,)](
        b.s, b.h, b.kept, b.features, left_out, b.x_norms, largest, values, indices, b.certain,
        c, k, int(c == f), step(b.kept), RELU=relu, BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    if c < f:
        _encode_exact_kernel[(min(n, len(b.exact)),)](
            x, w_enc, b_enc, b_dec, scale, b.certain, b.exact, values, indices, n, d, f, k,
            *x.stride(), *w_enc.stride(), *strides, RELU=relu,
            num_warps=EXACT_WARPS, **EXACT,
        )  # fmt: skip


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
    c = candidates(k, d, f, rounds(x, b_dec, scale))
    if c > TILE:
        return dense(x, w_enc, b_enc, b_dec, scale, k, relu, out)
    sizes, buffers = allocate(x.device, n, d, f, c)
    for first in range(0, n, sizes.tokens):
        tokens = x[first : first + sizes.tokens]
        here = tuple(t[first : first + sizes.tokens] for t in out)
        operands = tokens, w_enc, b_enc, b_dec, scale
        kept, largest = screen(*operands, c, sizes, buffers)
        settle(*operands, k, relu, kept, None, largest, buffers, here)
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
