# SPDX-License-Identifier: Apache-2.0
"""Means over seeds with their intervals, and who is better by the seeds' differences.

A seed decides the batches and the initial weights of everyone, so contenders are compared seed by
seed: Student's t interval of the differences, 95 %. A contender is "not worse" when that interval
lies above a deficit of 1 % of the other's mean.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

# figure -> whether more is better
BETTER = {
    "fvu": False,
    "ce_recovered": True,
    "f1": True,
    "precision": True,
    "recall": True,
    "mcc": True,
    "uniqueness": True,
    "dead": False,
    "cpu_ms": False,
}
MARGIN = 0.01


class Interval(NamedTuple):
    """A mean and its 95 % interval; infinite for one value."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Student's t over the values, which are taken as independent."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, -math.inf, math.inf)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = _t(n - 1) * spread / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def _t(degrees: int) -> float:
    stats = importlib.import_module("scipy.stats")
    return float(stats.t.ppf(0.975, degrees))


def verdict(name: str, ours: Sequence[float], theirs: Sequence[float]) -> tuple[Interval, str]:
    """Of `ours - theirs` seed by seed, and "better", "not worse", "worse" or "open"."""
    difference = interval([a - b for a, b in zip(ours, theirs, strict=True)])
    sign = 1 if BETTER[name] else -1
    least, most = sorted((sign * difference.low, sign * difference.high))
    margin = MARGIN * abs(interval(theirs).mean)
    if least > 0:
        return difference, "better"
    if most < 0:
        return difference, "worse"
    return difference, "not worse" if least >= -margin else "open"


def share_of_time(curve: list[dict[str, Any]], other: list[dict[str, Any]]) -> float | None:
    """CPU seconds after which `curve` is first at the other's last FVU, over the other's seconds.

    None if it never is. Between two points the later one counts.
    """
    goal = other[-1]["fvu"]
    reached = next((point["cpu"] for point in curve if point["fvu"] <= goal), None)
    return None if reached is None else reached / other[-1]["cpu"]


def compare(runs: list[dict[str, Any]], ours: str, theirs: str) -> dict[str, Any]:
    """Everything about two contenders, from the runs of seeds that both have."""
    mine = {run["seed"]: run for run in runs if run["contender"] == ours}
    other = {run["seed"]: run for run in runs if run["contender"] == theirs}
    seeds = sorted(mine.keys() & other.keys())
    found: dict[str, Any] = {}
    for name in BETTER:
        a = [mine[s]["figures"][name] for s in seeds if name in mine[s]["figures"]]
        b = [other[s]["figures"][name] for s in seeds if name in other[s]["figures"]]
        if a and len(a) == len(b):
            difference, word = verdict(name, a, b)
            found[name] = {"difference": list(difference), "verdict": word}
    cpu = interval([mine[s]["figures"]["cpu_s"] / other[s]["figures"]["cpu_s"] for s in seeds])
    shares = [share_of_time(mine[s]["curve"], other[s]["curve"]) for s in seeds]
    reached = [share for share in shares if share is not None]
    return {
        "ours": ours,
        "theirs": theirs,
        "seeds": seeds,
        "figures": found,
        "cpu_share": list(cpu),
        "share_to_their_fvu": list(interval(reached)) if len(reached) == len(shares) else None,
    }
