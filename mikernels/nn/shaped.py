# SPDX-License-Identifier: Apache-2.0
"""What a variant makes of its slots, differentiated by autograd on the slots alone."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from mikernels._dispatch import accumulate_dtype
from mikernels.nn.entries import Entries
from mikernels.values.codes import SparseCodes


class Shaping(Protocol):
    """An SAE whose slots hold pre-activations; see mikernels/nn/sae.py."""

    w_enc: nn.Parameter
    w_dec: nn.Parameter
    b_dec: nn.Parameter

    def named_parameters(self): ...

    def decoders(self) -> list[nn.Parameter]: ...

    def norms(self) -> torch.Tensor | None: ...

    def activate(self, h: torch.Tensor, entries: Entries) -> torch.Tensor: ...

    def shared_penalty(
        self, h: torch.Tensor, values: torch.Tensor, entries: Entries, norms: torch.Tensor | None
    ) -> torch.Tensor: ...


class Shaped:
    """Activations and penalty of slots, recorded on the slots alone."""

    def __init__(self, sae: Shaping, slots: SparseCodes, weights: torch.Tensor | None):
        acc = accumulate_dtype(slots.values.dtype)
        # matrices get their gradients from the slots
        held = {id(sae.w_enc), id(sae.b_dec), *map(id, sae.decoders())}
        self._others = {
            name: p for name, p in sae.named_parameters() if id(p) not in held and p.requires_grad
        }
        norms = sae.norms()
        with torch.enable_grad():
            self._h = slots.values.detach().to(acc).requires_grad_()
            self._norms = None if norms is None else norms.detach().requires_grad_()
            entries = Entries(slots, weights)
            self._values = sae.activate(self._h, entries)
            self.penalty = sae.shared_penalty(self._h, self._values, entries, self._norms)
        self.codes = slots.with_values(self._values.detach().to(sae.w_dec.dtype))

    def backward(
        self, d_values: torch.Tensor, d_penalty: float | torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]:
        """Gradients at the slots' pre-activations, of parameters by name, and `Terms.shrink`.

        Args:
            d_values: at the activations. d_penalty: at the penalty.
        """
        # inactive slots are no part of the reconstruction, but carry what an estimator says
        inputs = [self._h, *self._others.values()]
        inputs += [] if self._norms is None else [self._norms]
        outputs, gradients = [self._values], [d_values]
        if self.penalty.requires_grad:
            outputs.append(self.penalty)
            gradients.append(torch.as_tensor(d_penalty).to(self.penalty).reshape(()))
        found = torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
        dh = torch.zeros_like(self._h) if found[0] is None else found[0]
        others = {
            name: g for name, g in zip(self._others, found[1:], strict=False) if g is not None
        }
        shrink = None
        if self._norms is not None and found[-1] is not None:
            shrink = found[-1] / self._norms.detach().clamp_min(torch.finfo(dh.dtype).tiny)
        return dh, others, shrink
