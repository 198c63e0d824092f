# SPDX-License-Identifier: Apache-2.0
"""Chosen edges: against all subsets, a slow greedy, another programme, and patched runs by hand."""

import functools
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from circuit_cases import circuit
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

from mikernels.circuits import Circuit, programme
from mikernels.circuits.selection import on_paths
from mikernels.models.graph import Graph, Layer
from mikernels.tensor_files import write_tensors

# 11, 12, 10 and 13 edges: every subset can be looked at
SMALL = (
    Graph("T", 4, (Layer(2, 1),)),
    Graph("T", 4, (Layer(1, 1, mlp=False), Layer(1, 1, mlp=False))),
    Graph("T", 4, (Layer(2, 2, parallel=True),)),
    Graph("T", 4, (Layer(4, 2, mlp=False),)),
)
# heads in groups, a block without MLP, one that is parallel
MIXED = Graph("T", 4, (Layer(4, 2), Layer(2, 2, mlp=False), Layer(3, 1, parallel=True)))


def edges_of(graph):
    """(writer, names of the nodes that the reader is of) of each edge, from the names alone."""
    found = []
    for w, r in graph.allowed().nonzero().tolist():
        reader = graph.readers[r]
        nodes = [reader.removesuffix(".q").removesuffix(".k").removesuffix(".v")]
        if match := re.fullmatch(r"L(\d+)\.kv(\d+)\.[kv]", reader):
            layer, group = map(int, match.groups())
            each = graph.layers[layer].heads // graph.layers[layer].groups
            nodes = [f"L{layer}.h{group * each + i}" for i in range(each)]
        found.append((graph.writers[w], nodes))
    return found


def walked(graph, mask):
    """The edges on paths, by walking all of them from each edge on."""
    edges = edges_of(graph)
    kept = [edge for edge, here in zip(edges, mask, strict=True) if here]

    @functools.cache
    def ends(node):
        return node == "logits" or any(ends(n) for w, nodes in kept if w == node for n in nodes)

    @functools.cache
    def starts(node):
        return node == "input" or any(starts(w) for w, nodes in kept if node in nodes)

    found = [here and starts(w) and any(map(ends, nodes))
             for here, (w, nodes) in zip(mask, edges, strict=True)]  # fmt: skip
    return np.array(found)


@functools.cache
def connected(graph):
    """All subsets of which every edge lies on a path, bool `[n, edges]`."""
    subsets = np.array(list(itertools.product([False, True], repeat=graph.n_edges)))
    return np.array([mask for mask in subsets if (walked(graph, mask) == mask).all()])


def grown(graph, keys, n):
    """The best edge into a node that is inside, n times."""
    edges, inside, chosen = edges_of(graph), {"logits"}, []
    for _ in range(n):
        open_ = [i for i, (_, nodes) in enumerate(edges) if i not in chosen and inside & {*nodes}]
        chosen.append(max(open_, key=lambda i: (keys[i], -i)))
        inside.add(edges[chosen[-1]][0])
    return sorted(chosen)


def patched(graph, keep, seed=0):
    """The logits of a model of random maps, whose readers see what is kept of the clean run."""
    rng = np.random.default_rng(seed)
    w_in, w_out, row = ({name: rng.standard_normal((4, 4)) for name in names}
                        for names in (graph.readers, graph.writers, graph.writers))  # fmt: skip
    inputs = rng.standard_normal((2, 4))

    def run(other):
        start = inputs[0 if other is None else 1]
        wrote, read, feeds = (
            {"input": start},
            {},
            dict(zip(graph.readers, graph.feeds, strict=True)),
        )
        writers = list(graph.writers)
        for r, reader in enumerate(graph.readers):
            before = writers[: graph.prefix[r]]
            if other is None:
                read[reader] = sum(wrote[w] for w in before)
            else:
                read[reader] = other[1][reader] + sum(
                    (wrote[w] - other[0][w] for w in before if keep[writers.index(w), r]),
                    np.zeros(4),
                )
            for node in (writers[i] for i in feeds[reader]):
                parts = [name for name, made in feeds.items() if writers.index(node) in made]
                if all(name in read for name in parts):
                    mixed = np.prod([w_in[name] @ read[name] for name in parts], axis=0)
                    wrote[node] = w_out[node] @ np.tanh(mixed + row[node][0])
        return wrote, read

    return run(run(None))[1]["logits"]


