# SPDX-License-Identifier: Apache-2.0
"""Values that stay, gradients that change."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from mikernels._dispatch import accumulate_dtype

# receives the squared norms (of the change, of the true gradient), each a tensor of no dimension
Measure = Callable[[torch.Tensor, torch.Tensor], None]

SECOND = b"rules: gradients under rules must be differentiated once, got a second derivative"


def beyond(
    got: torch.Tensor, expected: torch.Tensor, limit: torch.Tensor
) -> tuple[float, float] | None:
    """(got, expected) of the number that is furthest beyond its limit; None if none is. A NaN of
    the model is no disagreement."""
    excess = ((got - expected).abs() - limit).nan_to_num(nan=0.0)
    if not excess.numel() or float(excess.amax()) <= 0:
        return None
    at = int(excess.argmax())
    return float(got.reshape(-1)[at]), float(expected.reshape(-1)[at])


def _is_batched(grad: Any) -> bool:
    vmap: Any = torch._C._functorch
    return isinstance(grad, torch.Tensor) and (
        vmap.is_batchedtensor(grad) or vmap.is_legacy_batchedtensor(grad)
    )


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward of `(ctx, saved tensors, *gradients)` whose result cannot be differentiated again.

    torch's own `once_differentiable` takes it for a constant where the incoming gradient is one,
    whatever was saved.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        if any(map(_is_batched, grads)):
            raise RuntimeError(
                "rules: gradients must be computed one at a time, got a batch (vmap, jacrev, "
                "is_grads_batched); call torch.autograd.grad for each"
            )
        # unpacked once: a checkpoint recomputes it
        saved = ctx.saved_tensors
        with torch.no_grad():
            found = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():
            return found
        outputs = found if isinstance(found, tuple) else (found,)
        given = [t for t in (*grads, *saved) if isinstance(t, torch.Tensor) and t.requires_grad]
        refuse = torch._C._functions.DelayedError(SECOND, len(outputs) + len(given))
        refused: Any = refuse(*outputs, *given)
        return refused[: len(outputs)]

    return run


# outputs are detached from inputs, not views of them: autograd lets no one change such a view in
# place, which hooks of others do


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, factor: Any) -> torch.Tensor:
        return x.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    @once
    def backward(ctx: Any, saved: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.factor, None


def scaled(x: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """x, whose gradient is multiplied by a number, or by one for each column."""
    return _Scaled.apply(x, factor)


class _Secant(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, y: torch.Tensor, slope: Any, measure: Measure) -> torch.Tensor:
        return y.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, y, ctx.slope, ctx.measure = inputs
        ctx.save_for_backward(x, y)

    @staticmethod
    @once
    def backward(ctx: Any, saved: Any, grad: torch.Tensor) -> Any:
        x, y = (t.to(accumulate_dtype(t.dtype)) for t in saved)
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
