# SPDX-License-Identifier: Apache-2.0
"""Which components of a model act together: products of all pairs of named gradients.

    S[i, j] = sum over batches and positions of <g_i, g_j>

    cosines: S[i, j] / sqrt(S[i, i] S[j, j])

A stream of batches is added up as it is read. The memory is S, the batch at hand while the next is
made, and 16 MB in which the components of a part of a batch lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from mikernels._dispatch import FLOATS, accumulate_dtype
from mikernels.ops.pairs.pair_products import pairwise_products
from mikernels.ops.pairs.pairwise_topk import check_selection, strongest
from mikernels.values.interactions import Interactions

NAME = "compute_gradient_interactions"
# numbers that lie side by side at a time
CHUNK = 1 << 22
ENDED = object()

Components = Mapping[str, torch.Tensor]
Stream = Components | Iterable[Components]


@dataclass(frozen=True, eq=False)
class GradientInteractions:
    """Products of all pairs of named components.

    Attributes:
        names: n of them.
        scores: `[n, n]` float32 (float64 for float64), symmetric.
        batches: how many were added up.
        normalized: cosines.
    """

    names: tuple[str, ...]
    scores: torch.Tensor
    batches: int
    normalized: bool = False

    def __post_init__(self) -> None:
        expected = [len(self.names)] * 2
        if list(self.scores.shape) != expected:
            raise ValueError(
                f"GradientInteractions: scores must be {expected} for {len(self.names)} names, got "
                f"{list(self.scores.shape)}"
            )


@dataclass(frozen=True, eq=False)
class NamedInteractions(Interactions):
    """Interactions of named components: pair p is `names[rows[p]]` and `names[cols[p]]`."""

    names: tuple[str, ...]


def _batches(grads: Stream, activations: Stream | None) -> Iterator[list[tuple[str, Components]]]:
    """Each batch of grads, with that of activations."""
    streams: list[Iterable[Any]] = []
    for name, stream in (("grads", grads), ("activations", activations)):
        if isinstance(stream, Mapping):
            streams.append([stream])
        elif isinstance(stream, Iterable) and not isinstance(stream, torch.Tensor | str):
            streams.append(stream)
        elif name == "grads" or stream is not None:
            raise TypeError(
                f"{NAME}: {name} must be a mapping of names to tensors, or an iterable of such "
                f"mappings, got {type(stream).__name__}"
            )
    for number, batch in enumerate(zip_longest(*streams, fillvalue=ENDED)):
        if ENDED in batch:
            ended = "grads" if batch[0] is ENDED else "activations"
            raise ValueError(
                f"{NAME}: activations must have a batch for each of grads, got only {number} "
                f"batches of {ended}"
            )
        yield list(zip(("grads", "activations"), batch, strict=False))


def _names(what: str, batch: Components, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The names of the stream, which a batch must have."""
    if not isinstance(batch, Mapping) or not batch:
        raise TypeError(
            f"{NAME}: a batch of {what} must be a mapping of names to tensors, got "
            f"{'an empty one' if isinstance(batch, Mapping) else type(batch).__name__}"
        )
    if names is None:
        return tuple(batch)
    if batch.keys() != set(names):
        missing = [name for name in names if name not in batch]
        extra = [name for name in batch if name not in names]
        raise ValueError(
            f"{NAME}: {what} must have the names of the first batch of grads, got one without "
            f"{missing} and with {extra} besides"
        )
    return names


def _tensor(what: str, name: str, value: object) -> torch.Tensor:
    if isinstance(value, torch.Tensor) and value.dtype in FLOATS and value.dim() > 0:
        return value.detach()
    got = type(value).__name__
    if isinstance(value, torch.Tensor):
        got = f"{value.dtype} {list(value.shape)}"
    raise TypeError(f"{NAME}: {what}[{name!r}] must be a floating tensor [..., D], got {got}")


def _rows(
    what: str, batch: Components, names: tuple[str, ...], like: torch.Tensor, shape: list[int]
) -> list[torch.Tensor]:
    """Components of one shape, and of dtype and device of `like`, as `[T, D]` each."""
    rows = []
    for name in names:
        t = _tensor(what, name, batch[name])
        if list(t.shape) != shape:
            raise ValueError(
                f"{NAME}: {what}[{name!r}] must have the shape of the others, {shape}, got "
                f"{list(t.shape)}; give heads [..., H, D] names of their own with split_heads"
            )
        if t.dtype != like.dtype or t.device != like.device:
            raise ValueError(
                f"{NAME}: {what}[{name!r}] must be {like.dtype} on {like.device} as the first "
                f"one is, got {t.dtype} on {t.device}; convert or move it"
            )
        rows.append(t[None] if t.dim() == 1 else t.flatten(0, -2))
    return rows


