# SPDX-License-Identifier: Apache-2.0
"""Products of 16-bit operands that are summed in fp32, whatever torch's flags allow."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
            if hasattr(matmul, "allow_fp16_accumulation"):
                self.before["allow_fp16_accumulation"] = matmul.allow_fp16_accumulation
                matmul.allow_fp16_accumulation = False

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for name, value in self.before.items():
                    setattr(torch.backends.cuda.matmul, name, value)


_FULL_SUMS = _FullSums()


@contextmanager
def full_sums() -> Iterator[None]:
    """cuBLAS may neither sum up a 16-bit product in 16 bits, nor parts of it.

    A product has no such setting of its own (`out_dtype` would write scores of 32 bits, twice the
    traffic), and torch's flag is the process's. So threads share one change of it: the first in
    makes it, the last out undoes it, and products of others in between are summed in full.
    """
    _FULL_SUMS.enter()
    try:
        yield
    finally:
        _FULL_SUMS.leave()
