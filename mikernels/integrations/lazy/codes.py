# SPDX-License-Identifier: Apache-2.0
"""Activations as codes: what can be said of tokens x features numbers by those that are not 0.

Operations that keep zeros at 0 act on the slots; sums and counts over tokens or features, products
with a decoder, and columns `acts[:, a:b]` need no more. A library that scatters the winners of
`topk` into zeros makes codes of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mikernels._autocast import in_own_dtype
from mikernels.integrations.lazy.tensor import Lazy, Ledger, Node, known, version_of
from mikernels.ops.sae.decode import sparse_decode
from mikernels.ops.sae.jump import gather_features
from mikernels.values.codes import SparseCodes


@dataclass(eq=False)
class Slots:
    """What a selection's indices are: of distinct features, ascending within tokens.

    Attributes:
        indices, row_offsets: as of codes. f: features. scores: by which what the library gets is
            sorted, of the shape of the indices; None: it is in slots' order.
    """

    indices: torch.Tensor
    row_offsets: torch.Tensor | None
    f: int
    scores: torch.Tensor | None = None

    @functools.cached_property
    def order(self) -> torch.Tensor | None:
        return None if self.scores is None else self.scores.argsort(-1, descending=True)

    def sorted(self, t: torch.Tensor) -> torch.Tensor:
        """As the library gets it."""
        return t if self.order is None else t.gather(-1, self.order)

    def unsorted(self, t: torch.Tensor) -> torch.Tensor:
        """In slots' order."""
        t = t.reshape(self.indices.shape)
        return t if self.order is None else torch.zeros_like(t).scatter(-1, self.order, t)

    def remember(self, given: torch.Tensor) -> torch.Tensor:
        """Indices with a note of where they come from, until somebody changes them."""
        given._slots = (self, version_of(given))  # type: ignore[attr-defined]
        return given


@dataclass(frozen=True, eq=False)
class Ranked(Node):
    """Values or places `[S]` that a selection over a whole batch gives, sorted when somebody looks.

    A library that scatters them does not, and sorting S1's takes a tenth of a step.
    """

    numbers: torch.Tensor
    slots: Slots
    ledger: Ledger
    places: bool

    counted = False

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.numbers.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.numbers.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.numbers.device

    def tensors(self) -> list[torch.Tensor]:
        return [self.numbers]

    def sources(self) -> list[torch.Tensor]:
        return [self.numbers, self.slots.indices]

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Ranked:
        return replace(self, numbers=tensors[0])

    def dense(self) -> torch.Tensor:
        found = self.slots.sorted(self.numbers)
        return self.slots.remember(found) if self.places else found


def slots_of(index: Any) -> Slots | None:
    """Of a selection's indices, what is known of them."""
    if isinstance(index, Lazy):
        node = index._node
        return node.slots if isinstance(node, Ranked) and node.places else None
    slots, version = getattr(index, "_slots", (None, 0))
    return slots if slots is not None and version == version_of(index) else None


def dtype_of_product(a: torch.Tensor, b: torch.Tensor) -> torch.dtype | None:
    """In which torch multiplies matrices, or None where it refuses to."""
    device = a.device.type
    # autocast leaves fp64 as it is
    if torch.is_autocast_enabled(device) and torch.float64 not in (a.dtype, b.dtype):
        return torch.get_autocast_dtype(device)
    return a.dtype if a.dtype == b.dtype else None


def columns_of(index: Any, shape: torch.Size) -> slice:
    """The columns of `t[..., a:b]`."""
    known(isinstance(index, tuple) and index and isinstance(index[-1], slice))
    before = index[:-1]
    known(before == (Ellipsis,) or before == (slice(None),) * (len(shape) - 1))
    part = index[-1]
    known(part.step in (None, 1))
    ends = [None if end is None else int(end) for end in (part.start, part.stop)]
    return slice(*slice(*ends).indices(shape[-1])[:2])