def _add(total: torch.Tensor, sides: list[list[torch.Tensor]], impl: str | None) -> None:
    """Adds the products of a batch to `total`."""
    rows = sides[0]
    length, d = rows[0].shape
    step = min(length, max(1, CHUNK // max(1, len(rows) * d)))
    # gradient times activation is not rounded to 16 bits again
    dtype = rows[0].dtype if len(sides) == 1 else accumulate_dtype(rows[0].dtype)
    held = rows[0].new_empty(len(rows), step, d, dtype=dtype)
    for begin in range(0, length, max(1, step)):
        part = held[:, : min(step, length - begin)]
        for i, row in enumerate(rows):
            part[i].copy_(row[begin : begin + step])
            for factors in sides[1:]:
                part[i].mul_(factors[i][begin : begin + step])
        # positions are further coordinates of one long vector
        pairwise_products(part.flatten(1), out=total, impl=impl)


def _cosines(scores: torch.Tensor) -> torch.Tensor:
    lengths = scores.diagonal().double().sqrt()
    scale = lengths[:, None] * lengths
    cosines = (scores.double() / scale).masked_fill(scale == 0, 0).clamp(-1, 1)
    return cosines.to(scores.dtype)


@torch.no_grad()
def compute_gradient_interactions(
    grads: Stream,
    *,
    activations: Stream | None = None,
    normalize: bool = False,
    impl: str | None = None,
) -> GradientInteractions:
    """Inner products of all pairs of named gradients, summed over a stream of batches.

    Args:
        grads: name -> `[..., D]`, one shape and dtype, leading dimensions summed over; or an
            iterable of such mappings, a batch each, with the same names and D. Any strides.
            Heads `[..., H, D]` become components through `split_heads`, without a copy.
        activations: the same names and shapes: the components are then gradient times activation.
        normalize: cosines of the summed products; 0 for a component that is zero throughout.
        impl: None (best for the device), "cpp", "triton" or "reference".

    Returns:
        GradientInteractions: names in the order of the first batch. NaN and inf propagate to the
        pairs that they are part of. Not differentiable.

    Raises:
        TypeError, ValueError: for names that differ between batches, and other shapes or dtypes.
    """
    names: tuple[str, ...] | None = None
    like = total = None
    count = 0
    for batch in _batches(grads, activations):
        for what, mapping in batch:
            names = _names(what, mapping, names)
        assert names is not None
        first = _tensor("grads", names[0], batch[0][1][names[0]])
        if like is None or total is None:
            n = len(names)
            like = first.new_empty(0, first.shape[-1])
            total = first.new_zeros(n, n, dtype=accumulate_dtype(first.dtype))
        shape = [*first.shape[:-1], like.shape[-1]]
        sides = [_rows(what, mapping, names, like, shape) for what, mapping in batch]
        _add(total, sides, impl)
        count += 1
    if total is None or names is None:
        raise ValueError(f"{NAME}: grads must have at least one batch, got none")
    scores = _cosines(total) if normalize else total
    return GradientInteractions(names, scores, count, normalize)


def select_top_k(
    interactions: GradientInteractions, k: int = 10, *, by: str = "abs"
) -> NamedInteractions:
    """The k strongest pairs of different components, each once (row < column).

    Args:
        interactions: of compute_gradient_interactions.
        k: pairs to keep; all are returned if there are fewer.
        by: "abs" ranks by |score|, "value" by the score.

    Returns:
        NamedInteractions: strongest first, NaN before all; ties by row, then column.

    Raises:
        TypeError, ValueError: for another type, k or by.
    """
    if not isinstance(interactions, GradientInteractions):
        raise TypeError(
            f"select_top_k: interactions must be GradientInteractions, got "
            f"{type(interactions).__name__}; use pairwise_topk for tensors"
        )
    check_selection("select_top_k", k, by, None)
    scores = interactions.scores
    n = len(interactions.names)
    rows, cols = torch.triu_indices(n, n, 1, device=scores.device)
    values, rows, cols = strongest(scores[rows, cols], rows, cols, k, by)
    return NamedInteractions(values, rows, cols, (n, n), interactions.names)
