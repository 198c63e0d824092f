# SPDX-License-Identifier: Apache-2.0
"""Where features fire, and the text around it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mikernels.activations import Rows
from mikernels.nn import SAE

# tokens shown on either side of the strongest one
BEFORE, AFTER = 14, 8


@dataclass(frozen=True)
class Firing:
    """Where and how strongly every feature fires.

    Attributes:
        offsets `[F + 1]`, order: the slots of feature f, by row, are
            `order[offsets[f]:offsets[f + 1]]`; rows, values: of every slot.
        counts: `[F]` rows on which each feature is active. maxima: `[F]` largest values.
        n_rows: rows encoded.
    """

    offsets: torch.Tensor
    order: torch.Tensor
    rows: torch.Tensor
    values: torch.Tensor
    counts: torch.Tensor
    maxima: torch.Tensor
    n_rows: int

    def of(self, feature: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows and values of a feature's activations, strongest first."""
        slots = self.order[self.offsets[feature] : self.offsets[feature + 1]]
        values = self.values[slots]
        kept = values > 0
        values, ranks = values[kept].sort(descending=True)
        return self.rows[slots[kept]][ranks], values

    def strength(self, feature: int) -> torch.Tensor:
        """`[n_rows]` float32: a feature's activation on every row."""
        where, values = self.of(feature)
        found = torch.zeros(self.n_rows, dtype=torch.float32)
        found[where] = values.float()
        return found


@torch.no_grad()
def encode_all(sae: SAE, x: torch.Tensor, batch: int = 4096) -> Firing:
    """Encode all rows of x `[n, d]`, by any variant of SAE.

    Raises:
        ValueError: a code is not finite, which no comparison below would count.
    """
    slots: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for start in range(0, x.shape[0], batch):
        codes = sae.encode(x[start : start + batch])
        values, indices = codes.flat()
        tokens = codes.tokens
        if tokens is None:
            tokens = torch.arange(len(codes), device=values.device).repeat_interleave(codes.k)
        slots.append((tokens.cpu() + start, values.reshape(-1).cpu(), indices.reshape(-1).cpu()))
    rows, values, indices = (torch.cat(parts) for parts in zip(*slots, strict=True))
    if bad := len(rows[~values.isfinite()].unique()):
        raise ValueError(
            f"encode_all: x must give finite codes, got NaN or inf in {bad:,} of {x.shape[0]:,} "
            f"rows; drop those rows"
        )
    # of all layers, where there are several
    features = codes.n_features
    offsets = torch.zeros(features + 1, dtype=torch.int64)
    offsets[1:] = indices.bincount(minlength=features).cumsum(0)
    counts = indices[values != 0].bincount(minlength=features)
    maxima = torch.zeros(features, dtype=torch.float32)
    maxima.scatter_reduce_(0, indices, values.float(), "amax")
    order = indices.argsort(stable=True)
    return Firing(offsets, order, rows, values, counts, maxima, x.shape[0])


class Excerpts:
    """Excerpts of text around a row: BEFORE and AFTER tokens of the same window.

    Args:
        rows: `token_ids` and `windows`, `[n]`, in reading order.
        pieces: the text of every token id, by the id as text.
    """

    def __init__(self, rows: Rows, pieces: dict[str, str]):
        self._windows: list[int] = rows["windows"].tolist()
        self._pieces = [pieces.get(str(i), "\ufffd") for i in rows["token_ids"].tolist()]

    def around(self, row: int) -> list[int]:
        """The rows of an excerpt."""
        low, high = max(0, row - BEFORE), min(len(self._windows), row + AFTER + 1)
        return [r for r in range(low, high) if self._windows[r] == self._windows[row]]

    def texts(self, inside: Iterable[int]) -> list[str]:
        """Of each row its token."""
        return [self._pieces[r] for r in inside]

    def strongest(
        self, where: Iterable[int], n: int, seen: set[tuple[str, ...]]
    ) -> list[tuple[int, list[int]]]:
        """The first n of these rows, each with its excerpt, which share no row.

        Args:
            seen: phrases (a token and the four before it) that are not shown again: texts repeat
                themselves. Those of what is returned are added.
        """
        found: list[tuple[int, list[int]]] = []
        covered: set[int] = set()
        for row in where:
            if row in covered:
                continue
            inside = self.around(row)
            phrase = tuple(self.texts(r for r in inside if row - 4 <= r <= row))
            if phrase in seen:
                continue
            seen.add(phrase)
            covered.update(inside)
            found.append((row, inside))
            if len(found) == n:
                break
        return found
