# SPDX-License-Identifier: Apache-2.0
"""What the CPU's coarse screen, in 8 bits, has done: results do not show whether it ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mikernels._ops import ops

COARSE_LEVELS = "avxvnni", "avx512"


@contextmanager
def screened() -> Iterator[list[int]]:
    """The pairs screened inside: [in 8 bits first, in 16 though 8 were to be had]."""
    found: list[int] = []
    before = ops.screened_pairs()
    yield found
    found += [now - was for now, was in zip(ops.screened_pairs(), before, strict=True)]
