# SPDX-License-Identifier: Apache-2.0
"""Cohen's kappa: how much more two people agree than by luck.

Of n things that both put into one of c categories, with o_ij the share that one put into i and the
other into j, and e_ij the product of the shares of i and j alone,

    kappa = 1 - (sum of w_ij o_ij) / (sum of w_ij e_ij)

where w_ij is 1 off the diagonal (Cohen 1960), or (i - j)^2 for ratings, whose near misses are
near (Cohen 1968). It is not defined (NaN) where both use one category only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mikernels.values.intervals import Interval, bootstrap


def kappa(counts: np.ndarray, weighted: bool = False) -> np.ndarray:
    """`[...]` of `[..., c, c]` counts of pairs of categories."""
    i, j = np.indices(counts.shape[-2:])
    weights = (i - j) ** 2.0 if weighted else (i != j) * 1.0
    total = counts.sum((-2, -1))
    apart = counts.sum(-1)[..., :, None] * counts.sum(-2)[..., None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = (weights * counts).sum((-2, -1)) / total
        expected = (weights * apart).sum((-2, -1)) / total**2
        return np.where(expected > 0, 1 - observed / expected, np.nan)


def agreement(
    pairs: Sequence[Sequence[tuple[int, int]]], categories: int, weighted: bool = False
) -> Interval:
    """Kappa of all pairs of categories (0..), with the bootstrap's interval over items.

    Args:
        pairs: of each item. Answers about one item lean on each other; items are drawn whole.
    """
    units = np.zeros((len(pairs), categories, categories))
    for unit, found in zip(units, pairs, strict=True):
        for one, other in found:
            unit[one, other] += 1

    def statistic(drawn: np.ndarray) -> np.ndarray:
        return kappa(drawn.sum(-2).reshape(*drawn.shape[:-2], categories, categories), weighted)

    return bootstrap(statistic, units.reshape(len(pairs), -1))