def draw_scores(draw, n, whole):
    """With many ties, or without."""
    one = st.integers(-2, 2) if whole else st.floats(-4, 4, width=32)
    return np.array(draw(st.lists(one, min_size=n, max_size=n)), np.float32)


@given(st.data(), st.sampled_from(SMALL), st.booleans(), st.booleans())
@settings(max_examples=60)
def test_the_programme_finds_the_best_of_all_subsets(data, graph, absolute, whole):
    scores = draw_scores(data.draw, graph.n_edges, whole)
    n = data.draw(st.integers(0, graph.n_edges))
    found = circuit(graph, scores).select(n, "milp", absolute)
    keys = (abs(scores) if absolute else scores).astype(np.float64)
    subsets = connected(graph)
    totals = subsets[subsets.sum(1) == n] @ keys
    mask = found.mask[graph.allowed()].numpy()
    assert len(found) == n and (walked(graph, mask) == mask).all()
    assert found.total == keys[mask].sum() and found.gap == 0
    assert math.isclose(found.total, totals.max(), abs_tol=1e-8 * max(1.0, abs(keys).max()))


@given(st.data(), st.booleans(), st.booleans())
@settings(max_examples=20)
def test_top_and_greedy(data, absolute, whole):
    graph, n_edges = MIXED, MIXED.n_edges
    scores = draw_scores(data.draw, n_edges, whole)
    n = data.draw(st.integers(0, n_edges))
    keys = abs(scores) if absolute else scores
    one, there = circuit(graph, scores), graph.allowed()
    order = sorted(range(n_edges), key=lambda i: (-keys[i], i))
    top, greedy = one.select(n, "top", absolute), one.select(n, "greedy", absolute)
    assert top.mask[there].nonzero()[:, 0].tolist() == sorted(order[:n])
    assert greedy.mask[there].nonzero()[:, 0].tolist() == grown(graph, keys, n)
    assert not top.mask[~there].any() and not greedy.mask[~there].any()
    assert top.gap == 0 and math.isnan(greedy.gap)
    mask = top.mask[there].numpy()
    assert (top.pruned().mask[there].numpy() == walked(graph, mask)).all()


def test_what_is_pruned_has_no_effect_and_the_rest_has():
    graph = MIXED
    for seed in range(12):
        keep = graph.allowed() & (
            torch.rand(graph.allowed().shape, generator=torch.manual_seed(seed)) < 0.15
        )
        kept = on_paths(graph, keep)
        logits = patched(graph, keep)
        assert (patched(graph, kept) == logits).all()
        for w, r in kept.nonzero().tolist():
            less = kept.clone()
            less[w, r] = False
            assert (patched(graph, less) != logits).any()


def directly(graph, keys, n):
    """Without nodes and with all edges: a kept edge has one before it and one after it."""
    edges, size = edges_of(graph), graph.n_edges
    rows = lil_matrix((2 * size, size))
    for i, (writer, nodes) in enumerate(edges):
        for j, (before, ends) in enumerate(edges):
            if writer in ends:
                rows[i, j] = -1
            if before in nodes:
                rows[size + i, j] = -1
        rows[i, i] = float(writer != "input")
        rows[size + i, i] = float(nodes != ["logits"])
    limits = [
        LinearConstraint(rows.tocsr(), -np.inf, 0),
        LinearConstraint(np.ones((1, size)), n, n),
    ]
    rows = milp(-keys, integrality=np.ones(size), bounds=Bounds(0, 1), constraints=limits,
                options={"mip_rel_gap": 0})  # fmt: skip
    return -rows.fun


# seeds and sizes of scores like attributions, a few very large: rounds of prices, a solution that
# is not whole, and edges that only the last step lets in, without which the best is missed
HARD = ((35, 5), (57, 5), (97, 8), (123, 5), (4, 8))


def hard(seed):
    graph = Graph("T", 4, (Layer(3, 1),) * 3)
    keys = np.exp(2 * np.random.default_rng(seed).standard_normal(graph.n_edges))
    return graph, keys.astype(np.float32)


