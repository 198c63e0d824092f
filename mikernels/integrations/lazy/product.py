# SPDX-License-Identifier: Apache-2.0
"""Pre-activations that are not computed, and what becomes of them.

    h = x w^T + bias,  then times scale (>= 0),  then ReLU if `relu`

`topk` over features (or over all pairs of a flattened batch) selects without the matrix; a product
of h with a comparison of pre-activations, or a ReLU'd h that is summed, decoded or counted, becomes
ragged codes of the pairs that pass. The rest is dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from mikernels._autocast import in_own_dtype
from mikernels.integrations.lazy.codes import (
    Codes,
    Ranked,
    Slots,
    Zeros,
    columns_of,
    dtype_of_product,
    slots_of,
)
from mikernels.integrations.lazy.tensor import (
    Copies,
    Lazy,
    Ledger,
    Node,
    Snapshot,
    changed,
    copy_of,
    known,
    lazy,
    snapshot,
    unchanged,
)
from mikernels.ops.sae.batch_topk_encode import batch_topk_total
from mikernels.ops.sae.encode import topk_encode
from mikernels.ops.sae.gradients import gather_dot_op, gather_dots
from mikernels.ops.sae.jump import gather_features
from mikernels.ops.sae.threshold_encode import slots_above
from mikernels.values.codes import SparseCodes

# numbers of a panel of columns that are reduced at once
PANEL = 16 << 20
# tokens by which it is judged how many features are active
SAMPLE = 64
# of each dimension, how many numbers show whether a tensor is what it was
SHOWN = 16


def of_features(t: Any, shape: torch.Size) -> bool:
    """Whether a tensor is one number per feature of activations of a shape."""
    return (
        isinstance(t, torch.Tensor)
        and not isinstance(t, Lazy)
        and t.numel() == shape[-1]
        and t.shape[-1:] == shape[-1:]
        and t.dim() <= len(shape)
    )


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which floors are."""
    return torch.promote_types(dtype, torch.float32)


