# SPDX-License-Identifier: Apache-2.0
"""Pairs of token and feature, as slots of codes or as a whole matrix.

Activations and penalties of a variant are functions of single pairs. Written on `Entries` they run
on the slots in training and on the tokens x features matrix of the dense baseline.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mikernels.ops.sae.jump import gather_features
from mikernels.values.codes import SparseCodes


@dataclass(frozen=True, eq=False)
class Entries:
    """The pairs that values belong to.

    Attributes:
        codes: whose slots they are; None for a matrix `[n, F]`.
        weights: `[n]`, how often each token counts, or None.
    """

    codes: SparseCodes | None
    weights: torch.Tensor | None = None

    def of_feature(self, p: torch.Tensor) -> torch.Tensor:
        """A parameter `[F]` at every pair; gradients are summed by feature in fp32."""
        return p if self.codes is None else gather_features(p, self.codes.indices)

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """`[n]`: the sum of values of the pairs over each token."""
        tokens = None if self.codes is None else self.codes.tokens
        if tokens is None or self.codes is None:
            return values.sum(-1)
        return values.new_zeros(self.codes.shape[0]).index_add(0, tokens, values)

    def mean(self, per_token: torch.Tensor) -> torch.Tensor:
        """0-dim: the mean of `[n]` over the tokens, each counted by its weight; 0 of none."""
        if self.weights is None:
            return per_token.sum() / max(1, per_token.shape[0])
        count = self.weights.sum()
        return (per_token * self.weights).sum() / count.masked_fill(count == 0, 1)


def codes_of(acts: torch.Tensor) -> SparseCodes:
    """The ragged codes of activations `[n, F]` that are not 0."""
    n, f = acts.shape
    tokens, indices = acts.detach().nonzero(as_tuple=True)
    offsets = torch.zeros(n + 1, dtype=torch.int64, device=acts.device)
    offsets[1:] = torch.bincount(tokens, minlength=n).cumsum(0)
    return SparseCodes._trusted(acts[tokens, indices], indices, f, offsets)
