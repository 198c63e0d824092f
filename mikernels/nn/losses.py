# SPDX-License-Identifier: Apache-2.0
"""The losses of a sparse autoencoder, once for every variant and every step that trains one.

With t the target and e = y - t the residual of N tokens (or of weight N), S = sum |e|^2 and
V = sum |t - mean t|^2:

    mse = S / N,  fvu = S / V            the main loss is one of them: S times `per_square`
    aux = sum |y_aux - r|^2 / sum |r - mean r|^2 times `unexplained`, with r = -e as a constant
    loss = main + aux_coefficient * aux

`unexplained` is the main loss of the mean alone, V / N or 1. The share of the residual's variance
that is left (arXiv 2406.04093) has no unit: beside an mse, which grows with |t|^2, it would vanish
on large activations and drown the loss on small ones. With it one coefficient is the same balance
at every scale and for both losses.

Tokens that are all the same (one token, for instance) have V = 0 and no variance to explain: their
fvu is 0, with a gradient of 0; so is aux where the residual has no variance.

Every sum over tokens, and the means in V, count each token by its weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LOSSES = ("mse", "fvu")


@dataclass(frozen=True)
class Measure:
    """What sums of squares over a batch are divided by: N, and V of its target (0-dim)."""

    count: float | torch.Tensor
    variance: torch.Tensor


def reciprocal(x: torch.Tensor) -> torch.Tensor:
    """`1 / x`, and 0 where x is 0; NaN stays. Its gradient is finite as well."""
    # dividing first and masking afterwards would leave 0 * inf = NaN in the gradient
    return (1 / x.masked_fill(x == 0, 1)).masked_fill(x == 0, 0)


def weighted(per_token: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """`sum_n weights[n] per_token[n]`, 0-dim."""
    return (per_token if weights is None else per_token * weights).sum()


def squares(t: torch.Tensor) -> torch.Tensor:
    """`|t[n]|^2` of `[N, d]`: no temporary of t's size."""
    return torch.linalg.vector_norm(t, dim=-1).square()


def spread(
    t: torch.Tensor, weights: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`sum |t - mean t|^2` of `[N, d]`, 0-dim; 0 where it is rounding alone.

    Rows that are equal differ from their computed mean by some eps |mean|, which is no variance.

    Args:
        t: `[N, d]`. weights: `[N]` or None. out: scratch of t's shape.
    """
    count: float | torch.Tensor = float(t.shape[0])
    if weights is None:
        mean = t.mean(0)
    else:
        whole = count = weights.sum()
        mean = (weights * reciprocal(whole)) @ t
    total = weighted(squares(torch.sub(t, mean, out=out)), weights)
    rounding = count * (8 * torch.finfo(t.dtype).eps) ** 2 * mean.detach().square().sum()
    return total.masked_fill(total.detach() <= rounding, 0)


def mse(total: torch.Tensor, measure: Measure) -> torch.Tensor:
    """Mean square of a sum of squares."""
    if isinstance(measure.count, torch.Tensor):
        return total * reciprocal(measure.count)
    return total / max(1.0, measure.count)


def fvu(total: torch.Tensor, measure: Measure) -> torch.Tensor:
    """Fraction of variance unexplained of a sum of squares."""
    return total * reciprocal(measure.variance)


def main(loss: str, total: torch.Tensor, measure: Measure) -> torch.Tensor:
    """The main loss, "mse" or "fvu", of a sum of squares."""
    return mse(total, measure) if loss == "mse" else fvu(total, measure)


def unit(loss: str, measure: Measure) -> float | torch.Tensor:
    """What a penalty per token, in the mse's unit, is multiplied by in the main loss's."""
    if loss == "mse":
        return 1.0
    return measure.count * reciprocal(measure.variance)


def per_square(loss: str, measure: Measure) -> float | torch.Tensor:
    """What the main loss, "mse" or "fvu", multiplies S by."""
    if loss == "fvu":
        return reciprocal(measure.variance)
    return (
        reciprocal(measure.count) if isinstance(measure.count, torch.Tensor) else 1 / measure.count
    )


def aux_per_square(loss: str, measure: Measure, residual_spread: torch.Tensor) -> torch.Tensor:
    """What the auxiliary loss multiplies `sum |y_aux - r|^2` by.

    Args:
        loss, measure: as for `per_square`.
        residual_spread: `sum |r - mean r|^2`, 0-dim.
    """
    inverse = reciprocal(residual_spread)
    return inverse if loss == "fvu" else inverse * mse(measure.variance, measure)
