# SPDX-License-Identifier: Apache-2.0
"""From named gradients to circuits."""

import io
import math

import pytest
import rich.console
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, assert_accurate, identical, randint, randn, unchanged

from mikernels import Interactions, pairwise_topk
from mikernels.circuits import (
    GradientInteractions,
    NamedInteractions,
    compute_gradient_interactions,
    interactions,
    interpret_circuits,
    select_top_k,
    split_heads,
)


def named(*shape, n=5, dtype=torch.float32, seed=0, data=randn):
    """n components of a shape, the last three of them heads of one tensor."""
    many = {f"c{i}": data(*shape, dtype=dtype, seed=seed + i) for i in range(n - 3)}
    heads = data(*shape[:-1], 3, shape[-1], dtype=dtype, seed=seed + n)
    return many | split_heads("L2", heads)


def products(batches, factors=None, dtype=torch.float64):
    """All products, from the definition."""
    total = 0
    for number, batch in enumerate(batches):
        rows = torch.stack([t.to(dtype) for t in batch.values()])
        if factors is not None:
            rows = rows * torch.stack([factors[number][name].to(dtype) for name in batch])
        rows = rows.reshape(len(batch), -1)
        total = total + rows @ rows.T
    return total


@pytest.mark.parametrize("chunk", [1 << 22, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (4, 7), (3, 5, 7), (0, 7), (2, 3, 4, 5)])
def test_interactions_of_a_stream(shape, dtype, chunk, monkeypatch):
    monkeypatch.setattr(interactions, "CHUNK", chunk)
    batches = [named(*shape, dtype=dtype, seed=10 * i) for i in range(3)]
    factors = [named(*shape, dtype=dtype, seed=10 * i + 100) for i in range(3)]
    eager = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [t for batch in batches + factors for t in batch.values()]
    with unchanged(*tensors):
        plain = compute_gradient_interactions(iter(batches))
        times = compute_gradient_interactions(batches, activations=iter(factors))
    for found, more in ((plain, None), (times, factors)):
        assert found.names == ("c0", "c1", "L2.h0", "L2.h1", "L2.h2")
        assert found.batches == 3 and not found.normalized
        assert found.scores.dtype == eager
        assert_accurate(found.scores, products(batches, more), products(batches, more, eager))


def test_interactions_of_one_batch_and_of_another_order():
    first, second = named(4, 6, seed=0, data=randint), named(4, 6, seed=1, data=randint)
    turned = dict(reversed(second.items()))
    both = compute_gradient_interactions([first, turned], activations=[first, second])
    assert torch.equal(both.scores, products([first, second], [first, second]).float())
    one = compute_gradient_interactions(first)
    assert one.batches == 1 and torch.equal(one.scores, products([first]).float())


def test_interactions_take_any_strides_and_record_no_graph():
    wide = randint(6, 9, 4).requires_grad_()
    batch = {"a": wide[:, 0].T, "b": wide[0, :4, :1].expand(4, 6), "c": wide[:, 1:8:2, 2].T}
    found = compute_gradient_interactions(batch)
    assert not found.scores.requires_grad
    assert torch.equal(found.scores, products([batch]).float())


def test_interactions_as_cosines():
    batches = [named(4, 6, seed=10 * i) for i in range(2)]
    for batch in batches:
        batch["zero"] = torch.zeros(4, 6)
        batch["twice"] = -2 * batch["c0"]
    found = compute_gradient_interactions(batches, normalize=True)
    oracle = products(batches)
    lengths = oracle.diagonal().sqrt()
    expected = (oracle / (lengths[:, None] * lengths)).nan_to_num(0)
    assert found.normalized
    torch.testing.assert_close(found.scores, expected.float())
    assert found.scores.abs().max() <= 1
    names = list(found.names)
    zero, twice, c0 = (names.index(name) for name in ("zero", "twice", "c0"))
    assert not found.scores[zero].any() and not found.scores[:, zero].any()
    assert found.scores[twice, c0] == -1
    parallel = {f"c{i}": (0.3 + 0.1 * i) * batches[0]["c0"] for i in range(20)}
    cosines = compute_gradient_interactions(parallel, normalize=True).scores
    assert cosines.max() == 1 and torch.allclose(cosines, torch.ones(20, 20))