def test_edges_that_were_left_out_come_in_where_they_matter(monkeypatch):
    monkeypatch.setattr(programme, "BATCH", 5)
    sizes = {"relax": [], "whole": []}
    for name, seen in sizes.items():
        run = getattr(programme._Programme, name)

        def noted(self, inside, seconds, run=run, seen=seen):
            seen.append(int(inside.sum()))
            return run(self, inside, seconds)

        monkeypatch.setattr(programme._Programme, name, noted)
    for seed, n in HARD:
        graph, keys = hard(seed)
        found = circuit(graph, keys).select(n, "milp")
        assert math.isclose(found.total, directly(graph, keys.astype(float), n), rel_tol=1e-9)
        assert found.bound == found.total and len(found.pruned()) == n
    assert len(sizes["relax"]) > 2 * len(HARD) and len(sizes["whole"]) >= 2 * len(HARD)
    assert max(sizes["whole"]) < graph.n_edges


def test_a_solver_that_did_not_finish_is_said(monkeypatch):
    graph, keys = hard(35)
    one = circuit(graph, keys)
    best_of_all = one.select(5, "milp")

    def unfinished(*args, found=True, **options):
        solved = milp(*args, **options)
        solved.status, solved.mip_dual_bound = 1, solved.mip_dual_bound * 1.01
        solved.x = solved.x if found else None
        return solved

    monkeypatch.setattr(programme, "milp", unfinished)
    with pytest.warns(UserWarning, match=r"the solver must finish .* got \d+\S* of at most \d+"):
        some = one.select(5, "milp", time_limit=2)
    assert some.total <= best_of_all.total <= some.bound < 1.2 * some.total
    assert some.gap == (some.bound - some.total) / some.bound > 0
    assert f"at most {some.bound:.6g}" in str(some)
    monkeypatch.setattr(programme, "milp", lambda *a, **b: unfinished(*a, found=False, **b))
    with pytest.raises(TimeoutError, match="time_limit must be long enough to find 5 of 112 edges"):
        one.select(5, "milp")


def test_sizes_and_errors():
    graph = MIXED
    one = circuit(graph, torch.arange(graph.n_edges))
    n = graph.n_edges
    for size, expected in ((0, 0), (1, 1), (1.0, n), (0.0, 0), (0.1, int(0.1 * n)), (n, n)):
        for how in ("top", "greedy", "milp"):
            assert len(one.select(size, how)) == expected
            assert len(one.select(np.asarray(size)[()], how)) == expected
    nodes = circuit(graph, torch.arange(len(graph.writers)), "node")
    assert nodes.select(2).names == graph.writers[-2:]
    # what is left without the input is what the counterfactual gives
    assert (
        len(nodes.select(2).pruned()) == 0
        and len(nodes.select(1.0).pruned()) == nodes.scores.numel()
    )
    broken = one.scores.clone()
    broken[2, 20] = math.nan
    edge = f"{graph.writers[2]} -> {graph.readers[20]}"
    for call, kind, message in (
        (lambda: one.select(n + 1), ValueError, rf"size must be an int 0\.\.{n} .* got {n + 1}"),
        (lambda: one.select(-1), ValueError, "got -1"),
        (lambda: one.select(5.0), ValueError, r"got 5\.0; 5 of them is an int"),
        (lambda: one.select(1.5), ValueError, r"0\.\.1 \(a fraction of them\), got 1\.5$"),
        (lambda: one.select(math.nan), ValueError, "got nan"),
        (lambda: one.select(True), TypeError, "size must be .* got True"),
        (lambda: one.select("1"), TypeError, "size must be .* got '1'"),
        (lambda: one.select(1, "best"), ValueError, "one of top, greedy, milp, got 'best'"),
        (lambda: nodes.select(1, "milp"), ValueError, "how must be 'top' for nodes, got 'milp'"),
        (lambda: one.select(1, "milp", time_limit=0), ValueError, "time_limit must be seconds > 0"),
        (
            lambda: circuit(graph, broken).select(1),
            ValueError,
            f"got nan for {edge} \\(1 of {n}\\)",
        ),
        (
            lambda: circuit(graph, broken[1:]).select(1),
            ValueError,
            "scores must be .* for the edges",
        ),
    ):
        with pytest.raises(kind, match=message):
            call()


