# SPDX-License-Identifier: Apache-2.0
"""Which features to show, and the inputs that activate them most."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from mikernels.activations import Rows
from mikernels.nn import SAE
from mikernels.values.codes import SparseCodes

# tokens shown on either side of the strongest one
BEFORE, AFTER = 14, 8


@dataclass(frozen=True)
class Firing:
    """Where and how strongly every feature fires.

    Attributes:
        offsets, order: `SparseCodes.by_feature()`; rows, values: of every slot.
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


@torch.no_grad()
def encode_all(sae: SAE, x: torch.Tensor, batch: int = 4096) -> Firing:
    """Encode all rows of x `[n, d]`.

    Raises:
        ValueError: a code is not finite, which no comparison below would count.
    """
    parts = [sae.encode(x[start : start + batch]) for start in range(0, x.shape[0], batch)]
    values = torch.cat([part.values for part in parts])
    if bad := int((~values.isfinite()).any(-1).sum()):
        raise ValueError(
            f"encode_all: x must give finite codes, got NaN or inf in {bad:,} of {x.shape[0]:,} "
            f"rows; drop those rows"
        )
    indices = torch.cat([part.indices for part in parts])
    codes = SparseCodes(values, indices, sae.config.n_features)
    offsets, order = codes.by_feature()
    maxima = torch.zeros(sae.config.n_features, dtype=torch.float32).scatter_reduce_(
        0, indices.reshape(-1), values.reshape(-1).float(), "amax"
    )
    rows = torch.arange(x.shape[0]).repeat_interleave(codes.k)
    return Firing(offsets, order, rows, values.reshape(-1), codes.fired(), maxima, x.shape[0])


def choose_features(
    firing: Firing,
    labels: torch.Tensor,
    positions: torch.Tensor | None = None,
    *,
    n: int = 20,
    per_label: int = 1,
    shares: tuple[float, float] = (1e-3, 2e-2),
) -> list[int]:
    """Features worth looking at: neither rare nor ubiquitous, strong, and about different things.

    Among features that fire on a share of the rows within `shares`, those whose firing is most
    concentrated in strong activations come first, and at most `per_label` of them peak mostly on
    one label. Features of the beginning of a context are left out: there is no context to show.

    Args:
        firing: of all rows.
        labels: `[n_rows]` int, what a row is (token id, digit).
        positions: `[n_rows]` in its context, or None.
        n: how many at most.
    """
    least, most = (share * firing.n_rows for share in shares)
    candidates = ((firing.counts >= least) & (firing.counts <= most)).nonzero().squeeze(-1)
    scores = []
    for feature in candidates.tolist():
        _, values = firing.of(feature)
        top = values[: max(8, len(values) // 5)]
        # a strong top fifth that carries the feature: readable, and not a lucky maximum
        scores.append(float(top.mean() * (top.sum() / values.sum()).sqrt()))
    ranked = candidates[torch.tensor(scores, dtype=torch.float32).argsort(descending=True)].tolist()
    chosen: list[int] = []
    seen: Counter[int] = Counter()
    for feature in ranked:
        rows = firing.of(feature)[0][:12]
        if positions is not None and positions[rows].median() < BEFORE:
            continue
        label = Counter(labels[rows].tolist()).most_common(1)[0][0]
        if seen[label] < per_label:
            seen[label] += 1
            chosen.append(feature)
        if len(chosen) == n:
            break
    return chosen


def token_card(
    firing: Firing, feature: int, rows: Rows, pieces: dict[str, str], n: int = 6
) -> dict[str, Any]:
    """A feature's strongest tokens in context, for the report.

    Returns a dict of plain values: number, density, maximum, histogram (20 bins of the activations
    above 0), tokens ((text, share of the activation mass) of the most activating token types) and
    examples, each a list of (text, value, is_peak).
    """
    where, values = firing.of(feature)
    strength = torch.zeros(firing.n_rows, dtype=torch.float32)
    strength[where] = values.float()
    examples: list[list[tuple[str, float, bool]]] = []
    covered: set[int] = set()
    contexts: set[tuple[str, ...]] = set()
    for row in where.tolist():
        if row in covered:
            continue
        low, high = max(0, row - BEFORE), min(firing.n_rows, row + AFTER + 1)
        window = rows["windows"][row]
        inside = [r for r in range(low, high) if rows["windows"][r] == window]
        texts = [pieces.get(str(int(rows["token_ids"][r])), "\ufffd") for r in inside]
        # documentation repeats itself: one example of a phrase is enough
        near = tuple(texts[max(0, row - inside[0] - 4) : row - inside[0] + 1])
        if near in contexts:
            continue
        contexts.add(near)
        covered.update(inside)
        examples.append(
            [(t, float(strength[r]), r == row) for t, r in zip(texts, inside, strict=True)]
        )
        if len(examples) == n:
            break
    mass: Counter[str] = Counter()
    for token, value in zip(rows["token_ids"][where].tolist(), values.tolist(), strict=True):
        mass[pieces.get(str(token), "\ufffd")] += value
    total = float(values.sum())
    maximum = float(values[0])
    histogram = torch.histc(values.float(), bins=20, min=0, max=maximum).tolist()
    return {
        "number": feature,
        "density": float(firing.counts[feature]) / firing.n_rows,
        "count": int(firing.counts[feature]),
        "maximum": maximum,
        "histogram": histogram,
        "tokens": [(text, value / total) for text, value in mass.most_common(6)],
        "examples": examples,
    }
