# SPDX-License-Identifier: Apache-2.0
"""Top-k encode without the tokens x features matrix: screen, select, settle, and once more.

16-bit inputs go another way (`encode_plain`). For the others, and for ranks with a scale:

1. Panels of features: the fp16 product of packed operands (`encode_screen`) gives upper bounds of
   all scores, of which every token keeps the c highest, panel after panel (`encode_winners`).
2. The candidates that can still win are scored exactly and the k best selected; the least of the c
   bounds tells whether a feature that was left out could belong there (`encode_settle`).
3. Tokens where it could are screened again, now against a k-th score that is known
   (`encode_again`), and what reaches it is scored, split over the device (`encode_exact`). NaN rows
   and rows of zeros (padding, or x = b_dec as at initialisation) do not come so far: of the first
   all is known, of the second one is computed for all.

No step waits for the device, so a CUDA graph can hold them all. Scratch is planned to SCRATCH
bytes, and shrinks when the device is full: neither the selection nor its bits depend on that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..common.full_sums import full_sums
from ..common.launch import ceil_div, power_of_two
from ..common.products import WIDEN, part
from ..select.row_topk import select_into
from .encode_again import AGAIN, AGAIN_LAUNCH, _encode_again_kernel
from .encode_exact import (
    COPIERS,
    EXACT,
    EXACT_WARPS,
    MERGE,
    QUEUE,
    _encode_copy_kernel,
    _encode_exact_kernel,
    _encode_merge_kernel,
    _encode_queue_kernel,
    list_size,
)
from .encode_plain import encode_plain
from .encode_screen import (
    EXTRA,
    PACK,
    PACK_WARPS,
    SURVEY,
    SURVEY_WARPS,
    SURVEYORS,
    _encode_pack_w_kernel,
    _encode_pack_x_kernel,
    _encode_survey_kernel,
    packed_width,
    root_exponent,
)
from .encode_settle import SETTLE, _encode_settle_kernel, settle_warps
from .encode_winners import (
    MOST_WINNERS,
    SCRATCH,
    Winners,
    panel_width,
    shape_of,
    within_memory,
)

# scores in these dtypes are rounded by 2^-9 or 2^-12, as eager's are: to settle the order below
# that costs more (at G2 some 3 of 11 ms, predicted) than it tells
PLAIN = (torch.bfloat16, torch.float16)
# scratch that encode can do with
LEAST_SCRATCH = 4 << 20
# a panel is wide enough for cuBLAS to run at its rate and to select fewer scores than it holds
MOST_FEATURES, MOST_TOKENS = 32768, 4096
# programs of the exact pass: 4 per multiprocessor of an H100
EXACT_PROGRAMS = 528


def candidates(k: int, d: int, n_features: int) -> int:
    """How many features a token keeps: a power of two, which costs a selection no more than less.

    Those whose bound reaches the k-th score, and 16 more for chance, are kept at least. Only those
    that reach it are scored, so keeping more is cheap, and having kept too few is rare.
    """
    return min(n_features, power_of_two(math.ceil(reaching(k, d)) + 16))


def reaching(k: int, d: int) -> float:
    """How many features have a bound that reaches the k-th score, for scores as normal ones.

    The rounding of both fp16 operands (2e-4 each) and that of the sum, relative to |x| |v|, are
    sqrt(d) times as much in spreads of the scores, and those thin out at a rate of 4 per spread.
    Drawn: 74 of k = 64 at d = 2304, 163 of 128 at 4096.
    """
    return k * math.exp(4 * (4e-4 + d * 2.0**-23) * math.sqrt(d))


@dataclass(frozen=True)
class Plan:
    """Tokens that go through all panels together, tokens and features of one product, uncertain
    tokens that the second screen has room for, and programs of the exact pass."""

    tokens: int
    rows: int
    features: int
    again: int
    programs: int


def plan(n: int, f: int, width: int, c: int, k: int, scratch: int) -> Plan:
    """Sizes whose tensors fit in `scratch` bytes, as far as one panel of 16 x 256 allows."""
    # packed x, winners, exact s and h, what is known of a token
    token_bytes = 2 * width + Winners.token_bytes(c) + 8 * c + 24
    tokens = min(n, max(16, int(0.42 * scratch) // token_bytes))
    tokens = -(-n // -(-n // tokens))
    features = MOST_FEATURES
    while features > 256 and 2 * width * features > 0.3 * scratch:
        features //= 2
    features = panel_width(c, min(f, features))
    program_bytes = 12 * list_size(k) + 4 * EXACT["SEGMENT"]
    programs = min(EXACT_PROGRAMS, max(1, int(0.1 * scratch) // program_bytes))
    again = min(tokens, int(0.07 * scratch) // (-(-f // 32) * 4))
    left = scratch - tokens * token_bytes - features * width * 2
    left -= programs * program_bytes + again * (-(-f // 32) * 4)
    rows = max(16, left // (2 * features + 4 * shape_of(features, c).groups))
    rows = min(tokens, MOST_TOKENS, rows)
    return Plan(tokens, -(-tokens // -(-tokens // rows)), features, again, programs)


def step(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


class Buffers:
    """The scratch of one call, for chunks of `sizes.tokens` tokens."""

    def __init__(self, device: torch.device, d: int, f: int, c: int, k: int, sizes: Plan):
        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        n, width = sizes.tokens, packed_width(d)
        self.survey = empty(3, SURVEYORS.value)
        self.x = empty(n, width, dtype=torch.float16)
        self.weights = empty(sizes.features, width, dtype=torch.float16)
        self.bounds = empty(sizes.rows * sizes.features, dtype=torch.float16)
        self.maxima = empty(sizes.rows, shape_of(sizes.features, c).groups)
        self.winners = Winners(n, c, torch.float16, device)
        self.scores = empty(2, n, c, dtype=torch.float32)
        self.exponents, self.states, self.floors, self.queue, self.zeros = empty(5, n)
        self.thresholds = empty(n, dtype=torch.float32)
        self.counts = empty(2)
        self.masks = empty(sizes.again, -(-f // 32))
        self.lists = empty(2, sizes.programs, list_size(k), dtype=torch.float32)
        self.listed = empty(sizes.programs, list_size(k))
        self.todo = empty(sizes.programs, EXACT["SEGMENT"])
        self.held = empty(sizes.programs)


@dataclass(frozen=True)
class Weights:
    """What does not change from chunk to chunk of tokens."""

    w_enc: torch.Tensor
    b_enc: torch.Tensor | None
    b_dec: torch.Tensor | None
    scale: torch.Tensor | None

    @property
    def pointers(self) -> tuple[torch.Tensor | None, ...]:
        return self.w_enc, self.b_enc, self.b_dec, self.scale

    @property
    def strides(self) -> tuple[int, ...]:
        return (*self.w_enc.stride(), step(self.b_enc), step(self.b_dec), step(self.scale))


def survey(w: Weights, b: Buffers) -> None:
    """The magnitudes from which the units follow."""
    f, d = w.w_enc.shape
    _encode_survey_kernel[(SURVEYORS.value,)](
        w.w_enc, w.scale, w.b_enc, b.survey, f, d,
        *w.w_enc.stride(), step(w.scale), step(w.b_enc), num_warps=SURVEY_WARPS, **SURVEY,
    )  # fmt: skip


def pack_tokens(x: torch.Tensor, w: Weights, b: Buffers) -> None:
    n, d = x.shape
    width = b.x.shape[1]
    _encode_pack_x_kernel[(ceil_div(n, PACK["ROWS"]),)](
        x, w.b_dec, b.survey, b.x, b.exponents, n, d, width - EXTRA.value, root_exponent(d),
        *x.stride(), width, step(w.b_dec), num_warps=PACK_WARPS, **PACK,
    )  # fmt: skip


def pack_weights(w: Weights, first: int, end: int, count: torch.Tensor | None, b: Buffers):
    """The packed features first..end, written unless `count` holds 0."""
    rows, scale, bias = (part(t, first, end) for t in (w.w_enc, w.scale, w.b_enc))
    (f, d), width = rows.shape, b.weights.shape[1]
    _encode_pack_w_kernel[(ceil_div(f, PACK["ROWS"]),)](
        rows, scale, bias, b.survey, count, b.weights,
        f, d, width - EXTRA.value, root_exponent(d),
        *rows.stride(), width, step(scale), step(bias), num_warps=PACK_WARPS, **PACK,
    )  # fmt: skip
    return b.weights[:f]


def screen(n: int, w: Weights, panels: list[tuple[int, int]], rows: int, b: Buffers) -> None:
    """Fills b.winners with the features of highest bound."""
    b.winners.begin()
    for first, end in panels:
        weights = pack_weights(w, first, end, None, b).T
        for row in range(0, n, rows):
            here = b.x[row : min(n, row + rows)]
            bounds = b.bounds[: len(here) * (end - first)].view(len(here), end - first)
            torch.mm(here, weights, out=bounds)
            b.winners.add(bounds, row, first, b.maxima)


def settle(x: torch.Tensor, w: Weights, k: int, relu: bool, b: Buffers, out) -> None:
    """Exact scores of the candidates, the selection, and whether it is certain."""
    (n, d), c = x.shape, b.winners.c
    block = max(16, power_of_two(c))
    _encode_settle_kernel[(n,)](
        x, *w.pointers, b.exponents, b.winners.scores, b.winners.features, *b.scores, *out,
        b.states, b.floors, b.thresholds, d, c, k, int(c == len(w.w_enc)),
        *x.stride(), *w.strides, RELU=relu, LIST=block, num_warps=settle_warps(block), **SETTLE,
    )  # fmt: skip


def again(x, w: Weights, panels, k: int, relu: bool, sizes: Plan, b: Buffers, out) -> None:
    """The tokens that were not certain, as many as the device finds there are."""
    (n, d), f = x.shape, len(w.w_enc)
    _encode_queue_kernel[(1,)](
        b.states, b.counts, b.queue, b.zeros, n, BLOCK=QUEUE, num_warps=8
    )  # fmt: skip
    tiles = ceil_div(min(n, sizes.again), AGAIN["BLOCK_N"])
    # the last panel is still packed
    for first, end in reversed(panels) if tiles else ():
        if end < f:
            pack_weights(w, first, end, b.counts, b)
        _encode_again_kernel[(tiles * ceil_div(end - first, AGAIN["BLOCK_F"]),)](
            b.x, b.weights, b.counts, b.queue, b.thresholds, b.masks,
            end - first, first, sizes.again, b.x.shape[1], b.masks.stride(0),
            WIDEN=WIDEN, **AGAIN, **AGAIN_LAUNCH,
        )  # fmt: skip
    size = b.listed.shape[1]
    _encode_exact_kernel[(sizes.programs,)](
        x, *w.pointers, b.counts, b.queue, b.floors, b.masks, *b.lists, b.listed, b.todo, b.held,
        *out, d, f, k, sizes.again, size, *x.stride(), *w.strides, b.masks.stride(0),
        RELU=relu, num_warps=EXACT_WARPS, **EXACT,
    )  # fmt: skip
    # more tokens are not split
    _encode_merge_kernel[(max(1, min(n, sizes.programs // 2)),)](
        b.counts, b.queue, *b.lists, b.listed, b.held, *out, k, size, sizes.programs,
        RELU=relu, BLOCK=MERGE, num_warps=8,
    )  # fmt: skip
    _encode_copy_kernel[(COPIERS,)](
        b.counts, b.zeros, *out, k, BLOCK=max(16, min(1024, power_of_two(k)))
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
    c = candidates(k, d, f)
    if c > MOST_WINNERS:
        return dense(x, w_enc, b_enc, b_dec, scale, k, relu, out)

    def buffers(scratch: int) -> tuple[Plan, Buffers]:
        sizes = plan(n, f, packed_width(d), c, k, scratch)
        return sizes, Buffers(x.device, d, f, c, k, sizes)

    sizes, b = within_memory(x.device, buffers, LEAST_SCRATCH)
    w = Weights(w_enc, b_enc, b_dec, scale)
    panels = panels_of(f, c, sizes.features)
    survey(w, b)
    with full_sums():
        for first in range(0, n, sizes.tokens):
            tokens = x[first : first + sizes.tokens]
            here = [t[first : first + sizes.tokens] for t in out]
            pack_tokens(tokens, w, b)
            screen(len(tokens), w, panels, sizes.rows, b)
            settle(tokens, w, k, relu, b, here)
            if c < f:
                again(tokens, w, panels, k, relu, sizes, b, here)
    return out


def panels_of(f: int, c: int, features: int) -> list[tuple[int, int]]:
    """The panels that F features are taken in, of at most `features`."""
    panels, first = [], 0
    while first < f:
        end = first + panel_width(c, min(features, f - first))
        panels.append((first, end))
        first = end
    return panels


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