@pytest.mark.parametrize("normalize", [False, True])
def test_interactions_keep_nan_to_its_pairs(normalize):
    batch = named(4, 6)
    batch["c1"][2, 3] = math.nan
    found = compute_gradient_interactions(batch, normalize=normalize).scores.isnan()
    touched = torch.zeros(5, 5, dtype=torch.bool)
    touched[1], touched[:, 1] = True, True
    assert torch.equal(found, touched)


GOOD = {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("grads", "options", "error", "message"),
    [
        ([], {}, ValueError, "at least one batch, got none"),
        ({}, {}, TypeError, "got an empty one"),
        (torch.ones(2, 3), {}, TypeError, "grads must be a mapping .* got Tensor"),
        ([torch.ones(2, 3)], {}, TypeError, "a batch of grads must be a mapping .* got Tensor"),
        ([None], {}, TypeError, "got NoneType"),
        ({"a": torch.ones(2, dtype=torch.int64)}, {}, TypeError, r"grads\['a'\] .*int64 \[2\]"),
        ({"a": 3.0}, {}, TypeError, r"grads\['a'\] must be a floating tensor .* got float"),
        ({**GOOD, "b": torch.ones(2, 2, 3)}, {}, ValueError, r"\[2, 3\], got \[2, 2, 3\].*split"),
        ({**GOOD, "b": torch.ones(2, 3).double()}, {}, ValueError, r"grads\['b'\] .*float64"),
        ([GOOD, {**GOOD, "c": GOOD["a"]}], {}, ValueError, r"without \[\] and with \['c'\]"),
        ([GOOD, {"a": GOOD["a"]}], {}, ValueError, r"without \['b'\] and with \[\]"),
        ([GOOD, {k: torch.ones(2, 4) for k in GOOD}], {}, ValueError, r"\[2, 3\], got \[2, 4\]"),
        (GOOD, {"activations": {"a": GOOD["a"]}}, ValueError, r"activations .*without \['b'\]"),
        (GOOD, {"activations": {**GOOD, "b": torch.ones(3)}}, ValueError, r"activations\['b'\]"),
        ([GOOD, GOOD], {"activations": GOOD}, ValueError, "only 1 batches of activations"),
        (GOOD, {"activations": [GOOD, GOOD]}, ValueError, "only 1 batches of grads"),
        (GOOD, {"activations": 3}, TypeError, "activations must be a mapping .* got int"),
    ],
)
def test_interactions_refuse(grads, options, error, message):
    with pytest.raises(error, match=f"compute_gradient_interactions: .*{message}"):
        compute_gradient_interactions(grads, **options)


def test_split_heads_refuses_a_vector():
    with pytest.raises(ValueError, match=r"split_heads: L0 must be \[..., H, D\], got \[3\]"):
        split_heads("L0", torch.ones(3))


