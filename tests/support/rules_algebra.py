# SPDX-License-Identifier: Apache-2.0
"""Backward rules as detach algebra: values as in the model, gradients as the rule has them.

Every rule that is not a constant factor is one `swapped`: the value of what the model computes with
the gradient of something else, exact in value because `other - other.detach()` is 0 in any dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Tensor = torch.Tensor


class Rules(NamedTuple):
    """What the oracle reads of any object of rules; None is as differentiated."""

    norm: str | None = None  # "gradient", "frozen"
    softmax: Any = None  # "gradient", "frozen", a temperature
    query: float | None = None
    key: float | None = None
    value: float | None = None
    gate: float | None = None
    up: float | None = None
    activation: str | None = None  # "gradient", "secant"


def swapped(value: Tensor, other: Tensor) -> Tensor:
    """The value of one with the gradient of the other."""
    return value.detach() + (other - other.detach())


def scaled(x: Tensor, factor: float | None) -> Tensor:
    return x if factor is None else swapped(x, factor * x)


def normed(x: Tensor, eps: float, *, centred: bool, rule: str | None) -> Tensor:
    """LayerNorm or RMS norm without its gain. Frozen: a mean is still differentiated."""
    x = x - x.mean(-1, keepdim=True) if centred else x
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * {None: scale, "gradient": scale, "frozen": scale.detach()}[rule]


def pattern(scores: Tensor, rule: Any) -> Tensor:
    """softmax(S). At temperature t its gradient is that of t softmax(S / t), so without 1 / t."""
    found = scores.softmax(-1)
    if rule in (None, "gradient", "frozen"):
        return found.detach() if rule == "frozen" else found
    return swapped(found, rule * (scores / rule).softmax(-1))


def activated(x: Tensor, f: Callable[[Tensor], Tensor], rule: str | None) -> Tensor:
    """f(x). Secant: f(x) / x is a constant, at 0 its limit f'(0)."""
    if rule != "secant":
        assert rule in (None, "gradient")
        return f(x)
    with torch.enable_grad():
        zero = torch.zeros((), dtype=x.dtype, requires_grad=True)
        (slope,) = torch.autograd.grad(f(zero), zero)
    value = f(x)
    secant = torch.where(x == 0, slope, value / x).detach()
    return swapped(value, x * secant)


def gated(gate: Tensor, up: Tensor, f: Callable[[Tensor], Tensor], rules: Any) -> Tensor:
    """f(gate) up, each of the two factors with its own factor on the gradient."""
    return scaled(activated(gate, f, rules.activation), rules.gate) * scaled(up, rules.up)
