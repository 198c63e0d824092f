# SPDX-License-Identifier: Apache-2.0
"""Interactions: the strongest pairs of a matrix that was never formed."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Interactions:
    """Selected entries of an n x m matrix of pairs, strongest first.

    Order: strength descending (NaN first), then row, then column ascending.

    Attributes:
        values: `[k]` scores with their sign.
        rows, cols: `[k]` int64, where they are.
        shape: (n, m).
    """

    values: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if not self.values.dim() == self.rows.dim() == self.cols.dim() == 1 or not (
            len(self.values) == len(self.rows) == len(self.cols)
        ):
            raise ValueError(
                f"Interactions: values, rows and cols must be [k] of one k, got "
                f"{list(self.values.shape)}, {list(self.rows.shape)} and {list(self.cols.shape)}"
            )

    def __len__(self) -> int:
        return self.values.shape[0]

    def to_dense(self) -> torch.Tensor:
        """`[n, m]`, zeros elsewhere."""
        dense = self.values.new_zeros(self.shape)
        dense[self.rows, self.cols] = self.values
        return dense

    def to_coo(self) -> torch.Tensor:
        """A torch sparse COO matrix `[n, m]`, coalesced."""
        at = torch.stack([self.rows, self.cols])
        return torch.sparse_coo_tensor(
            at, self.values, self.shape, check_invariants=True
        ).coalesce()
