# SPDX-License-Identifier: Apache-2.0
"""The losses of a sparse autoencoder, once for every step that trains one.

With e = y - x the residual of N tokens, S = sum |e|^2 and V = sum |x - mean x|^2:

    mse = S / N,  fvu = S / V            the main loss is one of them: S times `per_square`
    aux = sum |y_aux - r|^2 / sum |r - mean r|^2 times `unexplained`, with r = -e as a constant
    loss = main + aux_coefficient * aux

`unexplained` is the main loss of the mean alone, V / N or 1. The share of the residual's variance
that is left (arXiv 2406.04093) has no unit: beside an mse, which grows with |x|^2, it would vanish
on large activations and drown the loss on small ones. With it one coefficient is the same balance
at every scale and for both losses.

Tokens that are all the same (one token, for instance) have V = 0 and no variance to explain: their
fvu is 0, with a gradient of 0; so is aux where the residual has no variance.
"""

from __future__ import annotations

import torch

LOSSES = ("mse", "fvu")


def reciprocal(x: torch.Tensor) -> torch.Tensor:
    """`1 / x`, and 0 where x is 0; NaN stays. Its gradient is finite as well."""
    # dividing first and masking afterwards would leave 0 * inf = NaN in the gradient
    return (1 / x.masked_fill(x == 0, 1)).masked_fill(x == 0, 0)


def sum_squares(t: torch.Tensor) -> torch.Tensor:
    """`sum t^2` of `[N, d]`, row by row: no temporary of t's size and no long fp32 sum."""
    return torch.linalg.vector_norm(t, dim=-1).square().sum()


def spread(t: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`sum |t - mean t|^2` of `[N, d]`, 0-dim; 0 where it is rounding alone.

    Rows that are equal differ from their computed mean by some eps |mean|, which is no variance.

    Args:
        t: `[N, d]`. out: scratch of its shape.
    """
    mean = t.mean(0)
    total = sum_squares(torch.sub(t, mean, out=out))
    rounding = t.shape[0] * (8 * torch.finfo(t.dtype).eps) ** 2 * mean.detach().square().sum()
    return total.masked_fill(total.detach() <= rounding, 0)


def per_square(loss: str, n_tokens: int, input_spread: torch.Tensor) -> float | torch.Tensor:
    """What the main loss multiplies S by.

    Args:
        loss: "mse" or "fvu".
        n_tokens: N, at least 1.
        input_spread: V, 0-dim.
    """
    return 1 / n_tokens if loss == "mse" else reciprocal(input_spread)


def aux_per_square(
    loss: str, n_tokens: int, input_spread: torch.Tensor, residual_spread: torch.Tensor
) -> torch.Tensor:
    """What the auxiliary loss multiplies `sum |y_aux - r|^2` by.

    Args:
        loss, n_tokens, input_spread: as for `per_square`.
        residual_spread: `sum |r - mean r|^2`, 0-dim.
    """
    inverse = reciprocal(residual_spread)
    return inverse * (input_spread / n_tokens) if loss == "mse" else inverse
