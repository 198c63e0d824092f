# SPDX-License-Identifier: Apache-2.0
"""The strongest edges or nodes of a circuit, and how sure that is."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from mikernels.circuits.selection import best, count, entries, entry_name, values_of
from mikernels.models.graph import Graph
from mikernels.values.intervals import Interval


class Ranked(NamedTuple):
    """One row of a ranking.

    Attributes:
        name: as `L3.h7 -> L5.h2.q`, or `L3.h7`.
        score: with the 2.5 and 97.5 percentiles of the replicates, NaN without.
        inclusion: in what part of the replicates it is among as many strongest, 0..1; NaN without.
    """

    name: str
    score: Interval
    inclusion: float


def rank(
    where: str,
    graph: Graph,
    level: str,
    scores: torch.Tensor,
    replicates: torch.Tensor,
    k: float,
    absolute: bool,
) -> list[Ranked]:
    """The k strongest, the first of them first. See `Circuit.ranking`."""
    values = values_of(where, graph, level, scores)
    keys = abs(values) if absolute else values
    n = count(where, "k", k, len(keys))
    chosen = np.flatnonzero(best(keys, n))
    chosen = chosen[np.argsort(-keys[chosen], kind="stable")]
    found = np.empty((len(replicates), n))
    times = np.zeros(n)
    for row, replicate in zip(found, replicates, strict=True):
        other = values_of(where, graph, level, replicate)
        row[:] = other[chosen]
        times += best(abs(other) if absolute else other, n)[chosen]
    if len(replicates):
        low, high = np.quantile(found, [0.025, 0.975], axis=0)
        times /= len(replicates)
    else:
        low = high = times = np.full(n, math.nan)
    places = entries(graph, level).nonzero()[torch.from_numpy(chosen)]
    rows = zip(values[chosen], low, high, times, strict=True)
    return [
        Ranked(entry_name(graph, place), Interval(*map(float, row[:3])), float(row[3]))
        for place, row in zip(places.tolist(), rows, strict=True)
    ]
