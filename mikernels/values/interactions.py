# SPDX-License-Identifier: Apache-2.0
"""Interactions: the strongest pairs of a matrix that was never formed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mikernels._indices import check_indices, check_size


@dataclass(frozen=True, eq=False)
class Interactions:
    """Selected entries of an n x m matrix of pairs, strongest first.

    Order: strength descending (NaN first), then row, then column ascending.

    Attributes:
        values: `[k]` scores with their sign.
        rows, cols: `[k]` int64, where they are.
        shape: (n, m).

    Raises:
        TypeError, ValueError: for dtypes, devices, shapes or places other than the above.
    """

    values: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        self._check_form()
        self._check_places()

    @classmethod
    def _trusted(
        cls,
        values: torch.Tensor,
        rows: torch.Tensor,
        cols: torch.Tensor,
        shape: tuple[int, int],
    ) -> Interactions:
        """Interactions whose places are known to lie in the matrix: those of an operator."""
        found = object.__new__(cls)
        for name, value in (("values", values), ("rows", rows), ("cols", cols), ("shape", shape)):
            object.__setattr__(found, name, value)
        found._check_form()
        return found

    def _check_places(self) -> None:
        for name, size in zip(("rows", "cols"), self.shape, strict=True):
            check_indices("Interactions", name, getattr(self, name), size)

    def _check_form(self) -> None:
        if len(self.shape) != 2:
            raise ValueError(f"Interactions: shape must be (n, m), got {self.shape}")
        for size in self.shape:
            check_size("Interactions", "shape", size)
        for name in ("values", "rows", "cols"):
            part = getattr(self, name)
            if not isinstance(part, torch.Tensor):
                raise TypeError(
                    f"Interactions: {name} must be a torch.Tensor, got {type(part).__name__}"
                )
            if part.device != self.values.device:
                raise ValueError(
                    f"Interactions: {name} must be on the device of values "
                    f"({self.values.device}), got {part.device}; move one of them"
                )
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
        # a negative place would count from the end; they may have changed in place
        self._check_places()
        dense = self.values.new_zeros(self.shape)
        dense[self.rows, self.cols] = self.values
        return dense

    def to_coo(self) -> torch.Tensor:
        """A torch sparse COO matrix `[n, m]`, coalesced."""
        at = torch.stack([self.rows, self.cols])
        return torch.sparse_coo_tensor(
            at, self.values, self.shape, check_invariants=True
        ).coalesce()
