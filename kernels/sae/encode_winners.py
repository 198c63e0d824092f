# SPDX-License-Identifier: Apache-2.0
"""What both ways through panels of features share: the winners so far, scratch, full sums."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from ..select.row_topk import select_into

T = TypeVar("T")

SCRATCH = 256 << 20
LEAST_SCRATCH = 4 << 20
# a panel is wide enough for cuBLAS to run at its rate and for row_topk to read more than it selects
MOST_FEATURES, MOST_TOKENS = 32768, 4096
# panels whose winners wait before they are merged
WAITING = 3


def reachable(t: torch.Tensor) -> torch.Tensor:
    """`t`, or a copy where rows are 2^31 elements apart, which cuBLAS refuses."""
    return t if max(t.stride(), default=0) < 2**31 else t.contiguous()


class Winners:
    """The c highest scores of every token, panel after panel; ties to the lower feature.

    Attributes:
        scores, features: `[n, >= c]`, the winners first and ascending by feature.
    """

    def __init__(self, n: int, c: int, dtype: torch.dtype, device: torch.device):
        def empty(columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(n, columns, dtype=dtype, device=device)

        self.c, self.n, self.filled = c, n, 0
        self.scores = empty((WAITING + 1) * c, dtype)
        self.features = empty((WAITING + 1) * c, torch.int32)
        self._merged = empty(c, dtype)
        self._places = empty(c, torch.int64)

    @staticmethod
    def token_bytes(c: int) -> int:
        return (WAITING + 1) * c * 6 + c * 10

    def begin(self, n: int) -> None:
        self.n, self.filled = n, 0

    def add(self, panel: Iterator[tuple[int, torch.Tensor]], first: int, width: int) -> None:
        """Take the scores [rows, width] of features first.. , given in chunks (row, scores)."""
        taken = min(self.c, width)
        if self.filled + taken > self.scores.shape[1]:
            self._merge()
        columns = slice(self.filled, self.filled + taken)
        for row, scores in panel:
            rows = slice(row, row + len(scores))
            out = self.scores[rows, columns], self.features[rows, columns]
            select_into(scores, taken, *out, base=first)
        self.filled += taken

    def close(self) -> int:
        """Merge what waits; returns the number of winners, c or all features."""
        if self.filled > self.c:
            self._merge()
        return self.filled

    def _merge(self) -> None:
        n, c = self.n, self.c
        merged, places = self._merged[:n], self._places[:n]
        select_into(self.scores[:n, : self.filled], c, merged, places)
        self.scores[:n, :c] = merged
        self.features[:n, :c] = self.features[:n].gather(1, places)
        self.filled = c


def within_memory(device: torch.device, make: Callable[[int], T]) -> T:
    """make(bytes of scratch), with SCRATCH or, where the device has no room, less and less."""
    scratch = SCRATCH
    while True:
        try:
            return make(scratch)
        except torch.OutOfMemoryError as error:
            if scratch <= LEAST_SCRATCH:
                raise RuntimeError(
                    f"topk_encode: expected {scratch >> 20} MB of free memory on {device} for "
                    f"scratch, got an allocation failure; free memory there"
                ) from error
            scratch //= 4


class _FullSums:
    """How many are within `full_sums`, and what the flags were before the first one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before: dict[str, Any] = {}

    def enter(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside > 1:
                return
            matmul = torch.backends.cuda.matmul
            for dtype in ("bf16", "fp16"):
                name = f"allow_{dtype}_reduced_precision_reduction"
                # newer torch has a second half, whether products may be split at all
                split = getattr(matmul, f"{name}_split_k", None)
                now = getattr(matmul, name)
                self.before[name] = now if split is None else (now, split)
                setattr(matmul, name, False if split is None else (False, split))

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for name, value in self.before.items():
                    setattr(torch.backends.cuda.matmul, name, value)


_FULL_SUMS = _FullSums()


@contextmanager
def full_sums() -> Iterator[None]:
    """cuBLAS may not add up parts of a 16-bit product in 16 bits.

    A product has no such setting of its own (`out_dtype` would write scores of 32 bits, twice the
    traffic), and torch's flag is the process's. So threads share one change of it: the first in
    makes it, the last out undoes it, and products of others in between are summed in full.
    """
    _FULL_SUMS.enter()
    try:
        yield
    finally:
        _FULL_SUMS.leave()
