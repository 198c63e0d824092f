# SPDX-License-Identifier: Apache-2.0
"""Norms whose scale is a constant of the backward pass.

`y = gain (x - mean) / scale + bias` with `scale = sqrt(mean((x - mean)^2) + eps)` becomes

    dx = u - mean(u),    u = gain dy / scale            (RMS norm: no means)

The true gradient is `dx - c` with `c = xc mean(dx xc) / scale^2`, xc = x - mean: what the rule
changes is known for one more product of rows.

Which of these a module computes, the first batch tells (`mikernels.models.norms`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from mikernels.models.hooks import returned
from mikernels.models.norms import Form, form_of, statistics
from mikernels.models.parts import first_tensor
from mikernels.models.rules.gradients import Measure, once
from mikernels.models.rules.scope import Scope, Uncopied


def may_be_norm(module: torch.nn.Module) -> bool:
    """A module without parts that is called a norm, or has nothing but vectors; what it computes is
    seen when it runs."""
    # what torch.nn.utils.parametrize makes weights of is no part
    if any(name != "parametrizations" for name, _ in module.named_children()):
        return False
    dims = {p.dim() for p in module.parameters()}
    return dims == {1} or "norm" in type(module).__name__.lower()


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
        return y.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, _, ctx.form, ctx.measure = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    @once
    def backward(ctx: Any, saved: Any, grad: torch.Tensor) -> Any:
        x, weight, bias = saved
        centred, inverse = statistics(x, ctx.form)
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

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(
            f"rules: norm must be gain (x - mean) / scale + bias or gain x / rms + bias, got "
            f"{self.name} ({type(self.key).__name__}), {reason}; leave the rule out"
        )

    def install(self, scope: Scope) -> Iterable[Callable[[], None]]:
        form: Form | None = None
        known = False

        def freeze(
            module: torch.nn.Module, args: Any, kwargs: Any, output: Any
        ) -> torch.Tensor | None:
            nonlocal form, known
            x, y = first_tensor(args, kwargs), returned(output)
            said = scope.value(self, "norm")
            if said is None or not isinstance(y, torch.Tensor) or not y.requires_grad:
                return None
            scope.report.ran("norm", self.name)
            # one that returns several adds to the residual stream as well
            if not isinstance(x, torch.Tensor) or y is not output:
                return None
            scope.report.acted("norm", self.name)
            if said == "gradient":
                return None
            y = output.detach()
            weight, bias = (getattr(module, part, None) for part in ("weight", "bias"))
            if weight is not None and weight.is_meta:
                raise ValueError(
                    f"rules: norm must have its weight in memory, got {self.name} whose weight is "
                    f"elsewhere between calls (offloaded); leave the rule out, or keep it there"
                )
            if not known:
                form, known = form_of(module, x.detach(), y, self._refusal), True
            if form is None:
                return None

            def measure(change: torch.Tensor, plain: torch.Tensor) -> None:
                scope.report.changed("norm", change, plain)

            return _Frozen.apply(x, weight, bias, y, form, measure)

        # before what others do to the output
        yield Uncopied.hook(self.key.register_forward_hook, freeze, with_kwargs=True, prepend=True)
