# SPDX-License-Identifier: Apache-2.0
"""SparseCodes: the one value that flows from encode to decode to gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from mikernels._indices import check_indices, check_size
from mikernels._ragged import check_row_offsets, tokens_of

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """The active features of every token, padded or ragged.

    Padded, k a token: `codes[..., indices[..., j]] = values[..., j]`. Ragged, with `row_offsets`:
    `codes[n, indices[s]] = values[s]` for the slots `row_offsets[n] <= s < row_offsets[n + 1]` of
    token n. Slots from `row_offsets[N]` on are not in use: they are 0 and count as the last
    token's, so that the number S of slots is a shape that no device is asked for.

    Indices within a token are distinct, and ascend if ragged; slots whose value is 0 are inactive.
    Gradients flow through `values`. Indices and row_offsets are checked here: on the CPU in a read
    or two (33 us for 4096 tokens of 32, 0.4 ms if ragged), on a GPU by assertions on the device.
    Those that the operators themselves find are not.

    Attributes:
        values: `[..., k]` floating, or `[S]`.
        indices: `[..., k]` int64 in 0..n_features-1, or `[S]`.
        n_features: F.
        row_offsets: None, or `[N + 1]` int64 ascending from 0 to at most S.

    Raises:
        TypeError, ValueError: for dtypes, devices, shapes or indices other than the above.
    """

    values: torch.Tensor
    indices: torch.Tensor
    n_features: int
    row_offsets: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._check_form()
        check_indices("SparseCodes", "indices", self.indices, self.n_features)
        self._check_ascending()

    @classmethod
    def ragged(
        cls,
        values: torch.Tensor,
        indices: torch.Tensor,
        row_offsets: torch.Tensor,
        n_features: int,
    ) -> SparseCodes:
        """Codes with as many slots a token as `row_offsets [N + 1]` say; values, indices `[S]`."""
        return cls(values, indices, n_features, row_offsets)

    @classmethod
    def _trusted(
        cls,
        values: torch.Tensor,
        indices: torch.Tensor,
        n_features: int,
        row_offsets: torch.Tensor | None = None,
    ) -> SparseCodes:
        """Codes whose indices are known to be below F: an operator's, or part of other codes."""
        codes = object.__new__(cls)
        object.__setattr__(codes, "values", values)
        object.__setattr__(codes, "indices", indices)
        object.__setattr__(codes, "n_features", n_features)
        object.__setattr__(codes, "row_offsets", row_offsets)
        codes._check_form()
        return codes

    def _check_form(self) -> None:
        check_size("SparseCodes", "n_features", self.n_features)
        for name in ("values", "indices", "row_offsets"):
            given = getattr(self, name)
            if not isinstance(given, torch.Tensor) and (given is not None or name != "row_offsets"):
                raise TypeError(
                    f"SparseCodes: {name} must be a torch.Tensor, got {type(given).__name__}"
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
        if self.row_offsets is None:
            return
        if self.values.dim() != 1:
            raise ValueError(
                f"SparseCodes: values must be [S] with row_offsets, got {list(self.values.shape)}; "
                f"leave row_offsets out for [..., k]"
            )
        if self.row_offsets.device != self.values.device:
            raise ValueError(
                f"SparseCodes: row_offsets must be on {self.values.device}, got "
                f"{self.row_offsets.device}; move it"
            )

    def _check_ascending(self) -> None:
        """Within the tokens of ragged codes, as far as slots are in use."""
        indices, tokens, row_offsets = self.indices, self.tokens, self.row_offsets
        if tokens is None or row_offsets is None or indices.is_meta or indices.shape[0] < 2:
            return
        used = torch.arange(1, indices.shape[0], device=indices.device) < row_offsets[-1]
        bad = (indices.diff() <= 0) & (tokens.diff() == 0) & used
        message = "SparseCodes: indices must ascend within each token of ragged codes"
        # a fake tensor has another type and no numbers
        if (
            bad.device.type != "cpu"
            or torch.compiler.is_compiling()
            or type(indices) is not torch.Tensor
        ):
            torch._assert_async(~bad.any(), message)
        elif bad.any():
            slot = int(bad.nonzero()[0])
            raise ValueError(f"{message}, got {indices[slot : slot + 2].tolist()}; sort each token")

    @property
    def is_ragged(self) -> bool:
        return self.row_offsets is not None

    @property
    def k(self) -> int:
        """Slots a token of padded codes; ValueError for ragged ones, which have l0()."""
        if self.row_offsets is not None:
            raise ValueError("SparseCodes: ragged codes have no k, got row_offsets; use l0()")
        return self.values.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `to_dense()`: `[..., F]`."""
        if self.row_offsets is not None:
            return (self.row_offsets.shape[0] - 1, self.n_features)
        return (*self.values.shape[:-1], self.n_features)

    @property
    def tokens(self) -> torch.Tensor | None:
        """`[S]` int64 ascending: the token of each slot of ragged codes; None for padded ones.

        Computed once and kept until row_offsets change."""
        offsets = self.row_offsets
        if offsets is None:
            return None
        slots = self.values.shape[0]
        return self._kept("_tokens", offsets, lambda: tokens_of("SparseCodes", offsets, slots))

    def _kept(self, name: str, source: torch.Tensor, make: Callable[[], T]) -> T:
        """What `make` returns, kept until `source` changes in place; a graph keeps nothing."""
        if torch.compiler.is_compiling():
            return make()
        # a tensor of inference mode counts no changes, so nothing is kept of it
        version = None if source.is_inference() else source._version
        cached = self.__dict__.get(name)
        if cached is None or version is None or cached[0] != version:
            cached = version, make()
            object.__setattr__(self, name, cached)
        return cached[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> SparseCodes:
        """Index the leading dimensions, e.g. `codes[3]`, `codes[:, 5]`, `codes[mask]`.

        One token of ragged codes is padded, several are ragged; their number of slots is read from
        the device."""
        if self.row_offsets is not None:
            return self._rows(self.row_offsets, index)
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

    def _rows(self, row_offsets: torch.Tensor, index) -> SparseCodes:
        n = row_offsets.shape[0] - 1
        check_row_offsets("SparseCodes", row_offsets, self.values.shape[0])
        wanted = None if index is ... else torch.arange(n, device=row_offsets.device)[index]
        if wanted is None or wanted.dim() > 1:
            raise IndexError(
                f"SparseCodes: expected one index of the tokens of ragged codes, got {index!r}"
            )
        begins = row_offsets[wanted].reshape(-1)
        counts = row_offsets[wanted + 1].reshape(-1) - begins
        bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        slots = torch.arange(int(bounds[-1]), device=bounds.device)
        slots += (begins - bounds[:-1])[tokens_of("SparseCodes", bounds, slots.shape[0])]
        rows = None if wanted.dim() == 0 else bounds
        return SparseCodes._trusted(self.values[slots], self.indices[slots], self.n_features, rows)

    def to(self, *args, **kwargs) -> SparseCodes:
        """`Tensor.to` for device and floating dtype; indices stay int64."""
        values = self.values.to(*args, **kwargs)
        offsets = None if self.row_offsets is None else self.row_offsets.to(values.device)
        indices = self.indices.to(values.device)
        return SparseCodes._trusted(values, indices, self.n_features, offsets)

    def with_values(self, values: torch.Tensor) -> SparseCodes:
        """These slots with other values of the same shape; what is kept of the indices stays."""
        codes = SparseCodes._trusted(values, self.indices, self.n_features, self.row_offsets)
        for name in ("_by_feature", "_tokens"):
            if name in self.__dict__:
                object.__setattr__(codes, name, self.__dict__[name])
        return codes

    def padded(self) -> SparseCodes:
        """Ragged codes as `[N, k]` with k the most slots of a token (one sync); padded ones as they
        are. Slots that no token has hold 0 of feature 0."""
        if self.row_offsets is None:
            return self
        check_row_offsets("SparseCodes", self.row_offsets, self.values.shape[0])
        counts = self.row_offsets.diff()
        k = max(1, int(counts.max())) if counts.numel() else 1
        slots = torch.arange(k, device=self.values.device)
        used = slots < counts[:, None]
        places = (self.row_offsets[:-1, None] + slots).where(used, 0)
        if not self.values.numel():
            # the sum of nothing keeps them part of the graph
            values = self.values.sum().expand(used.shape)
            indices = self.indices.new_zeros(used.shape)
            return SparseCodes._trusted(values, indices, self.n_features)
        values, indices = self.values[places].where(used, 0), self.indices[places].where(used, 0)
        return SparseCodes._trusted(values, indices, self.n_features)

    def detach(self) -> SparseCodes:
        values = self.values.detach()
        return SparseCodes._trusted(values, self.indices, self.n_features, self.row_offsets)

    def flat(self) -> tuple[torch.Tensor, torch.Tensor]:
        """values and indices as `[tokens, k]`, or `[S]` of ragged codes."""
        if self.row_offsets is not None:
            return self.values, self.indices
        shape = self.values.shape[:-1].numel(), self.k
        return self.values.reshape(shape), self.indices.reshape(shape)

    def to_dense(self) -> torch.Tensor:
        """`[..., F]`, zeros elsewhere; differentiable in `values`."""
        if (tokens := self.tokens) is not None:
            dense = self.values.new_zeros(self.shape)
            return dense.index_put((tokens, self.indices), self.values, accumulate=True)
        return self.values.new_zeros(self.shape).scatter_add(-1, self.indices, self.values)

    @classmethod
    def from_dense(cls, dense: torch.Tensor, k: int | None = None) -> SparseCodes:
        """The k largest entries of each row; k = None keeps every row's non-zeros (one sync)."""
        from mikernels.ops.select.row_topk import row_topk

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
        values, indices = self.flat()
        if self.row_offsets is None:
            indices, order = indices.sort(dim=-1)
            values = values.gather(-1, order)
            # of a sorted row the ends are enough
            ends = indices[:, :: max(1, self.k - 1)]
            counts = (values != 0).sum(-1)
        else:
            self._check_ascending()
            ends = indices
            counts = self.l0()
        # products with a CSR matrix trust it, and indices may have changed in place since they were
        # checked
        check_indices("SparseCodes.to_csr", "indices", ends, self.n_features)
        kept = values != 0
        rows = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return torch.sparse_csr_tensor(
            rows,
            indices[kept],
            values[kept],
            size=(counts.shape[0], self.n_features),
            check_invariants=False,
        )

    def by_feature(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(offsets [F + 1], order [slots])` int64: the slots of feature f, token-ascending, are
        `order[offsets[f]:offsets[f + 1]]`. Computed once and kept until the indices change."""

        def sort() -> tuple[torch.Tensor, torch.Tensor]:
            from mikernels.ops.sae.gradients import by_feature_op

            return by_feature_op(self.indices.reshape(-1), self.n_features)

        return self._kept("_by_feature", self.indices, sort)

    def __getstate__(self) -> dict[str, Any]:
        # a copy's tensors count their changes anew, so that what is kept of these says nothing
        return {name: v for name, v in vars(self).items() if name not in ("_by_feature", "_tokens")}

    def fired(self) -> torch.Tensor:
        """`[F]` int64: the number of tokens on which each feature is active (value != 0)."""
        active = (self.values.detach() != 0).reshape(-1).to(torch.int64)
        counts = torch.zeros(self.n_features, dtype=torch.int64, device=self.indices.device)
        return counts.scatter_add_(0, self.indices.reshape(-1), active)

    def l0(self) -> torch.Tensor:
        """`[...]` int64: active features of each token."""
        active = self.values.detach() != 0
        if (tokens := self.tokens) is None:
            return active.sum(-1)
        counts = torch.zeros(self.shape[0], dtype=torch.int64, device=active.device)
        return counts.scatter_add_(0, tokens, active.to(torch.int64))


def _dims_of(part: Any) -> int:
    """How many dimensions an index takes: a mask (also of NumPy, or of bytes) all of its own."""
    is_mask = str(getattr(part, "dtype", "")).removeprefix("torch.") in ("bool", "uint8")
    return part.ndim if is_mask else 1
