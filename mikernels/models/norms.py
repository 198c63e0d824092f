# SPDX-License-Identifier: Apache-2.0
"""What a norm computes: `y = gain (x - mean) / scale + bias`, or `gain x / rms + bias`.

Which of these a module computes is not read off its class: a batch decides between the two norms
and gains `w`, `1 + w` (Gemma) and none, and refuses the rest. Where it leaves several (of zeros, of
NaN, of a residual stream without a mean), rows that tell them apart decide.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.models.claims import some_rows

# as they are called in torch and transformers, and in TransformerLens
WEIGHT, BIAS = ("weight", "w"), ("bias", "b")
EPS = ("variance_epsilon", "eps", "epsilon", "layer_norm_eps", "norm_eps")


class Form(NamedTuple):
    """What a norm computes.

    Attributes:
        centred: LayerNorm. added: to the weight, for the gain. eps: inside the root.
    """

    centred: bool
    added: float
    eps: float


def parameters(module: torch.nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Its weight and bias, None without."""
    found = (
        next((x for name in names if (x := getattr(module, name, None)) is not None), None)
        for names in (WEIGHT, BIAS)
    )
    weight, bias = found
    return weight, bias


def statistics(x: torch.Tensor, form: Form) -> tuple[torch.Tensor, torch.Tensor]:
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
    weight, bias = parameters(module)
    # transformers' norms compute in fp32 also where all else is in fp64
    unit = 8 * max(torch.finfo(y.dtype).eps, torch.finfo(torch.float32).eps)
    found = []
    for centred, eps in product((False, True), _eps(module, x.dtype)):
        form = Form(centred, 0.0, eps)
        wide, inverse = statistics(x, form)
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
def form_of(
    module: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    refusal: Callable[[str], Exception],
) -> Form | None:
    """The form whose value is y, within rounding; None for `gain x` and x, which are not scaled.

    Args:
        refusal: makes the error of a reason.

    Raises:
        What refusal makes: y is neither, or is made of other parameters.
    """
    weight, _ = parameters(module)
    if others := [
        part for part, _ in module.named_parameters(recurse=False) if part not in WEIGHT + BIAS
    ]:
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
