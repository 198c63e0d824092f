# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's matrix unit in Triton's interpreter, whose own products add up in fp32 as BLAS does.

An instruction takes 16 columns: their products and what it adds to are summed exactly, and the sum
is truncated to fp32. Hardware keeps a bit or two fewer of the addends, so it is no better.
"""

from __future__ import annotations

from typing import Any

import numpy as np

COLUMNS = 16


def truncated(exact: np.ndarray) -> np.ndarray:
    """fp64 numbers in fp32, towards 0; what is beyond its range is inf."""
    near = exact.astype(np.float32)
    over = np.isfinite(near) & (np.abs(near) > np.abs(exact))
    return np.where(over, np.nextafter(near, np.float32(0)), near)


def install(monkeypatch: Any) -> None:
    """Has `tl.dot` sum as the matrix unit does, until the test ends."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        total, x, y = d.data, a.data.astype(np.float64), b.data.astype(np.float64)
        with np.errstate(all="ignore"):
            for first in range(0, x.shape[1], COLUMNS):
                columns = slice(first, first + COLUMNS)
                total = truncated(x[:, columns] @ y[columns] + total)
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
