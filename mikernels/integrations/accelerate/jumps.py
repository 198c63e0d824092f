# SPDX-License-Identifier: Apache-2.0
"""Counterparts of the libraries' JumpReLU and step functions, for pre-activations that are left.

SAELens and dictionary_learning write them as torch.autograd.Function, which is asked for a dense
tensor. A stand-in has `apply` alone; anything but a lazy tensor is the library's own function's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mikernels.integrations.lazy import Lazy
from mikernels.integrations.lazy.codes import Codes
from mikernels.integrations.lazy.product import Product, wide
from mikernels.integrations.lazy.tensor import Unknown, lazy
from mikernels.ops.sae.jump import gather_features, jump, jump_floor, step_above
from mikernels.values.codes import SparseCodes


def _left(h: Any, kind: type) -> Any:
    """The node of a lazy tensor of this kind that nobody has looked at."""
    node = h._node if isinstance(h, Lazy) and h._current() else None
    return node if isinstance(node, kind) else None


class _StandIn:
    def __init__(self, function: Any):
        self._function = function

    def apply(self, h: Any, threshold: Any, bandwidth: float, *ste_to_input: bool) -> Any:
        # the products of what follows are no library's
        with torch._C.DisableTorchFunction():
            found = self._of(h, threshold, bandwidth, any(ste_to_input))
            if found is not None:
                return lazy(found)
        if isinstance(h, Lazy):
            h = h._look(type(self).__name__)
        return self._function.apply(h, threshold, bandwidth, *ste_to_input)

    def _of(self, h: Any, threshold: Any, bandwidth: float, ste_to_input: bool) -> Codes | None:
        raise NotImplementedError


class JumpReLU(_StandIn):
    """`h where h > threshold, else 0` with the straight-through gradient of its library."""

    def _of(self, h: Any, threshold: Any, bandwidth: float, ste_to_input: bool) -> Codes | None:
        found = _slots(h, threshold, bandwidth)
        if found is None:
            return None
        node, slots = found
        values = jump(
            slots.values,
            gather_features(threshold, slots.indices),
            bandwidth=bandwidth,
            input_gradient="both" if ste_to_input else "gated",
        )
        return node.ragged(values.to(node.dtype), slots)


class Step(_StandIn):
    """`1 where h > threshold, else 0`, of pre-activations (SAELens) or codes (dictionary_learning).

    Of codes a pair without a slot is 0, which is inside the gradient's window where the threshold
    is small: its part, of value 0, goes into the codes' `rest`.
    """

    def _of(self, h: Any, threshold: Any, bandwidth: float, ste_to_input: bool) -> Codes | None:
        codes = _left(h, Codes)
        if codes is not None and codes.rest is None and not codes.flat and not ste_to_input:
            at = gather_features(threshold, codes.indices)
            values = step_above(codes.values, at, bandwidth=bandwidth)
            rest = step_above(torch.zeros_like(threshold), threshold, bandwidth=bandwidth)
            return replace(codes, values=values, rest=rest)
        found = _slots(h, threshold, bandwidth)
        if found is None:
            return None
        node, slots = found
        values = step_above(
            slots.values,
            gather_features(threshold, slots.indices),
            bandwidth=bandwidth,
            to_input=ste_to_input,
        )
        return node.ragged(values.to(node.dtype), slots)


def _slots(h: Any, threshold: torch.Tensor, bandwidth: float) -> tuple[Product, SparseCodes] | None:
    """Pre-activations that are above their thresholds, or within their gradient's reach."""
    node = _left(h, Product)
    if node is None or node.scale is not None or node.relu or node.flat:
        return None
    if threshold.shape != (node.f,) or bool((threshold.detach() < 0).any()):
        return None
    theta = threshold.detach().to(wide(node.x.dtype))
    floor = jump_floor(theta, bandwidth=bandwidth, inclusive=False, input_gradient="gated")
    try:
        return node, node.above(floor)
    except Unknown:
        # too many are active
        return None
