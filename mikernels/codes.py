# SPDX-License-Identifier: Apache-2.0
"""SparseCodes: the one value that flows from encode to decode to gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mikernels._dispatch import resolve_impl
from mikernels._indices import check_indices, check_size
from mikernels.ops.gradients import by_feature_op


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """k active features a token, padded: `codes[..., indices[..., j]] = values[..., j]`.

    Indices within a token are distinct; slots whose value is 0 are inactive. Gradients flow through
    `values`. Indices are checked here: on the CPU in one read (33 us for 4096 tokens of 32), on a
    GPU by an assertion on the device. Those that the operators themselves find are not.

    Attributes:
        values: `[..., k]` floating.
        indices: `[..., k]` int64 in 0..n_features-1.
        n_features: F.

    Raises:
        TypeError, ValueError: for dtypes, devices, shapes or indices other than the above.
    """

    values: torch.Tensor
    indices: torch.Tensor
    n_features: int

    def __post_init__(self) -> None:
        self._check_form()
        check_indices("SparseCodes", "indices", self.indices, self.n_features)

    @classmethod
    def _trusted(cls, values: torch.Tensor, indices: torch.Tensor, n_features: int) -> SparseCodes:
        """Codes whose indices are known to be below F: an operator's, or part of other codes."""
        codes = object.__new__(cls)
        object.__setattr__(codes, "values", values)
        object.__setattr__(codes, "indices", indices)
        object.__setattr__(codes, "n_features", n_features)
        codes._check_form()
        return codes

    def _check_form(self) -> None:
        check_size("SparseCodes", "n_features", self.n_features)
        for name in ("values", "indices"):
            if not isinstance(getattr(self, name), torch.Tensor):
                raise TypeError(
                    f"SparseCodes: {name} must be a torch.Tensor, got "
                    f"{type(getattr(self, name)).__name__}"
                )
        if self.values.shape != self.indices.shape:
            raise ValueError(
                f"SparseCodes: values and indices must have one shape, got "
                f"{list(self.values.shape)} and {list(self.indices.shape)}"
            )
        if self.values.dim() < 1:
            raise ValueError("SparseCodes: values must have at least one dimension, got a scalar")
        if not self.values.is_floating_point():
            raise TypeError(f"SparseCodes: values must be floating, got {self.values.dtype}")
        if self.indices.dtype != torch.int64:
            raise TypeError(f"SparseCodes: indices must be int64, got {self.indices.dtype}")
        if self.values.device != self.indices.device:
            raise ValueError(
                f"SparseCodes: values and indices must be on one device, got "
                f"{self.values.device} and {self.indices.device}; move one of them"
            )

    @property
    def k(self) -> int:
        return self.values.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `to_dense()`: `[..., F]`."""
        return (*self.values.shape[:-1], self.n_features)

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, index) -> SparseCodes:
        """Index the leading dimensions, e.g. `codes[3]`, `codes[:, 5]`, `codes[mask]`."""
        parts = index if isinstance(index, tuple) else (index,)
        leading = self.values.dim() - 1
        used = sum(_dims_of(part) for part in parts)
        # after an ellipsis, indices would count from the slots
        if used > leading or any(part is ... for part in parts):
            raise IndexError(
                f"SparseCodes: expected at most {leading} leading indices and no ellipsis, "
                f"got {used}"
            )
        return SparseCodes._trusted(self.values[index], self.indices[index], self.n_features)

    def to(self, *args, **kwargs) -> SparseCodes:
        """`Tensor.to` for device and floating dtype; indices stay int64."""
        values = self.values.to(*args, **kwargs)
        return SparseCodes._trusted(values, self.indices.to(values.device), self.n_features)

    def detach(self) -> SparseCodes:
        return SparseCodes._trusted(self.values.detach(), self.indices, self.n_features)

    def flat(self) -> tuple[torch.Tensor, torch.Tensor]:
        """values and indices as `[tokens, k]`."""
        shape = self.values.shape[:-1].numel(), self.k
        return self.values.reshape(shape), self.indices.reshape(shape)

    def to_dense(self) -> torch.Tensor:
        """`[..., F]`, zeros elsewhere; differentiable in `values`."""
        return self.values.new_zeros(self.shape).scatter_add(-1, self.indices, self.values)

    @classmethod
    def from_dense(cls, dense: torch.Tensor, k: int | None = None) -> SparseCodes:
        """The k largest entries of each row; k = None keeps every row's non-zeros (one sync)."""
        from mikernels.ops.row_topk import row_topk

        if k is None:
            if dense.shape[-1] == 0:
                return cls._trusted(dense, dense.to(torch.int64), 0)
            k = max(1, int((dense != 0).sum(-1).max())) if dense.numel() else 1
            _, indices = row_topk(dense.detach().abs(), k)
            return cls._trusted(dense.gather(-1, indices), indices, dense.shape[-1])
        values, indices = row_topk(dense, k)
        return cls._trusted(values, indices, dense.shape[-1])

    def to_csr(self) -> torch.Tensor:
        """A torch sparse CSR matrix `[tokens, F]` of the non-zero codes."""
        flat_values, flat_indices = self.flat()
        flat_indices, order = flat_indices.sort(dim=-1)
        # products with a CSR matrix trust it, and indices may have changed in place since they were
        # checked; of a sorted row the ends are enough
        ends = flat_indices[:, :: max(1, self.k - 1)]
        check_indices("SparseCodes.to_csr", "indices", ends, self.n_features)
        flat_values = flat_values.gather(-1, order)
        kept = flat_values != 0
        rows = torch.zeros(kept.shape[0] + 1, dtype=torch.int64, device=kept.device)
        rows[1:] = kept.sum(-1).cumsum(0)
        return torch.sparse_csr_tensor(
            rows,
            flat_indices[kept],
            flat_values[kept],
            size=(kept.shape[0], self.n_features),
            check_invariants=False,
        )

    def by_feature(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(offsets [F + 1], order [tokens * k])` int64: the slots of feature f, token-ascending,
        are `order[offsets[f]:offsets[f + 1]]`. Computed once and kept until the indices change."""
        # a tensor of inference mode counts no changes, so nothing is kept of it
        version = None if self.indices.is_inference() else self.indices._version
        cached = self.__dict__.get("_by_feature")
        if cached is None or version is None or cached[0] != version:
            flat = self.indices.reshape(-1)
            impl = resolve_impl(by_feature_op, None, flat.device)
            cached = version, by_feature_op(flat, self.n_features, impl=impl)
            object.__setattr__(self, "_by_feature", cached)
        return cached[1]

    def __getstate__(self) -> dict[str, Any]:
        # a copy's indices count their changes anew, so that what is kept of these says nothing
        return {name: value for name, value in vars(self).items() if name != "_by_feature"}

    def fired(self) -> torch.Tensor:
        """`[F]` int64: the number of tokens on which each feature is active (value != 0)."""
        active = (self.values.detach() != 0).reshape(-1).to(torch.int64)
        counts = torch.zeros(self.n_features, dtype=torch.int64, device=self.indices.device)
        return counts.scatter_add_(0, self.indices.reshape(-1), active)

    def l0(self) -> torch.Tensor:
        """`[...]` int64: active features of each token."""
        return (self.values.detach() != 0).sum(-1)


def _dims_of(part: Any) -> int:
    """How many dimensions an index takes: a mask (also of NumPy, or of bytes) all of its own."""
    is_mask = str(getattr(part, "dtype", "")).removeprefix("torch.") in ("bool", "uint8")
    return part.ndim if is_mask else 1