@dataclass(frozen=True, eq=False)
class Zeros(Node):
    """Nothing but zeros, `[..., F]` or flat."""

    leading: torch.Size
    f: int
    flat: bool
    dtype: torch.dtype
    device: torch.device
    ledger: Ledger

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        shape = torch.Size((*self.leading, self.f))
        return torch.Size((shape.numel(),)) if self.flat else shape

    def tensors(self) -> list[torch.Tensor]:
        return []

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Zeros:
        return self

    def dense(self) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def op_scatter(self, dim: int, index: Any, src: Any) -> Codes:
        known(dim in (-1, len(self.shape) - 1) and isinstance(src, torch.Tensor))
        known(src.shape == index.shape and src.dtype == self.dtype)
        slots = slots_of(index)
        known(slots is not None and index.shape[:-1] == self.shape[:-1] and slots.f == self.f)
        assert slots is not None
        tokens = len(slots.indices) if slots.row_offsets is None else len(slots.row_offsets) - 1
        known(tokens == self.leading.numel())
        if isinstance(src, Lazy):
            ranked = src._node
            known(isinstance(ranked, Ranked))
            assert isinstance(ranked, Ranked)
            known(ranked.slots is slots and not ranked.places)
            values = ranked.numbers
        else:
            values = slots.unsorted(src)
        return Codes(
            values, slots.indices, slots.row_offsets, self.f, self.leading, self.ledger, self.flat
        )

    def op_scatter_(self, dim: int, index: Any, src: Any) -> Codes:
        return self.op_scatter(dim, index, src)

    op_scatter_.in_place = True  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class Codes(Node):
    """Codes of N tokens.

    Attributes:
        values: `[N, k]`, or `[S]` with row_offsets `[N + 1]`; any dtype. indices: of that shape.
        f: features. leading: the shape before F. flat: `[N F]`, not `[..., F]`.
        rest: `[F]`, what every pair without a slot is: 0 in value, but with a gradient; or None.
    """

    values: torch.Tensor
    indices: torch.Tensor
    row_offsets: torch.Tensor | None
    f: int
    leading: torch.Size
    ledger: Ledger
    flat: bool = False
    rest: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        shape = torch.Size((*self.leading, self.f))
        return torch.Size((shape.numel(),)) if self.flat else shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.values.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.values.device

    @property
    def codes(self) -> SparseCodes:
        """As the operators take them."""
        return SparseCodes._trusted(self.values, self.indices, self.f, self.row_offsets)

    def tensors(self) -> list[torch.Tensor]:
        return [self.values] if self.rest is None else [self.values, self.rest]

    def sources(self) -> list[torch.Tensor]:
        return [*self.tensors(), self.indices]

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Codes:
        return replace(self, values=tensors[0], rest=tensors[1] if len(tensors) > 1 else None)

    def dense(self) -> torch.Tensor:
        values = self.values if self.values.dtype.is_floating_point else self.values.float()
        dense = replace(self, values=values).codes.to_dense()
        if self.rest is not None:
            none = torch.ones_like(dense, dtype=torch.bool)
            rows = self.rows().reshape(-1)
            none[rows, self.indices.reshape(-1)] = False
            dense = dense + none * self.rest
        return dense.to(self.dtype).reshape(self.shape)

    def rows(self) -> torch.Tensor:
        """The token of every slot, in the shape of the values."""
        if self.row_offsets is not None:
            tokens = self.codes_of_any().tokens
            assert tokens is not None
            return tokens
        n = self.values.shape[0]
        return torch.arange(n, device=self.device)[:, None].expand(self.values.shape)

    def codes_of_any(self) -> SparseCodes:
        """The slots alone: codes hold floating values."""
        values = self.values if self.dtype.is_floating_point else self.values.float()
        return SparseCodes._trusted(values, self.indices, self.f, self.row_offsets)

    # ---- elementwise

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Codes:
        known(self.rest is None)
        return replace(self, values=function(self.values))

    def op_to(self, *args: Any, dtype: Any = None) -> Codes:
        known(len(args) == (dtype is None))
        wanted = args[0] if args else dtype
        known(isinstance(wanted, torch.dtype))
        return self.map(lambda v: v.to(wanted))

    def op_type(self, dtype: Any) -> Codes:
        known(isinstance(dtype, torch.dtype))
        return self.map(lambda v: v.to(dtype))

    def op_bool(self) -> Codes:
        return self.map(lambda v: v.bool())

    def op_float(self) -> Codes:
        return self.map(lambda v: v.float())

    def op_double(self) -> Codes:
        return self.map(lambda v: v.double())

    def op_int(self) -> Codes:
        return self.map(lambda v: v.int())

    def op_long(self) -> Codes:
        return self.map(lambda v: v.long())

    def op_relu(self, inplace: bool = False) -> Codes:
        known(not inplace)
        return self.map(torch.relu)

    def op_abs(self) -> Codes:
        return self.map(torch.abs)

    def op_neg(self) -> Codes:
        return self.map(torch.neg)

    def op_square(self) -> Codes:
        return self.map(torch.square)

    def op_sqrt(self) -> Codes:
        return self.map(torch.sqrt)

    def op_tanh(self) -> Codes:
        return self.map(torch.tanh)

    def op_clone(self) -> Codes:
        return self.map(torch.clone)

    def op_contiguous(self) -> Codes:
        return self.map(lambda v: v)

    def op_to_dense(self) -> Codes:
        return self.map(lambda v: v)

    def op_pow(self, exponent: Any) -> Codes:
        known(isinstance(exponent, int | float) and exponent > 0)
        return self.map(lambda v: v.pow(exponent))

    def op_gt(self, other: Any) -> Codes:
        known(isinstance(other, int | float) and other >= 0)
        return self.map(lambda v: v > other)

    def op_ge(self, other: Any) -> Codes:
        known(isinstance(other, int | float) and other > 0)
        return self.map(lambda v: v >= other)

    def op_ne(self, other: Any) -> Codes:
        known(isinstance(other, int | float) and other == 0)
        return self.map(lambda v: v != other)

    def op_mul(self, other: Any) -> Codes:
        return self.map(lambda v: v * self.at_slots(other))

    def op_div(self, other: Any) -> Codes:
        known(not isinstance(other, Lazy))
        if isinstance(other, torch.Tensor):
            # 0 / 0 would be NaN where there is no slot
            known(other.device.type != "cpu" or bool((other != 0).all()))
        else:
            known(other != 0)
        return self.map(lambda v: v / self.at_slots(other))

    def at_slots(self, other: Any) -> Any:
        """What a broadcast factor is at the slots."""
        if isinstance(other, Lazy):
            node = other._node
            known(isinstance(node, Codes))
            assert isinstance(node, Codes)
            known(node.indices is self.indices and node.rest is None)
            return node.values
        if not isinstance(other, torch.Tensor):
            # inf times 0 is NaN
            known(isinstance(other, int | float | bool) and math.isfinite(other))
            return other
        known(not self.flat and other.dim() <= len(self.shape))
        # on a GPU this would be a wait at every step
        known(other.device.type != "cpu" or bool(other.detach().isfinite().all()))
        if other.numel() == 1:
            return other.reshape(())
        if other.shape[-1] == self.f and other.numel() == self.f:
            vector = other.reshape(-1)
            if vector.dtype.is_floating_point:
                return gather_features(vector, self.indices)
            return vector[self.indices]
        known(other.shape == (*self.leading, 1))
        return other.reshape(-1)[self.rows()]

    # ---- sums

    def op_sum(self, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> torch.Tensor:
        known(not keepdim and dtype is None and not self.flat)
        values = self.values
        if values.dtype in (torch.bool, torch.int32):
            values = values.long()
        if dim is None:
            known(self.rest is None)
            return values.sum()
        if isinstance(dim, tuple | list):
            known(len(dim) == 1)
            dim = dim[0]
        last = len(self.shape) - 1
        dim = dim % (last + 1)
        if dim == last:
            return self.sum_of_tokens(values).reshape(self.leading)
        known(dim == last - 1 and self.rest is None)
        # tokens that differ in the last leading dimension alone are summed
        groups = self.leading[:-1].numel()
        places = self.indices
        if groups > 1:
            places = self.rows() // max(1, self.leading[-1]) * self.f + places
        total = values.new_zeros(groups * self.f)
        total = total.index_add(0, places.reshape(-1), values.reshape(-1))
        return total.reshape(*self.leading[:-1], self.f)

    def sum_of_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """`[N]`."""
        if self.rest is not None:
            values = values - gather_features(self.rest, self.indices)
        if self.row_offsets is None:
            total = values.sum(-1)
        else:
            total = values.new_zeros(len(self.row_offsets) - 1)
            total = total.index_add(0, self.rows(), values)
        return total if self.rest is None else total + self.rest.sum()

    def op_mean(self, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> torch.Tensor:
        known(self.dtype.is_floating_point)
        total = self.op_sum(dim, keepdim, dtype=dtype)
        count = self.shape.numel() // max(1, total.numel())
        return total / count

    def op_any(self, dim: Any = None) -> torch.Tensor:
        there = self.values.detach() != 0
        if dim is None:
            return there.any()
        return replace(self, values=there, rest=None).op_sum(dim) > 0

    def op_count_nonzero(self, dim: Any = None) -> torch.Tensor:
        return replace(self, values=self.values.detach() != 0, rest=None).op_sum(dim)

    def op_norm(
        self, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None
    ) -> torch.Tensor:
        known(p in (1, 1.0) and dtype is None and dim in (-1, len(self.shape) - 1) and not keepdim)
        known(self.dtype.is_floating_point)
        return self.op_abs().op_sum(-1)

    def op_linalg_norm(
        self, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
    ) -> torch.Tensor:
        return self.op_norm(ord, dim, keepdim, dtype)

    def op_eq(self, other: Any) -> Absent:
        known(isinstance(other, int | float) and other == 0 and not self.flat)
        return Absent(replace(self, values=self.values.detach() != 0, rest=None))

    # ---- the decoder

    def op_matmul(self, other: Any) -> torch.Tensor:
        known(isinstance(other, torch.Tensor) and not isinstance(other, Lazy))
        known(other.dim() == 2 and other.shape[0] == self.f and not self.flat)
        return self.decode(other, None)

    def op_linear(self, weight: Any, bias: Any = None) -> torch.Tensor:
        known(weight.dim() == 2 and weight.shape[1] == self.f and not self.flat)
        return self.decode(weight.T, bias)

    def decode(self, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        known(self.rest is None and self.dtype.is_floating_point)
        dtype = dtype_of_product(self.values, w)
        known(dtype is not None)
        codes = replace(self, values=self.values.to(dtype)).codes
        out = sparse_decode(codes, w.to(dtype), None if bias is None else bias.to(dtype))
        return out.reshape(*self.leading, w.shape[1])

    # ---- parts

    def op_getitem(self, index: Any) -> Any:
        if isinstance(index, Lazy):
            mask = index._node
            known(isinstance(mask, Codes))
            assert isinstance(mask, Codes)
            known(mask.dtype is torch.bool and mask.indices is self.indices and self.rest is None)
            return self.values[mask.values]
        if isinstance(index, torch.Tensor) and index.dtype is torch.bool:
            return self.tokens(index)
        return self.columns(columns_of(index, self.shape))

    def tokens(self, mask: torch.Tensor) -> Codes:
        """The codes of the tokens that a mask of the leading dimensions keeps."""
        known(mask.shape == self.leading and self.rest is None and not self.flat)
        mask = mask.reshape(-1)
        count = torch.Size((int(mask.sum()),))
        if self.row_offsets is None:
            return replace(
                self, values=self.values[mask], indices=self.indices[mask], leading=count
            )
        kept = mask[self.rows()]
        counts = self.row_offsets.diff()[mask]
        return replace(
            self,
            values=self.values[kept],
            indices=self.indices[kept],
            row_offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            leading=count,
        )

    @in_own_dtype
    def columns(self, part: slice) -> Codes:
        """The codes of some features, ragged."""
        known(self.rest is None and not self.flat)
        low, high = part.start, max(part.start, part.stop)
        if low == 0 and high == self.f:
            return self
        kept = (self.indices >= low) & (self.indices < high)
        n = self.leading.numel()
        counts = torch.zeros(n, dtype=torch.int64, device=self.device)
        counts.index_add_(0, self.rows()[kept], kept.new_ones(()).long().expand(int(kept.sum())))
        row_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return replace(
            self,
            values=self.values[kept],
            indices=self.indices[kept] - low,
            row_offsets=row_offsets,
            f=high - low,
        )

    def op_setitem(self, index: Any, value: Any) -> Codes:
        known(isinstance(value, int | float) and value == 0 and self.rest is None and not self.flat)
        part = columns_of(index, self.shape)
        outside = (self.indices < part.start) | (self.indices >= part.stop)
        return self.map(lambda v: v.masked_fill(~outside, 0))

    op_setitem.in_place = True  # type: ignore[attr-defined]

    def op_split(self, sizes: Any, dim: int = 0) -> tuple[Codes, ...]:
        known(dim in (-1, len(self.shape) - 1))
        if isinstance(sizes, int):
            sizes = [min(sizes, self.f - low) for low in range(0, self.f, sizes)]
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + int(size))
        known(ends[-1] == self.f)
        return tuple(self.columns(slice(a, b)) for a, b in zip(ends, ends[1:], strict=False))

    def op_reshape(self, *shape: Any) -> Codes:
        if len(shape) == 1 and not isinstance(shape[0], int):
            known(isinstance(shape[0], tuple | list))
            shape = tuple(shape[0])
        size = self.shape.numel()
        if -1 in shape:
            rest = math.prod(s for s in shape if s != -1)
            shape = tuple(size // max(1, rest) if s == -1 else s for s in shape)
        known(math.prod(shape) == size and shape and shape[-1] == self.f)
        return replace(self, leading=torch.Size(shape[:-1]), flat=False)

    def op_flatten(self, start_dim: int = 0, end_dim: int = -1) -> Codes:
        dims = len(self.shape)
        if start_dim == 0 and end_dim in (-1, dims - 1):
            return replace(self, flat=True)
        known(start_dim == 0 and end_dim in (-2, dims - 2) and not self.flat)
        return replace(self, leading=torch.Size((self.leading.numel(),)))


@dataclass(frozen=True, eq=False)
class Absent(Node):
    """Where codes are 0."""

    there: Codes
    dtype: torch.dtype = torch.bool

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.there.shape

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.there.device

    @property
    def ledger(self) -> Ledger:  # type: ignore[override]
        return self.there.ledger

    def tensors(self) -> list[torch.Tensor]:
        return []

    def sources(self) -> list[torch.Tensor]:
        return self.there.sources()

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Absent:
        return self

    def dense(self) -> torch.Tensor:
        return ~self.there.dense()

    def op_all(self, dim: Any = None) -> torch.Tensor:
        return ~self.there.op_any(dim)
