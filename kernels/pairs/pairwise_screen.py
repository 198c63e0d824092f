# SPDX-License-Identifier: Apache-2.0
"""Upper bounds of the strengths of all pairs, kept as the maxima of groups of columns."""

from __future__ import annotations

import torch

from ..common.launch import ceil_div
from ..common.products import is_deep, part
from .pairwise_exact import GROUP, Pairs
from .pairwise_group_max import (
    LARGE,
    MAXIMA,
    PACK,
    PADDING,
    SMALL,
    TINY,
    UP,
    _pairwise_maxima_kernel,
    _pairwise_pack_kernel,
    _pairwise_product_kernel,
)

# bytes of packed rows per side, of maxima, of sums of products whose rows are packed in chunks
PACKED, KEPT, SUMS = 64 << 20, 64 << 20, 64 << 20
# columns of a chunk, a multiple of PADDING: C + K / C additions
CHUNK = 4096


class Side:
    """Packed rows of one operand, those of the last request."""

    def __init__(self, x: torch.Tensor, scale: torch.Tensor | None, rows: int, width: int):
        self.x, self.scale = x, scale
        self.packed = torch.empty(rows * width, dtype=torch.float16, device=x.device)
        self.exponents = torch.empty(rows, dtype=torch.int32, device=x.device)
        self.squares = torch.zeros(rows, 2, dtype=torch.float64, device=x.device)
        self.held: tuple[int, int, tuple[int, ...]] | None = None

    def pack(self, begin: int, end: int, chunk: tuple[int, int, int, int]) -> int:
        """Pack a chunk (see `chunks`) of rows; returns its width. Chunks come in order."""
        first, stop, low, size = chunk
        width = -(-(stop - first) * size // PADDING.value) * PADDING.value
        if self.held == (begin, end, chunk):
            return width
        self.held = begin, end, chunk
        n, (segments, positions) = end - begin, (self.x.shape[0] * self.x.shape[1], self.x.shape[1])
        squares = torch.empty(n, 2, dtype=torch.float32, device=self.x.device)
        _pairwise_pack_kernel[(ceil_div(n, PACK["ROWS"]),)](
            self.x[:, :, begin:end], self.packed, self.exponents, squares, n, segments, positions,
            self.x.shape[3], first, stop, low, size, *self.x.stride(), width,
            FIRST=first == low == 0, **PACK,
        )  # fmt: skip
        if first == low == 0:
            self.squares.zero_()
        self.squares[:n] += squares
        return width

    def terms(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[rows, 2]: what a product of packed rows is multiplied by, and at least the row's norm;
        the power of two that both are divided by; at least the largest |x - x^| / |x^|."""
        lost, kept = self.squares[: end - begin].sqrt().unbind(1)
        factor = 2.0 ** self.exponents[: end - begin].double()
        if self.scale is not None:
            factor = factor * self.scale[begin:end].double()
        zero = (kept == 0) & (lost == 0) & factor.isfinite()
        norm = (factor.abs() * (kept * UP + TINY)).masked_fill(zero, 0)
        sound = norm.isfinite() & lost.isfinite()
        share = torch.where(sound & ~zero, UP * (UP * lost + TINY) / kept, 0).amax()
        power = torch.where(sound, norm, 0).amax().frexp().exponent.double()
        # 2^-80 of the largest product of norms is more than anything loses that underflows
        least = torch.where(norm > 0, 2.0**-40, 0.0)
        both = torch.stack([factor * 2.0**-power, torch.maximum(norm * 2.0**-power, least)], 1)
        return both.masked_fill(~sound[:, None], float("nan")).float(), power, share


def chunks(x: torch.Tensor) -> list[tuple[int, int, int, int]]:
    """(first segment, last, first column, columns): whole segments (s, p), or parts of one."""
    segments, d = x.shape[0] * x.shape[1], x.shape[3]
    if d > CHUNK:
        return [
            (s, s + 1, low, min(CHUNK, d - low))
            for s in range(segments)
            for low in range(0, d, CHUNK)
        ]
    step = CHUNK // d
    return [(s, min(segments, s + step), 0, d) for s in range(0, segments, step)]


class Screen:
    """Upper bounds of all pairs, as the maxima of groups."""

    def __init__(self, pairs: Pairs):
        self.pairs, self.chunks = pairs, chunks(pairs.a)
        n, m = pairs.a.shape[2], pairs.b.shape[2]
        width = min(CHUNK, -(-pairs.columns // PADDING.value) * PADDING.value)
        self.groups = ceil_div(m, GROUP)
        least, fitting = LARGE["BLOCK_M"], PACKED // (2 * width)
        rows, cols = min(fitting, KEPT // (4 * self.groups)), fitting
        if len(self.chunks) > 1:
            side = int((SUMS // 4) ** 0.5)
            rows, cols = min(rows, side), min(cols, side)
        # panels of columns begin where a tile does
        self.rows, self.cols = min(n, max(least, rows)), max(least, cols // least * least)
        self.sums = None
        if len(self.chunks) > 1:
            tiles = ceil_div(self.rows, least) * ceil_div(min(m, self.cols), least)
            self.sums = torch.empty(tiles * least**2, dtype=torch.float32, device=pairs.a.device)
        self.left = Side(pairs.a, pairs.row_scale, self.rows, width)
        self.right = Side(pairs.b, pairs.col_scale, min(m, self.cols), width)

    def maxima(self, first: int, last: int) -> torch.Tensor:
        """[rows, groups] keys of rows first..last."""
        p, m = self.pairs, self.pairs.b.shape[2]
        out = torch.empty(last - first, self.groups, dtype=torch.int32, device=p.a.device)
        for begin in range(0, m, self.cols):
            self._panel(first, last, begin, min(m, begin + self.cols), out[:, begin // GROUP :])
        return out

    def _panel(self, first: int, last: int, begin: int, end: int, out: torch.Tensor) -> None:
        p, n, m = self.pairs, last - first, end - begin
        ranks = part(p.row_rank, first, last), part(p.col_rank, begin, end)
        tile = product_tile(p.a.device)
        tiles = ceil_div(n, tile["BLOCK_N"]), ceil_div(m, tile["BLOCK_M"])
        whole = len(self.chunks) == 1
        for number, chunk in enumerate(self.chunks):
            width = self.left.pack(first, last, chunk)
            self.right.pack(begin, end, chunk)
            terms = self._terms(first, last, begin, end) if whole else (None, None, None)
            _pairwise_product_kernel[(tiles[0] * tiles[1],)](
                self.left.packed, self.right.packed, *terms, *ranks, self.sums, out, n, m, width,
                out.stride(0), ABS=p.magnitude, FIRST=number == 0, WHOLE=whole, GROUP=GROUP,
                **tile,
            )  # fmt: skip
        if not whole:
            terms = self._terms(first, last, begin, end)
            _pairwise_maxima_kernel[(ceil_div(n, MAXIMA["ROWS"]), tiles[1])](
                self.sums, *terms, *ranks, out, n, m, out.stride(0), ABS=p.magnitude, GROUP=GROUP,
                **MAXIMA,
            )  # fmt: skip

    def _terms(self, first: int, last: int, begin: int, end: int) -> tuple[torch.Tensor, ...]:
        rows, power, share = self.left.terms(first, last)
        cols, other_power, other_share = self.right.terms(begin, end)
        additions = (min(CHUNK, self.pairs.columns) + len(self.chunks)) * 2.0**-23
        slack = share + other_share + share * other_share + additions
        # 2^-10 for the rounding of bounds
        rows[:, 1] *= slack.float() * (1 + 2.0**-10)
        half = ((power + other_power) / 2).floor()
        return rows, cols, 2.0 ** torch.stack([half, power + other_power - half]).float()


def product_tile(device: torch.device) -> dict[str, int]:
    """The pinned tile of the product."""
    return LARGE if is_deep(device) else SMALL
