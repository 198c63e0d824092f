# SPDX-License-Identifier: Apache-2.0
"""Norms whose scale is a constant of the backward pass.

`y = gain (x - mean) / scale + bias` with `scale = sqrt(mean((x - mean)^2) + eps)` becomes

    dx = u - mean(u),    u = gain dy / scale            (RMS norm: no means)

The true gradient is `dx - c` with `c = xc mean(dx xc) / scale^2`, xc = x - mean: what the rule
changes is known for one more product of rows.

Which of these a module computes is not read off its class: the first batch decides between the two
norms and gains `w`, `1 + w` (Gemma) and none, and refuses the rest. Where it leaves several (of
zeros, of NaN, of a residual stream without a mean), rows that tell them apart decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, NamedTuple

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.models.hooks import returned
from mikernels.models.parts import first_tensor
from mikernels.models.rules.gradients import Measure, once, some_rows
from mikernels.models.rules.scope import Scope, Uncopied

EPS = ("variance_epsilon", "eps", "epsilon", "layer_norm_eps", "norm_eps")


def may_be_norm(module: torch.nn.Module) -> bool:
    """A module without parts that is called a norm, or has nothing but vectors; what it computes is
    seen when it runs."""
    # what torch.nn.utils.parametrize makes weights of is no part
    if any(name != "parametrizations" for name, _ in module.named_children()):
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


class _Fit(NamedTuple):
    """How far an output is from that of a form, in all, and at most beyond rounding."""

    distance: float
    excess: float
    form: Form


def _eps(module: torch.nn.Module, dtype: torch.dtype) -> tuple[float, ...]:
    """What it may be."""
    found = (getattr(module, part, None) for part in EPS)
    eps = next((float(e) for e in found if isinstance(e, float | int)), None)
    if eps is not None:
        return (eps,)
    if not isinstance(module, torch.nn.RMSNorm):
        return (1e-5,)  # in its code
    # torch.nn.RMSNorm(eps=None): that of the dtype, or of what it accumulates in
    return tuple(torch.finfo(kind).eps for kind in dict.fromkeys((dtype, accumulate_dtype(dtype))))


def _fits(module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[_Fit]:
    """Every form, the nearest first."""
    weight, bias = (getattr(module, part, None) for part in ("weight", "bias"))
    # transformers' norms compute in fp32 also where all else is in fp64
    unit = 8 * max(torch.finfo(y.dtype).eps, torch.finfo(torch.float32).eps)
    found = []
    for centred, eps in product((False, True), _eps(module, x.dtype)):
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
            over = (off - unit * limit - torch.finfo(y.dtype).smallest_normal).nan_to_num(nan=0.0)
            excess = float(over.amax()) if over.numel() else 0.0
            total = float(off.nan_to_num(nan=0.0).sum())
            found.append(_Fit(total, excess, form._replace(added=added)))
    # stable, so of equals the first
    return sorted(found, key=lambda fit: fit.distance)


@torch.no_grad()
def _form(module: torch.nn.Module, name: str, x: torch.Tensor, y: torch.Tensor) -> Form | None:
    """The form whose value is y, within rounding; None for `gain x` and x, which are not scaled.

    Raises:
        ValueError: y is neither, or is made of other parameters.
    """
    parts = {part: getattr(module, part, None) for part in ("weight", "bias")}
    weight = parts["weight"]

    def refusal(reason: str) -> ValueError:
        return ValueError(
            f"rules: norm must be gain (x - mean) / scale + bias or gain x / rms + bias, got "
            f"{name} ({type(module).__name__}), {reason}; leave the rule out"
        )

    if others := [part for part, _ in module.named_parameters(recurse=False) if part not in parts]:
        raise refusal(f"with a parameter {others[0]}")
    # gains of several heads: whole rows of them
    inner = 1 if weight is None else weight.dim()
    row = list(x.shape[-inner:]) if weight is None else list(weight.shape)
    if x.shape != y.shape or list(x.shape[-inner:]) != row:
        raise refusal(f"which makes {list(y.shape)} of {list(x.shape)} with {row} gains")
    x, y = some_rows(x, y, dims=inner)
    fits = _fits(module, x, y)
    left = [fit for fit in fits if fit.excess <= 0]
    if len(left) > 1:
        # rows with a mean, none alike and none 0, some of the size of a large eps; of no random
        # numbers: those are the user's
        at = torch.arange(4 * x.shape[1:].numel(), device=x.device, dtype=torch.float64)
        probe = (2 + (at * at).cos()).reshape(4, *x.shape[1:])
        probe[::2] /= 32
        probe = probe.to(x.dtype)
        # without hooks
        told = {fit.form: fit.distance for fit in _fits(module, probe, module.forward(probe))}
        left.sort(key=lambda fit: told[fit.form])
    if left:
        return left[0].form
    if torch.equal(y, x if weight is None else x * weight):
        return None
    nearest = fits[0]
    raise refusal(
        f"which is {nearest.excess:.3g} further away from both than rounding, with eps = "
        f"{nearest.form.eps:g}"
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
        return y.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, _, ctx.form, ctx.measure = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    @once
    def backward(ctx: Any, saved: Any, grad: torch.Tensor) -> Any:
        x, weight, bias = saved
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
                form, known = _form(module, self.name, x.detach(), y), True
            if form is None:
                return None

            def measure(change: torch.Tensor, plain: torch.Tensor) -> None:
                scope.report.changed("norm", change, plain)

            return _Frozen.apply(x, weight, bias, y, form, measure)

        # before what others do to the output
        yield Uncopied.hook(self.key.register_forward_hook, freeze, with_kwargs=True, prepend=True)
