# SPDX-License-Identifier: Apache-2.0
"""Equalities that a decomposition claims, checked on the batch at hand, number by number.

Each is computed where the tensors are and read back once, after the forward pass. The limits are
what rounding can do, u = eps / 2 being the unit of a dtype:

- a sum of three terms, rounded twice by the model and twice here: each rounding is at most u times
  the sum of the absolute values S, so `2 eps S`, and half as much again for the rounding of S;
- a product `z W + b` over n terms: eps of the result, and twice for each (model, here) the
  roundings of its partial sums. These are at most `|z| |w| + |b|` each (Cauchy-Schwarz), so n
  roundings of mean zero add up to a deviation of `u sqrt(n / 3) (|z| |w| + |b|)` (Higham and Mary,
  "A New Approach to Probabilistic Rounding Error Analysis", SISC 2019); 8 deviations leave 1e-15 a
  number. Where factors are rounded before they are multiplied (TF32, autocast), `eps |z| |w|` for
  each.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from mikernels._dispatch import accumulate_dtype

# eps of the factors of a float32 product under torch.set_float32_matmul_precision
FACTORS = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}

# of a batch: what a module computes of a row does not depend on which row it is
ROWS = 64


def some_rows(*tensors: torch.Tensor, dims: int = 1) -> list[torch.Tensor]:
    """The same rows of each, at most ROWS, from all over: `[n, d]`; of more dimensions each."""
    rows = [t.detach().reshape(t.shape[:-dims].numel(), *t.shape[-dims:]) for t in tensors]
    step = max(1, len(rows[0]) // ROWS)
    return [t[::step][:ROWS] for t in rows]


def _eps(*tensors: torch.Tensor) -> float:
    return max(torch.finfo(t.dtype).eps for t in tensors)


def sum_limit(terms: list[torch.Tensor], result: torch.Tensor) -> torch.Tensor:
    """How far from `sum(terms)` the model's own sum may be."""
    size = terms[0].abs().to(accumulate_dtype(result.dtype))
    for term in terms[1:]:
        size.add_(term.abs())
    return size.mul_(3 * _eps(*terms, result))


def product_limit(
    z: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    result: torch.Tensor,
    rounded: bool = False,
) -> torch.Tensor:
    """How far from `z w + bias` the model's own product may be, for z `[..., n]` and w `[n, d]`.

    Args:
        rounded: whether each product, and each head's sum of them, is rounded to the result's dtype
            before it is added: half eps of `sum_i |z_i w_i| <= |z| |w|` each.
    """
    acc = accumulate_dtype(w.dtype)
    factors = FACTORS[torch.get_float32_matmul_precision()] if acc == torch.float32 else 0.0
    if _eps(result) > min(_eps(z), _eps(w)):
        factors = max(factors, _eps(result))
    if rounded:
        factors += _eps(result) / 2
    sums = 8 * math.sqrt(w.shape[0] / 3) * torch.finfo(acc).eps
    reach = z.to(acc).norm(dim=-1, keepdim=True) * w.to(acc).norm(dim=0)
    limit = reach.mul_(2 * factors + sums).add_(result.to(acc).abs(), alpha=_eps(result))
    if bias is not None:
        # a product may begin with it (addmm): partial sums are then as large
        limit = limit.add_(bias.to(acc).abs(), alpha=_eps(result) + sums)
    # the smallest normal number is what a result that underflows may be off by
    return limit.add_(torch.finfo(result.dtype).smallest_normal)


class Claims:
    """Collects what should be equal; `check` reads all of it back at once.

    Args:
        kept: the positions `[B, P]` at which it should, None for all.
    """

    def __init__(self, kept: torch.Tensor | None):
        self._kept = kept
        self._claims: list[str] = []
        self._found: list[torch.Tensor] = []
        self._shape: torch.Size = torch.Size()

    def equal(
        self,
        claim: str,
        got: torch.Tensor,
        expected: torch.Tensor,
        limit: torch.Tensor | float = 0.0,
    ) -> None:
        """Claims `|got - expected| <= limit` for `[B, P, d]`; NaN and inf are never equal."""
        got, expected = got.detach(), expected.detach().to(got.device)
        difference = (got - expected).abs_()
        within = difference <= limit
        if got.device.type == "cpu" and within.all():
            return
        bad = within.logical_not_()
        limit = torch.as_tensor(limit, dtype=difference.dtype, device=difference.device)
        if self._kept is not None:
            bad &= self._kept.to(bad.device)[..., None]
        # where all is well this is anywhere; NaN is the largest
        at = difference.masked_fill_(~bad, 0).argmax()
        values = (t.expand_as(bad).reshape(-1)[at].double() for t in (got, expected, limit))
        self._claims.append(claim)
        self._found.append(torch.stack([bad.sum().double(), at.double(), *values]))
        self._shape = bad.shape

    def sums(self, claim: str, got: torch.Tensor, terms: list[torch.Tensor]) -> None:
        """Claims `got = sum(terms)`, within rounding, wherever the terms are."""
        got = got.detach()
        terms = [t.detach().to(got.device).reshape(got.shape) for t in terms]
        total = terms[0].to(accumulate_dtype(terms[0].dtype))
        for t in terms[1:]:
            total = total + t.to(accumulate_dtype(t.dtype))
        self.equal(claim, got, total, sum_limit(terms, got))

    def check(self, refuse: Callable[[str], Exception]) -> None:
        """Raises what `refuse` makes of the first claim that does not hold."""
        if not self._found:
            return
        found = torch.stack([row.to(self._found[0].device) for row in self._found]).tolist()
        for claim, (bad, at, got, expected, limit) in zip(self._claims, found, strict=True):
            if bad:
                row, rest = divmod(int(at), self._shape[1] * self._shape[2])
                place = (row, *divmod(rest, self._shape[2]))
                if not (math.isfinite(got) and math.isfinite(expected)):
                    raise refuse(
                        f"activations must be finite, got {got:.6g} for {expected:.6g} at "
                        f"{list(place)} (row, position, coordinate), where {claim}"
                    )
                raise refuse(
                    f"{claim}: got {got:.9g}, expected {expected:.9g} within {limit:.2g} at "
                    f"{list(place)} (row, position, coordinate), and so in {int(bad):,} numbers"
                )
