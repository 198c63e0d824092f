# SPDX-License-Identifier: Apache-2.0
"""Which features to show."""

from __future__ import annotations

from collections import Counter

import torch

from mikernels.evaluate.excerpts import BEFORE
from mikernels.evaluate.firing import Firing


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
