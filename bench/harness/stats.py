# SPDX-License-Identifier: Apache-2.0
"""Medians with spread, and ratios with a bootstrap confidence interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def summary(times: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 of the rounds."""
    p20, p50, p80 = np.percentile(np.asarray(times), [20, 50, 80])
    return {"p20": float(p20), "p50": float(p50), "p80": float(p80)}


def ratio(baseline: Sequence[float], times: Sequence[float]) -> dict[str, float]:
    """How many times faster than the baseline: ratio of medians, with a bootstrap 95 % interval.

    Rounds are interleaved, so round i of both sides saw the same machine and rounds are resampled
    in pairs; sides with different numbers of rounds are resampled on their own.
    """
    a, b = np.asarray(baseline), np.asarray(times)
    rng = np.random.default_rng(0)
    pick_a = rng.integers(0, len(a), (RESAMPLES, len(a)))
    pick_b = pick_a if len(a) == len(b) else rng.integers(0, len(b), (RESAMPLES, len(b)))
    resampled = np.median(a[pick_a], axis=1) / np.median(b[pick_b], axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"ratio": float(np.median(a) / np.median(b)), "low": float(low), "high": float(high)}
