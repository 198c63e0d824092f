# SPDX-License-Identifier: Apache-2.0
"""Norms whose scale is a constant of the backward pass.

`y = gain (x - mean) / scale + bias` with `scale = sqrt(mean((x - mean)^2) + eps)` becomes

    dx = u - mean(u),    u = gain dy / scale            (RMS norm: no means)

The true gradient is `dx - c` with `c = xc mean(dx xc) / scale^2`, xc = x - mean: what the rule
changes is known for one more product of rows.

Which of these a module computes is not read off its class: the first batch decides between the two
norms and gains `w`, `1 + w` (Gemma) and none, and refuses the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from mikernels._dispatch import accumulate_dtype
from mikernels.models.rules.gradients import Measure, some_rows
from mikernels.models.rules.scope import Scope

EPS = ("variance_epsilon", "eps", "epsilon", "layer_norm_eps", "norm_eps")


def may_be_norm(module: torch.nn.Module) -> bool:
    """A module without parts that is called a norm, or has nothing but vectors; what it computes is
    seen when it runs."""
    if next(module.children(), None) is not None:
        return False
    dims = {p.dim() for p in module.parameters()}
    return dims == {1} or "norm" in type(module).__name__.lower()


class Form(NamedTuple):
    """What a norm computes.

    Attributes:
        centred: LayerNorm. added: to the weight, for the gain. eps: inside the root.
    """

    centred: bool
    added: float
    eps: float


def _statistics(x: torch.Tensor, form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    """x or x - mean, and 1 / scale, `[..., 1]`."""
    wide = x.to(accumulate_dtype(x.dtype))
    if form.centred:
        wide = wide - wide.mean(-1, keepdim=True)
    return wide, (wide.square().mean(-1, keepdim=True) + form.eps).rsqrt_()


def _form(module: torch.nn.Module, name: str, x: torch.Tensor, y: torch.Tensor) -> Form | None:
    """The form whose value is y, within rounding; None for `gain x`, which scales by nothing.

    Raises:
        ValueError: y is neither.
    """
    weight, bias = (getattr(module, part, None) for part in ("weight", "bias"))
    found = (getattr(module, part, None) for part in EPS)
    eps = next((float(e) for e in found if isinstance(e, float | int)), None)
    if eps is None:
        # torch.nn.RMSNorm(eps=None) takes that of the dtype; others may have it in their code
        eps = torch.finfo(x.dtype).eps if isinstance(module, torch.nn.RMSNorm) else 1e-5
    # transformers' norms compute in fp32 also where all else is in fp64
    unit = 8 * max(torch.finfo(y.dtype).eps, torch.finfo(torch.float32).eps)
    best, distance, excess = None, float("inf"), 0.0
    for centred in (False, True):
        form = Form(centred, 0.0, eps)
        wide, inverse = _statistics(x, form)
        normed = wide * inverse
        # the mean of x is rounded where x is, at the size of x
        size = normed.abs() + (x.abs().amax(-1, keepdim=True).to(wide.dtype) * inverse)
        for added in (0.0, 1.0) if weight is not None else (0.0,):
            gain = wide.new_ones(()) if weight is None else weight.detach().to(wide.dtype) + added
            expected = normed * gain
            limit = size * gain.abs()
            if bias is not None:
                expected = expected + bias.detach().to(wide.dtype)
                limit = limit + bias.detach().abs()
            off = (expected - y).abs()
            # in 16 bits several may be near enough: the nearest
            if (total := float(off.nan_to_num(nan=0.0).sum())) < distance:
                least = torch.finfo(y.dtype).smallest_normal
                over = (off - unit * limit - least).nan_to_num(nan=0.0)
                best, distance = form._replace(added=added), total
                excess = float(over.amax()) if over.numel() else 0.0
    if best is not None and excess <= 0:
        return best
    if weight is not None and x.shape == y.shape and torch.equal(y, x * weight.detach()):
        return None
    raise ValueError(
        f"rules: norm must be gain (x - mean) / scale + bias or gain x / rms + bias, got {name} "
        f"({type(module).__name__}), which is {excess:.3g} further away from both than "
        f"rounding, with eps = {eps:g}; leave the rule out"
    )


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        y: torch.Tensor,
        form: Form,
        measure: Measure,
    ) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, _, ctx.form, ctx.measure = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        centred, inverse = _statistics(x, ctx.form)
        wide = grad.to(centred.dtype)
        dx = wide * inverse
        if weight is not None:
            gain = weight.to(dx.dtype)
            dx.mul_(gain + ctx.form.added if ctx.form.added else gain)
        if ctx.form.centred:
            dx.sub_(dx.mean(-1, keepdim=True))
        d = x.shape[-1]
        along = torch.linalg.vecdot(dx, centred)[..., None]
        length = d * (inverse.pow(-2) - ctx.form.eps)
        share = along * inverse.square() / d
        change = share.square() * length
        plain = torch.linalg.vecdot(dx, dx)[..., None] - 2 * share * along + change
        ctx.measure(change.sum(), plain.sum())
        d_weight = d_bias = None
        if weight is not None and ctx.needs_input_grad[1]:
            d_weight = (wide * centred * inverse).sum_to_size(weight.shape).to(weight.dtype)
        if bias is not None and ctx.needs_input_grad[2]:
            d_bias = wide.sum_to_size(bias.shape).to(bias.dtype)
        return dx.to(grad.dtype), d_weight, d_bias, None, None, None


class NormPlace:
    """A norm module."""

    rules: tuple[str, ...] = ("norm",)

    def __init__(self, module: torch.nn.Module, name: str, layer: int | None):
        self.key, self.name, self.layer = module, name, layer

    def install(self, scope: Scope) -> Iterable[Callable[[], None]]:
        form: Form | None = None
        known = False

        def freeze(module: torch.nn.Module, args: Any, output: Any) -> torch.Tensor | None:
            nonlocal form, known
            x = args[0] if args else None
            said = scope.value(self, "norm")
            if said is None or not isinstance(x, torch.Tensor):
                return None
            if not isinstance(output, torch.Tensor) or not output.requires_grad:
                return None
            scope.report.ran("norm", self.name)
            scope.report.acted("norm", self.name)
            if said == "gradient":
                return None
            y = output.detach()
            if not known:
                form, known = _form(module, self.name, *some_rows(x, y)), True
            if form is None:
                return None
            weight, bias = (getattr(module, part, None) for part in ("weight", "bias"))

            def measure(change: torch.Tensor, plain: torch.Tensor) -> None:
                scope.report.changed("norm", change, plain)

            return _Frozen.apply(x, weight, bias, y, form, measure)

        yield self.key.register_forward_hook(freeze).remove