@given(n=st.integers(1, 9), k=st.integers(1, 40), by=st.sampled_from(["abs", "value"]))
def test_top_k_is_that_of_pairwise_topk(n, k, by):
    rows = randint(n, 3, seed=n)  # ties
    if n > 5:
        rows[5] = math.nan
    batch = {f"c{i}": row for i, row in enumerate(rows)}
    found = select_top_k(compute_gradient_interactions(batch), k, by=by)
    expected = pairwise_topk(rows, k=k, by=by, upper=True, impl="reference")
    assert len(found) == min(k, n * (n - 1) // 2)
    assert identical(found.values, expected.values)
    assert torch.equal(found.rows, expected.rows) and torch.equal(found.cols, expected.cols)
    assert found.shape == (n, n) and found.names == tuple(batch)


def test_top_k_and_circuits_refuse():
    found = compute_gradient_interactions(GOOD)
    with pytest.raises(TypeError, match="must be GradientInteractions, got Tensor"):
        select_top_k(found.scores)
    with pytest.raises(ValueError, match="select_top_k: k must be at least 1, got 0"):
        select_top_k(found, 0)
    with pytest.raises(ValueError, match="select_top_k: by must be one of"):
        select_top_k(found, by="rank")
    with pytest.raises(ValueError, match=r"scores must be \[1, 1\] for 1 names, got \[2, 2\]"):
        GradientInteractions(("a",), found.scores, 1)
    with pytest.raises(TypeError, match="top must be Interactions, got Tensor"):
        interpret_circuits(found.scores)
    bare = pairwise_topk(torch.eye(3, 2), torch.ones(2, 2), k=2)
    with pytest.raises(ValueError, match="names must be given"):
        interpret_circuits(bare)
    with pytest.raises(ValueError, match=r"col_names must be 2 for pairs of \[3, 2\], got 1"):
        interpret_circuits(bare, ["a", "b", "c"], ["d"])


NAMES = ("L2.mlp", "L0.h1", "[x]", "blocks.3.attn", "a1.h7", "m4", "model.layers.11.mlp")


def top(*pairs):
    values, rows, cols = (torch.tensor(column) for column in zip(*pairs, strict=True))
    return NamedInteractions(values, rows, cols, (7, 7), NAMES)


def test_circuits_are_the_connected_components():
    pairs = [(3.0, 0, 1), (-2.0, 3, 4), (1.5, 2, 5), (-1.0, 1, 2), (0.0, 4, 5), (math.nan, 5, 6)]
    found = interpret_circuits(top(*pairs))
    assert isinstance(found, list) and len(found) == 6
    assert not found.directed
    # that in the earlier layer comes first where both are known
    assert [(e.first, e.second) for e in found[:3]] == [
        ("L0.h1", "L2.mlp"),
        ("a1.h7", "blocks.3.attn"),
        ("[x]", "m4"),
    ]
    assert [e.kind for e in found] == [
        "reinforcing", "opposing", "reinforcing", "opposing", "neutral", "undefined",
    ]  # fmt: skip
    assert [e.circuit for e in found] == [1, 2, 1, 1, None, None]
    assert found.groups == [("L2.mlp", "L0.h1", "[x]", "m4"), ("blocks.3.attn", "a1.h7")]
    layers = {e.first: e.first_layer for e in found} | {e.second: e.second_layer for e in found}
    assert layers == dict(zip(NAMES, (2, 0, None, 3, 1, 4, 11), strict=True))


def test_circuits_print():
    found = interpret_circuits(top((3.0, 0, 1), (-0.25, 3, 2)))
    assert str(found).splitlines() == [
        "pairs, alike (+) or opposed (-), without direction",
        "first          second  score  kind         circuit",
        "L0.h1          L2.mlp     +3  reinforcing  1",
        "blocks.3.attn  [x]     -0.25  opposing     2",
        "circuit 1: L2.mlp, L0.h1",
        "circuit 2: [x], blocks.3.attn",
    ]
    console = rich.console.Console(file=io.StringIO(), width=80)
    console.print(found)
    shown = console.file.getvalue()
    for text in ("without direction", "-0.25", "opposing", "circuit 2: [x], blocks.3.attn"):
        assert text in shown
    assert shown.count("[x]") == 2
    nothing = Interactions(torch.ones(0), *torch.zeros(2, 0, dtype=torch.int64), (0, 0))
    assert str(interpret_circuits(nothing, ())).splitlines()[1:] == [
        "first  second  score  kind  circuit"
    ]


def test_circuits_of_directed_pairs():
    edges = Interactions(torch.ones(1), torch.tensor([1]), torch.tensor([0]), (2, 1))
    found = interpret_circuits(edges, ["L0.mlp", "L5.mlp"], ["L3.attn"])
    assert found.directed and (found[0].first, found[0].second) == ("L5.mlp", "L3.attn")
    assert str(found).splitlines()[:2] == [
        "edges from source to target",
        "source  target   score  kind         circuit",
    ]