def test_ranking_matrix_and_table():
    graph = MIXED
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(graph.allowed().shape, generator=draw) * graph.allowed()
    replicates = scores + torch.randn(40, *scores.shape, generator=draw) * graph.allowed()
    one = circuit(graph, scores, replicates=replicates)
    rows = one.ranking(7)
    names = dict(zip(one.select(1.0).names, scores[graph.allowed()].tolist(), strict=True))
    assert [row.name for row in rows] == sorted(names, key=lambda name: -abs(names[name]))[:7]
    assert [r.name for r in one.ranking(3, absolute=False)] == sorted(names, key=names.get)[:-4:-1]
    there = replicates[:, graph.allowed()].double()
    most = there.abs().topk(7).indices
    for row in rows:
        at = list(names).index(row.name)
        low, high = torch.quantile(
            there[:, at], torch.tensor([0.025, 0.975], dtype=torch.float64)
        ).tolist()
        assert row.score == (names[row.name], pytest.approx(low), pytest.approx(high))
        assert row.inclusion == pytest.approx((most == at).any(1).double().mean().item())
    text = str(one)
    assert text.startswith("logit of ' [a]': 2.500, of counterfactuals -0.500 (mean of 2 prompts)")
    assert "in top 10" in text
    for line, row in zip(text.splitlines()[3:], one.ranking(), strict=True):
        assert row.name in line and line.endswith(f" {row.inclusion:.0%}")
    assert "interval" not in str(circuit(graph, scores))
    with (console := Console(width=200)).capture() as shown:
        console.print(one)
    assert "logit of ' [a]'" in shown.get() and rows[0].name in shown.get()
    matrix = one.head_matrix()
    assert matrix.shape == (3, 4) and matrix.isnan().sum() == 3
    nodes = circuit(graph, scores.sum(1), "node")
    assert torch.equal(nodes.head_matrix().nan_to_num(), matrix.nan_to_num())
    w = graph.writers.index("L2.h1")
    assert matrix[2, 1] == scores[w].sum() and matrix[1, 2:].isnan().all()


@pytest.mark.parametrize("level", ["edge", "node"])
def test_files(level, tmp_path):
    graph = MIXED
    shape = graph.allowed().shape if level == "edge" else graph.allowed().shape[:1]
    scores, path = torch.randn(shape), tmp_path / "found.safetensors"
    one = circuit(graph, scores, level, torch.randn(3, *shape), positions=torch.randn(2, *shape))
    one.save(path)
    again = Circuit.load(path)
    for name in ("scores", "replicates", "positions", "values", "counterfactual_values"):
        assert torch.equal(getattr(again, name), getattr(one, name))
    assert (again.graph, again.level, again.rules) == (graph, level, None)
    assert (again.method, again.label, str(again)) == (one.method, one.label, str(one))
    circuit(graph, scores, level, rules="norm  frozen").save(path)
    again = Circuit.load(path)
    assert again.rules == "norm  frozen" and again.positions is None and not len(again.replicates)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    other = tmp_path / "other.safetensors"
    write_tensors(other, {"scores": scores}, {"circuit": json.dumps({"format": "x"})})
    for changed, message in (
        (data[:-4], "must be a circuit that Circuit.save wrote, got Safetensor"),
        (data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :], "got other bytes"),
        (data.replace(b"L2", b"L3").replace(b"[a]", b"[b]"), r"must hold sha256\.self"),
        (b"", "must be a circuit"),
        (other.read_bytes(), "must hold format: input should be"),
    ):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"Circuit.load: {path} .*{message}"):
            Circuit.load(path)
    write_tensors(path, {"scores": scores})
    with pytest.raises(ValueError, match="got safetensors of something else; find the circuit"):
        Circuit.load(path)
    with pytest.raises(FileNotFoundError, match="got no such file"):
        Circuit.load(tmp_path / "none")
    with pytest.raises(OSError, match="Circuit.save: a circuit must be written to"):
        one.save(tmp_path / "none" / "found")
