# SPDX-License-Identifier: Apache-2.0
"""The strongest pairs by definition, and operands that are hard for a screen or a selection."""

from __future__ import annotations

import numpy as np
import torch
from oracle import randn, unchanged

from mikernels import pairwise_topk
from mikernels._dispatch import accumulate_dtype

NAN, INF = float("nan"), float("inf")


def exact_scores(a, b=None):
    """[n, m]: fp64 sums, rounded once to fp32 (unless fp64)."""
    wide = [t.double() if t.dim() == 3 else t.double()[None] for t in (a, a if b is None else b)]
    return torch.einsum("bid,bjd->ij", *wide).to(accumulate_dtype(a.dtype))


def best_pairs(scores, k, by="abs", upper=False, min_value=None):
    """The definition: NaN first, then the strongest, then the lowest row, then column."""
    scores = scores.numpy()
    strength = np.abs(scores) if by == "abs" else scores
    allowed = np.ones(scores.shape, bool)
    if min_value is not None:
        with np.errstate(over="ignore"):
            allowed = ~(strength < strength.dtype.type(min_value))
    rows, cols = np.nonzero(np.triu(allowed, 1) if upper else allowed)
    found = strength[rows, cols]
    nan = np.isnan(found)
    order = np.lexsort((cols, rows, -np.where(nan, 0, found), ~nan))[:k]
    return [torch.from_numpy(t[order]) for t in (scores[rows, cols], rows, cols)]


def among(scores, allowed, k, by="abs", min_value=None):
    """best_pairs of the pairs that are allowed: they rank above the others, whatever those hold."""
    rows, cols = allowed.nonzero(as_tuple=True)
    values, _, at = best_pairs(scores[rows, cols][None], k, by, min_value=min_value)
    return values, rows[at], cols[at]


def assert_found(found, expected, shape):
    values, rows, cols = expected
    assert found.shape == shape and found.values.dtype == values.dtype
    assert torch.equal(found.rows, rows) and torch.equal(found.cols, cols)
    torch.testing.assert_close(found.values, values, rtol=0, atol=0, equal_nan=True)


def check(impl, a, b=None, **options):
    with unchanged(a, b):
        found = pairwise_topk(a, b, **options, impl=impl)
    scores = exact_scores(a, b)
    assert_found(found, best_pairs(scores, **options), scores.shape)
    return found


def every_way(impl, a, b, *ks):
    for k in ks:
        for other in (b, None):
            for by in ("abs", "value"):
                check(impl, a, other, k=k, by=by)
                check(impl, a, other, k=k, by=by, upper=True)


def ascending(a, b):
    # each pair is stronger than those before it
    a[:], b[:] = 0, 0
    a[:, 0], b[:, 0] = torch.arange(len(a)) + 1, 1 + torch.arange(len(b)) / 256


SPECIAL = {
    "zeros": lambda a, b: a.zero_(),
    "constant": lambda a, b: (a.fill_(1.5), b.fill_(-0.5)),
    "copies of three rows": lambda a, b: a.copy_(a[torch.arange(len(a)) % 3]),
    "ascending": ascending,
    "descending": lambda a, b: (ascending(a, b), a.copy_(a.flip(0)), b.copy_(b.flip(0))),
    "one strong column": lambda a, b: b[7].mul_(100),
    "one strong row": lambda a, b: a[-1].mul_(-100),
    "orthogonal": lambda a, b: (a[:, ::2].zero_(), b[:, 1::2].zero_()),
    "a nan": lambda a, b: a[3, 2].fill_(NAN),
    "nan in the last place": lambda a, b: b[-1, -1].fill_(NAN),
    "nan everywhere": lambda a, b: b.fill_(NAN),
    "more nan than k": lambda a, b: b[::3].fill_(NAN),
    "inf": lambda a, b: a[5, 1].fill_(INF),
    "inf of both signs": lambda a, b: (a[5].fill_(INF), b[9, 3].fill_(-INF)),
    "-inf everywhere": lambda a, b: (a.fill_(-INF), b.fill_(2)),
    "inf meets zero": lambda a, b: (a[2].fill_(INF), b[4].zero_()),
}


POWERS = {
    "1e-30": lambda n: torch.full((n,), 1e-30),
    "1e30": lambda n: torch.full((n,), 1e30),
    "from 1e-38 to 1e38": lambda n: 10.0 ** torch.linspace(-38, 37.5, n),
    "denormals": lambda n: torch.full((n,), 1e-42),
    "a few among denormals": lambda n: torch.where(torch.arange(n) % 9 == 4, 1e-3, 1e-41),
    "one row of 1e25": lambda n: torch.where(torch.arange(n) == 4, 1e25, 1.0),
}


def near_ties(relative):
    base = randn(1, 48)
    return [base * (1 + relative * randn(70, 48, seed=seed)) for seed in (1, 2)]


def _outlier_columns():
    a, b = randn(700, 300), randn(610, 300, seed=1)
    a[:, [3, 40]] *= 1e3
    b[:, 40] *= 1e-3
    b[:, 7] = 0
    return a, b, {"k": 40}


def _near_ties_among_the_strongest():
    a, b = randn(700, 300), randn(610, 300, seed=1)
    b[::10] = 3 * a[:61] * (1 + 1e-6 * randn(61, 300, seed=2))
    a[100:161] = a[:61] * (1 + 1e-6 * randn(61, 300, seed=3))
    return a, b, {"k": 40}


def _special():
    a, b = randn(700, 300), randn(610, 300, seed=1)
    a[5], a[6, 3], b[600, 4], b[7] = 0, INF, NAN, 1e30
    return a, b, {"k": 2000}


# rows enough on both sides for the coarse screen, in 8 bits
MANY = {
    "random": lambda: (randn(700, 300), randn(610, 300, seed=1), {"k": 40}),
    "by value": lambda: (randn(700, 300), randn(610, 300, seed=1), {"k": 7, "by": "value"}),
    "symmetric": lambda: (randn(700, 300), None, {"k": 40, "upper": True}),
    "outlier columns": _outlier_columns,
    "near ties among the strongest": _near_ties_among_the_strongest,
    "special values": _special,
}
