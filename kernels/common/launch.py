# SPDX-License-Identifier: Apache-2.0
"""How kernels are launched: what every one is compiled with, and grids in plain integers.

`triton.cdiv` and `triton.next_power_of_2` are device functions: called in Python, each wraps its
arguments as constants of a kernel and takes 2 us, half of what a launch takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import triton

# a * b + c is one rounding: what the kernels' speed and the offline figures rest on. Triton's own
# default turns from on to off in 3.10.
PINNED = {"enable_fp_fusion": True}


class Kernel:
    """A function that Triton compiles for the device, launched by `kernel[grid](*arguments)`.

    Attributes:
        jit: Triton's own; launched by itself it would be compiled with Triton's defaults.
    """

    def __init__(self, jit: Any):
        self.jit = jit

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return functools.partial(self.jit[grid], **PINNED)


def kernel(*, do_not_specialize: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Kernel]:
    """Makes a Kernel; arguments of these names compile nothing anew when they are 1 or 16 n."""

    def made(function: Callable[..., Any]) -> Kernel:
        return Kernel(triton.jit(function, do_not_specialize=list(do_not_specialize)))

    return made


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size` and 1."""
    return 1 << max(size - 1, 0).bit_length()
