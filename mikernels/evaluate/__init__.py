# SPDX-License-Identifier: Apache-2.0
"""What a trained SAE does on activations that it has not seen."""

from __future__ import annotations

import math

import torch

from mikernels.nn import SAE


@torch.no_grad()
def variance_unexplained(sae: SAE, x: torch.Tensor, batch_size: int = 4096) -> float:
    """`FVU = sum |y - x|^2 / sum |x - mean x|^2` of the reconstructions y, over all rows at once.

    Args:
        sae: of activations in the unit of x, as a Trainer leaves it and `load_sae` returns it.
        x: `[n, d]` floating, n at least 2; give rows that were not trained on.
        batch_size: rows encoded at a time.

    Raises:
        ValueError: for another shape, rows without variance, or rows or reconstructions that are
            not finite.
    """
    if x.dim() != 2 or x.shape[0] < 2:
        raise ValueError(
            f"variance_unexplained: x must be [n, d] with at least two rows, got {list(x.shape)}"
        )
    mean = x.mean(0, dtype=torch.float64)
    squares = spread = 0.0
    for part in x.split(batch_size):
        y = sae.decode(sae.encode(part))
        squares += float((y.double() - part).square().sum())
        spread += float((part - mean).square().sum())
    if spread == 0:
        raise ValueError("variance_unexplained: rows of x must differ, got equal ones")
    if not (math.isfinite(squares) and math.isfinite(spread)):
        what = "x" if not math.isfinite(spread) else "the reconstructions of sae"
        raise ValueError(
            f"variance_unexplained: {what} must be finite, got NaN or inf; drop the rows that are "
            f"not, or load other weights"
        )
    return squares / spread
