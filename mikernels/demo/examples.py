# SPDX-License-Identifier: Apache-2.0
"""Which features to show, and the inputs that activate them most."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from mikernels.activations import Rows
from mikernels.evaluate.firing import BEFORE, Excerpts, Firing


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
    strength = firing.strength(feature)
    excerpts = Excerpts(rows, pieces)
    examples: list[list[tuple[str, float, bool]]] = [
        [
            (text, float(strength[r]), r == row)
            for text, r in zip(excerpts.texts(inside), inside, strict=True)
        ]
        for row, inside in excerpts.strongest(where.tolist(), n, set())
    ]
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