def _shown(t: torch.Tensor) -> torch.Tensor:
    """Some of its bits."""
    every = tuple(slice(None, None, max(1, -(-size // SHOWN))) for size in t.shape)
    with torch._C.DisableTorchFunction():
        some = t.detach()[every].clone(memory_format=torch.contiguous_format)
        return some.reshape(-1).view(torch.uint8)


def _topk(values: torch.Tensor, indices: torch.Tensor) -> Any:
    return torch.return_types.topk((values, indices))  # type: ignore[attr-defined]


def _not_negative(t: torch.Tensor) -> bool:
    if t.dtype is torch.bool:
        return True
    if t.device.type == "cpu":
        # inf times a ReLU's 0 is NaN
        return bool(((t.detach() >= 0) & t.detach().isfinite()).all())
    fine = ~(t.detach() < 0).any()
    torch._assert_async(fine, "accelerate: factors of pre-activations must not be negative")
    return True


@dataclass(frozen=True, eq=False)
class Product(Node):
    """Pre-activations of N tokens.

    Attributes:
        x: `[N, d]`, w: `[F, d]`, in the dtype of the product. leading: the shape before F.
        bias, scale: `[F]` or None. relu: whether the ReLU is taken. flat: `[N F]`, not `[..., F]`.
    """

    x: torch.Tensor
    w: torch.Tensor
    leading: torch.Size
    dtype: torch.dtype
    ledger: Ledger
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    relu: bool = False
    flat: bool = False
    # slots found once: above which floor, whether with a graph, and their pre-activations
    found: list[tuple[torch.Tensor, bool, SparseCodes]] = field(default_factory=list)
    # its tensors as they were when they came to it, and some of their bits
    before: Snapshot = field(default_factory=list)
    shown: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        pairs = zip(self.before, self.shown, strict=True)
        known_ones = {id(seen[0]): (seen, bits) for seen, bits in pairs}
        found = [known_ones.get(id(t)) or (snapshot([t])[0], _shown(t)) for t in self.tensors()]
        object.__setattr__(self, "before", [seen for seen, _ in found])
        object.__setattr__(self, "shown", [bits for _, bits in found])

    @property
    def f(self) -> int:
        return self.w.shape[0]

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        shape = torch.Size((*self.leading, self.f))
        return torch.Size((shape.numel(),)) if self.flat else shape

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.x.device

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.x, self.w, self.bias, self.scale) if t is not None]

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Product:
        given = iter(tensors)
        names = ("x", "w", "bias", "scale")
        if not unchanged(self.before):
            raise changed(self.ledger, "an operation", self.shape)
        new: dict[str, Any] = {n: next(given) for n in names if getattr(self, n) is not None}
        return replace(self, found=[], **new)

    def like(self, **changes: Any) -> Product:
        """Another function of pre-activations; of the same ones, what was found stays known."""
        if changes.keys() & {"x", "w", "bias"}:
            self._ask("an operation")
            changes["found"] = []
        return replace(self, **changes)

    def fresh(self) -> bool:
        """Nobody has written to its tensors, past their versions (`p.data *= 2`, numpy) either: the
        library's methods, of which it is a part, do not."""
        if not unchanged(self.before):
            return False
        if self.ledger.within.entered:
            return True
        pairs = zip(self.tensors(), self.shown, strict=True)
        return all(torch.equal(_shown(t), bits) for t, bits in pairs)

    def _ask(self, what: str) -> None:
        if not self.fresh():
            raise changed(self.ledger, what, self.shape)

    def reading(self, copies: Copies) -> Product:
        named = {n: t for n in ("w", "bias", "scale") if (t := getattr(self, n)) is not None}
        new: dict[str, Any] = {n: copy_of(t, copies) for n, t in named.items()}
        return replace(self, **new)

    @in_own_dtype
    def dense(self) -> torch.Tensor:
        if self.relu and not self.fresh():
            # of before, if codes were taken then
            return self.positive().dense()
        self._ask("an operation")
        h = self.x @ self.w.T
        if self.bias is not None:
            h = h + self.bias
        if self.scale is not None:
            h = h * self.scale
        if self.relu:
            h = h.relu()
        return h.to(self.dtype).reshape(self.shape)

    def operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        self._ask("a selection")
        return self.x, self.w, None if self.bias is None else self.bias.to(self.x.dtype)

    # ---- values at pairs

    def shaped(self, h: torch.Tensor, indices: torch.Tensor, *, relu: bool) -> torch.Tensor:
        """The values of pre-activations of pairs."""
        if relu:
            h = h.relu()
        h = h.to(self.dtype)
        if self.scale is not None:
            h = (h * gather_features(self.scale.to(self.dtype), indices)).to(self.dtype)
        return h

    @in_own_dtype
    def at(self, indices: torch.Tensor, row_offsets: torch.Tensor | None) -> torch.Tensor:
        """The values of given pairs, under autograd."""
        x, w, bias = self.operands()
        h = gather_dots(x, w, indices, row_offsets, gather_dot_op.resolve(None, x.device))
        if bias is not None:
            h = h + gather_features(bias, indices)
        return self.shaped(h, indices, relu=self.relu)

    def above(self, floor: torch.Tensor) -> SparseCodes:
        """Pre-activations above a floor, 0-dim or `[F]`, without scale and ReLU."""
        for before, graph, slots in self.found:
            if graph >= torch.is_grad_enabled() and torch.equal(before, floor):
                return slots
        known(not self.crowded(floor))
        slots = slots_above(*self.operands(), None, floor, wide=True)
        # a floor may be a parameter, or memory that is used again
        self.found[:] = [(floor.clone(), torch.is_grad_enabled(), slots)]
        return slots

    @torch.no_grad()
    def crowded(self, floor: torch.Tensor | float) -> bool:
        """Whether so many pairs pass that the dense tensor is smaller, judged by some tokens."""
        if self.ledger.crowded_from >= 1 or not self.x.shape[0]:
            return False
        self._ask("a selection")
        some = self.x[:: -(-self.x.shape[0] // SAMPLE)]
        h = some @ self.w.T
        if self.bias is not None:
            h = h + self.bias
        crowded = bool((h > floor).float().mean() > self.ledger.crowded_from)
        self.ledger.crowded += crowded
        return crowded

    def ragged(self, values: torch.Tensor, slots: SparseCodes) -> Codes:
        return Codes(
            values, slots.indices, slots.row_offsets, self.f, self.leading, self.ledger, self.flat
        )

    def positive(self) -> Codes:
        """ReLU'd ones as codes."""
        known(self.relu)
        slots = self.above(self.x.new_zeros((), dtype=wide(self.x.dtype)))
        return self.ragged(self.shaped(slots.values, slots.indices, relu=False), slots)

    # ---- the operations

    def op_add(self, other: Any, *, alpha: float = 1) -> Product:
        known(of_features(other, self.shape) and alpha == 1 and not self.relu and not self.flat)
        w, bias = self.w, self.bias
        if self.scale is not None:
            scale = self.scale.to(w.dtype)
            w = w * scale[:, None]
            bias = None if bias is None else bias * scale
        more = other.reshape(-1)
        dtype = torch.promote_types(self.dtype, more.dtype)
        return self.like(w=w, bias=more if bias is None else bias + more, scale=None, dtype=dtype)

    def op_rsub(self, other: Any) -> Product:
        known(of_features(other, self.shape) and self.scale is None)
        known(not self.relu and not self.flat)
        bias = other.reshape(-1) if self.bias is None else other.reshape(-1) - self.bias
        return self.like(x=-self.x, bias=bias, dtype=torch.promote_types(self.dtype, bias.dtype))

    def op_mul(self, other: Any) -> Node:
        if isinstance(other, Lazy):
            mask = other._node
            known(isinstance(mask, Above))
            assert isinstance(mask, Above)
            return mask.times(self)
        known(of_features(other, self.shape) and not self.flat and _not_negative(other))
        scale = other.reshape(-1)
        dtype = self.dtype
        if scale.dtype.is_floating_point:
            dtype = torch.promote_types(dtype, scale.dtype)
        scale = scale.to(dtype)
        return self.like(scale=scale if self.scale is None else self.scale * scale, dtype=dtype)

    def op_relu(self, inplace: bool = False) -> Product:
        known(not inplace)
        return self.like(relu=True)

    def op_flatten(self, start_dim: int = 0, end_dim: int = -1) -> Product:
        dims = len(self.shape)
        known(start_dim == 0 and not self.flat)
        if end_dim in (-1, dims - 1):
            return self.like(flat=True)
        known(end_dim in (-2, dims - 2))
        return self.like(leading=torch.Size((self.leading.numel(),)))

    def op_to(self, *args: Any, dtype: Any = None) -> Product:
        known(len(args) == (dtype is None))
        wanted = args[0] if args else dtype
        if isinstance(wanted, torch.Tensor):
            known(wanted.device == self.device)
            wanted = wanted.dtype
        known(wanted == self.dtype or (isinstance(wanted, torch.dtype) and wanted.itemsize > 2))
        known(wanted.is_floating_point)
        return self.like(dtype=wanted)

    def op_float(self) -> Product:
        return self.op_to(torch.float32)

    def op_getitem(self, index: Any) -> Any:
        if isinstance(index, torch.Tensor) and index.dtype is torch.bool:
            return self.positive().op_getitem(index)
        known(not self.flat)
        columns = columns_of(index, self.shape)
        parts = {
            n: t[columns]
            for n, t in (("w", self.w), ("bias", self.bias), ("scale", self.scale))
            if t is not None
        }
        return self.like(**parts)

    def op_zeros_like(self, **kwargs: Any) -> Zeros:
        known(not kwargs)
        return Zeros(self.leading, self.f, self.flat, self.dtype, self.device, self.ledger)

    @in_own_dtype
    def op_topk(self, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        known(largest and dim in (-1, len(self.shape) - 1))
        k = int(k)
        known(0 < k <= self.shape[-1])
        scale = None if self.scale is None else self.scale.to(self.x.dtype)
        x, w, bias = self.operands()
        if self.flat:
            codes, _ = batch_topk_total(x, w, bias, scale=scale, total=k, relu=self.relu)
        else:
            codes = topk_encode(x, w, bias, k=k, scale=scale, relu=self.relu)
        values = self.shaped(codes.values, codes.indices, relu=False)
        scores = values.detach() if sorted else None
        slots = Slots(codes.indices, codes.row_offsets, self.f, scores)
        if self.flat:
            assert codes.tokens is not None
            indices = codes.tokens * self.f + codes.indices
            if sorted:
                of_values = Ranked(values, slots, self.ledger, places=False)
                of_places = Ranked(indices, slots, self.ledger, places=True)
                return _topk(lazy(of_values), lazy(of_places))
        else:
            shape = (*self.leading, k)
            values = slots.sorted(values).reshape(shape)
            indices = slots.sorted(codes.indices).reshape(shape)
        return _topk(values, slots.remember(indices))

    def op_where1(self, condition: Any, other: Any) -> Only:
        known(of_features(condition, self.shape) and condition.dtype is torch.bool)
        known(isinstance(other, float) and other == -torch.inf and not self.flat)
        return Only(self, condition.reshape(-1))

    def op_gt(self, other: Any) -> Above:
        # of ReLU'd ones too, whose codes may be asked for next
        known(self.scale is None and not self.flat)
        if not isinstance(other, torch.Tensor):
            known(isinstance(other, int | float))
            other = torch.full((), other, dtype=wide(self.x.dtype), device=self.device)
        known(not isinstance(other, Lazy) and (other.dim() == 0 or of_features(other, self.shape)))
        return Above(self, other.detach().reshape(-1) if other.dim() else other.detach())

    def op_sum(self, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        scale = self.scale
        if dim in (-1, len(self.shape) - 1) and scale is not None and not keepdim and not dtype:
            live = scale.detach() != 0
            if int(live.sum()) < self.f:
                return self._sum_of(live.nonzero().squeeze(-1))
        return self.positive().op_sum(dim, keepdim, dtype=dtype)

    def _sum_of(self, live: torch.Tensor) -> torch.Tensor:
        """Sums over some features, of panels that are computed again for the gradient."""
        known(self.relu)
        total = self.x.new_zeros(len(self.x), dtype=self.dtype)
        for columns in live.split(max(1, PANEL // max(1, len(self.x)))):
            part = self.like(
                **{
                    n: t[columns]
                    for n, t in (("w", self.w), ("bias", self.bias), ("scale", self.scale))
                    if t is not None
                },
                leading=torch.Size((len(self.x),)),
            )
            total = total + checkpoint(_row_sums, part, *part.tensors(), use_reentrant=False)
        return total.reshape(self.leading)

    def op_matmul(self, other: Any) -> torch.Tensor:
        return self.positive().op_matmul(other)

    def op_linear(self, weight: Any, bias: Any = None) -> torch.Tensor:
        return self.positive().op_linear(weight, bias)

    def op_norm(
        self, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None
    ) -> torch.Tensor:
        return self.positive().op_norm(p, dim, keepdim, dtype)

    def op_linalg_norm(
        self, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
    ) -> torch.Tensor:
        return self.positive().op_norm(ord, dim, keepdim, dtype)

    def op_pow(self, exponent: Any) -> Codes:
        return self.positive().op_pow(exponent)

    def op_bool(self) -> Codes:
        return self.positive().op_bool()

    def op_eq(self, other: Any) -> Node:
        return self.positive().op_eq(other)

    def op_ne(self, other: Any) -> Codes:
        return self.positive().op_ne(other)


def _row_sums(part: Product, *tensors: torch.Tensor) -> torch.Tensor:
    return part.with_tensors(tensors).dense().sum(-1)


@dataclass(frozen=True, eq=False)
class Only(Node):
    """Pre-activations of some features, the others -inf."""

    product: Product
    live: torch.Tensor

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "device", "ledger"):
            return getattr(self.product, name)
        raise AttributeError(name)

    def tensors(self) -> list[torch.Tensor]:
        return self.product.tensors()

    def sources(self) -> list[torch.Tensor]:
        return [self.live]

    def fresh(self) -> bool:
        return self.product.fresh()

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Only:
        return replace(self, product=self.product.with_tensors(tensors))

    def reading(self, copies: Copies) -> Only:
        return replace(self, product=self.product.reading(copies))

    def dense(self) -> torch.Tensor:
        return torch.where(self.live, self.product.dense(), -torch.inf)

    def op_topk(self, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        columns = self.live.nonzero().squeeze(-1)
        k = int(k)
        known(largest and dim in (-1, len(self.shape) - 1) and 0 < k <= columns.numel())
        p = self.product
        chosen = {
            n: t.index_select(0, columns)
            for n, t in (("w", p.w), ("bias", p.bias), ("scale", p.scale))
            if t is not None
        }
        values, indices = p.like(**chosen).op_topk(k, dim, largest, sorted)
        slots = slots_of(indices)
        assert slots is not None
        slots = Slots(columns[slots.indices], None, self.shape[-1], slots.scores)
        return _topk(values, slots.remember(columns[indices]))


@dataclass(frozen=True, eq=False)
class Above(Node):
    """Where pre-activations are above a floor, 0-dim or `[F]`: a mask, in a dtype."""

    product: Product
    floor: torch.Tensor
    dtype: torch.dtype = torch.bool

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.product.shape

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.product.device

    @property
    def ledger(self) -> Ledger:  # type: ignore[override]
        return self.product.ledger

    def tensors(self) -> list[torch.Tensor]:
        # a comparison has no gradient
        return []

    def sources(self) -> list[torch.Tensor]:
        return [self.floor]

    def fresh(self) -> bool:
        return self.product.fresh()

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Above:
        return self

    def reading(self, copies: Copies) -> Above:
        return replace(
            self, product=self.product.reading(copies), floor=copy_of(self.floor, copies)
        )

    def dense(self) -> torch.Tensor:
        with torch.no_grad():
            return (self.product.dense() > self.floor).to(self.dtype)

    def times(self, values: Product) -> Codes:
        """`mask * values`: ragged codes."""
        known(self.dtype in (torch.bool, values.dtype) and values.leading == self.product.leading)
        known(not values.flat)
        floor = self.floor
        if self.product.relu:
            # a ReLU is above what is negative
            floor = torch.where(floor < 0, -torch.inf, floor)
        if values.relu and self.same(values):
            floor = floor.clamp_min(0)
        floor = floor.to(wide(values.x.dtype))
        if self.same(values):
            slots = values.above(floor)
            found = values.shaped(slots.values, slots.indices, relu=values.relu)
            return values.ragged(found, slots)
        with torch.no_grad():
            slots = self.product.above(floor)
        return values.ragged(values.at(slots.indices, slots.row_offsets), slots)

    def same(self, other: Product) -> bool:
        mine = self.product
        return mine.x is other.x and mine.w is other.w and mine.bias is other.bias

    def op_mul(self, other: Any) -> Codes:
        known(isinstance(other, Lazy) and isinstance(other._node, Product))
        return self.times(other._node)

    def op_to(self, dtype: Any) -> Above:
        known(isinstance(dtype, torch.dtype))
        return replace(self, dtype=dtype)

    def op_float(self) -> Above:
        return self.op_to(torch.float32)

    def op_type(self, dtype: Any) -> Above:
        return self.op_to(dtype)


def leave(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, ledger: Ledger) -> Product:
    """`x w^T + bias` in the dtype that it would have, under autocast too."""
    dtype = dtype_of_product(x, w) or torch.promote_types(x.dtype, w.dtype)
    ledger.calls += 1
    return Product(
        x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(dtype),
        w.to(dtype),
        x.shape[:-1],
        dtype,
        ledger,
        None if bias is None else bias.to(dtype),
    )
