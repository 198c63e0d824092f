# SPDX-License-Identifier: Apache-2.0
"""Stability: every measure as its definition says, written out with sets and scipy."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from circuit_cases import circuit
from scipy.stats import spearmanr

from mikernels.circuits import Stability, stability
from mikernels.models.graph import Graph, Layer

GRAPH = Graph("T", 4, (Layer(4, 2), Layer(3, 3, parallel=True)))


def finds(level, n, whole, seed=0):
    """Scores and n more like them, with ties or without; entries that are no edges are never 0."""
    draw = torch.Generator().manual_seed(seed)
    shape = GRAPH.allowed().shape if level == "edge" else GRAPH.allowed().shape[:1]
    scores = torch.randn(shape, generator=draw)
    others = scores + 0.7 * torch.randn(n, *shape, generator=draw)
    return (scores.round(), others.round()) if whole else (scores, others)


def listed(level, one):
    return one[GRAPH.allowed()].double().numpy() if level == "edge" else one.double().numpy()


def strongest(keys, k):
    return set(sorted(range(len(keys)), key=lambda i: (-keys[i], i))[:k])


@pytest.mark.parametrize("level", ["edge", "node"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("absolute", [True, False])
def test_measures(level, whole, absolute, monkeypatch):
    # a few bytes of bits at a time
    monkeypatch.setattr(sys.modules[Stability.__module__], "CHUNK", 200)
    scores, others = finds(level, 11, whole)
    full, found = listed(level, scores), [listed(level, other) for other in others]
    key = np.abs if absolute else np.asarray
    k = 5
    top, tops = strongest(key(full), k), [strongest(key(one), k) for one in found]
    either = [sorted(top | own) for own in tops]
    expected = {
        "jaccard": [len(top & own) / len(top | own) for own in tops],
        "pairwise": [len(a & b) / len(a | b) for a, b in itertools.combinations(tops, 2)],
        "spearman": [spearmanr(key(full), key(one))[0] for one in found],
        "spearman_top": [
            spearmanr(key(full)[at], key(one)[at])[0] for at, one in zip(either, found, strict=True)
        ],
        "sign_flips": [np.mean([full[i] * one[i] < 0 for i in top]) for one in found],
    }
    result = stability(circuit(GRAPH, scores, level, others), k, absolute)
    for name, values in expected.items():
        interval = (np.mean(values), *np.quantile(values, [0.025, 0.975]))
        assert getattr(result, name) == pytest.approx(interval, abs=1e-12, nan_ok=True), name
    times = listed(level, result.inclusion)
    assert times.tolist() == [sum(i in own for own in tops) / 11 for i in range(len(full))]
    assert result.counts.sum() == 11 * k
    for at_least in (1 / 11, 4 / 11, 1):
        core = result.consensus(at_least)
        assert listed(level, core.mask.float()).tolist() == (times >= at_least).tolist()
        assert core.mask.sum() == (times >= at_least).sum() and core.how == "consensus"


def test_several_circuits_are_compared_with_their_mean():
    _, others = finds("edge", 4, False)
    several = stability([circuit(GRAPH, other) for other in others], 0.2)
    one = stability(circuit(GRAPH, others.double().mean(0), replicates=others), 0.2)
    assert several.k == int(0.2 * GRAPH.n_edges) == one.k
    for name in ("pairwise", "spearman", "spearman_top", "jaccard", "sign_flips"):
        assert getattr(several, name) == pytest.approx(getattr(one, name), abs=1e-6)
    assert torch.equal(several.counts, one.counts)
    same = stability([circuit(GRAPH, others[0])] * 3, 6)
    assert same.jaccard == same.pairwise == same.spearman == (1, 1, 1) and same.sign_flips.high == 0
    assert str(same).startswith(f"top 6 of {GRAPH.n_edges} edges, found 3 times (circuits by eap)")
    assert "sign flips in the top 6" in str(same)
    # nothing to rank
    flat = stability([circuit(GRAPH, torch.zeros(GRAPH.n_edges))] * 2, 1)
    assert math.isnan(flat.spearman.value) and flat.pairwise.value == 1


def test_errors():
    scores, others = finds("edge", 2, False)
    one = circuit(GRAPH, scores, replicates=others)
    nodes = circuit(GRAPH, scores[:, 0], "node")
    broken = others.clone()
    broken[1, 0, 0] = math.inf
    for call, kind, message in (
        (lambda: stability(circuit(GRAPH, scores), 3), ValueError, "2 replicates or more, got 0"),
        (
            lambda: stability([one], 3),
            TypeError,
            r"must be a Circuit, or several, got \['Circuit'\]",
        ),
        (lambda: stability([one, scores], 3), TypeError, r"\['Circuit', 'Tensor'\]"),
        (lambda: stability([one, nodes], 3), ValueError, "of one model and level, got nodes of T"),
        (lambda: stability(one, 0), ValueError, "k must be an int 1.."),
        (lambda: stability(one, 0.001), ValueError, r"got 0 \(0.001 of"),
        (
            lambda: stability(circuit(GRAPH, scores, replicates=broken), 3),
            ValueError,
            r"scores must be finite, got inf for input -> L0.h0.q \(1 of",
        ),
        (
            lambda: stability(one, 3).consensus(0),
            ValueError,
            r"at_least must be in \(0, 1\], got 0",
        ),
    ):
        with pytest.raises(kind, match=message):
            call()
