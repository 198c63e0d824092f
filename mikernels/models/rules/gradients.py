# SPDX-License-Identifier: Apache-2.0
"""Values that stay, gradients that change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mikernels._dispatch import accumulate_dtype

# receives the squared norms (of the change, of the true gradient), each a tensor of no dimension
Measure = Callable[[torch.Tensor, torch.Tensor], None]


# of a batch: what a module computes of a row does not depend on which row it is
ROWS = 64


def some_rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same rows of each, at most ROWS, from all over: `[n, d]`."""
    rows = [t.detach().reshape(-1, t.shape[-1]) for t in tensors]
    step = max(1, len(rows[0]) // ROWS)
    return [t[::step][:ROWS] for t in rows]


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, factor: Any) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.factor, None


def scaled(x: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """x, whose gradient is multiplied by a number, or by one for each column."""
    return _Scaled.apply(x, factor)


class _Secant(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, y: torch.Tensor, slope: Any, measure: Measure) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, y, ctx.slope, ctx.measure = inputs
        ctx.save_for_backward(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, y = (t.to(accumulate_dtype(t.dtype)) for t in ctx.saved_tensors)
        true = ctx.slope(x)
        ratio = torch.where(x == 0, true, y / x)
        wide = grad.to(x.dtype)
        ctx.measure((wide * (ratio - true)).square().sum(), (wide * true).square().sum())
        return (wide * ratio).to(grad.dtype), None, None, None


def secant(
    x: torch.Tensor,
    y: torch.Tensor,
    slope: Callable[[torch.Tensor], torch.Tensor],
    measure: Measure,
) -> torch.Tensor:
    """y = f(x) elementwise, as `x sg(f(x) / x)`; at 0 by its limit, `slope(0)`.

    Args:
        x, y: of one shape. slope: f', elementwise. measure: told of what changed.
    """
    return _Secant.apply(x, y.detach(), slope, measure)
