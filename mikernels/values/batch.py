# SPDX-License-Identifier: Apache-2.0
"""Batch: what one micro-batch of training is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokens to encode, what their reconstruction is compared with, and how much each counts.

    Attributes:
        input: `[n, d]` floating.
        target: `[n, d]`, or None: the input itself. A transcoder's is the output of an MLP.
        weights: `[n]` at least 0, how often a token counts; None is once each.
    """

    input: torch.Tensor
    target: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.input.shape[0]

    @property
    def output(self) -> torch.Tensor:
        """The target, or the input."""
        return self.input if self.target is None else self.target

    @property
    def count(self) -> float | torch.Tensor:
        """The sum of the weights: a number, or 0-dim on the batch's device."""
        return float(len(self)) if self.weights is None else self.weights.sum()

    def tensors(self) -> list[torch.Tensor]:
        """Those that it has, in the order of the attributes."""
        return [t for t in (self.input, self.target, self.weights) if t is not None]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Each of its tensors changed."""
        parts = (self.input, self.target, self.weights)
        return Batch(*(None if t is None else change(t) for t in parts))  # type: ignore[arg-type]

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """Detached, on the device, in the dtype."""
        return self.map(lambda t: t.detach().to(device=device, dtype=dtype))

    def scaled(self, scale: float) -> Batch:
        """Input and target in another unit."""
        target = None if self.target is None else self.target * scale
        return replace(self, input=self.input * scale, target=target)


def as_batch(value: torch.Tensor | Batch) -> Batch:
    """What a source gave, as a Batch."""
    return value if isinstance(value, Batch) else Batch(value)
