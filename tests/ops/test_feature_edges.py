# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from oracle import DTYPES, identical, num_threads, randint, randn, unchanged
from pairwise_cases import NAN, among, assert_found

from mikernels import feature_edges, qk_interactions
from mikernels._dispatch import accumulate_dtype

RULES = ("plain", "layers", "positions", "both")


def features(n, m, d, dtype, make):
    tensors = make(n, d, dtype=dtype), make(m, d, dtype=dtype, seed=1)
    return tensors, make(n, dtype=dtype, seed=2), make(m, dtype=dtype, seed=3)


def places(n, m, limit):
    generator = torch.Generator().manual_seed(n)
    return [torch.randint(limit, (size,), generator=generator) for size in (n, m)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_feature_edges_are_exact(impl, dtype, rule, scaled):
    for n, m, d, make in ((1, 1, 1, randint), (60, 83, 17, randn), (90, 41, 5, randint)):
        (w_dec, w_enc), row_scale, col_scale = features(n, m, d, dtype, make)
        scores = torch.einsum("id,jd->ij", w_dec.double(), w_enc.double())
        allowed, options = torch.ones(n, m, dtype=torch.bool), {}
        if scaled:
            options = {"row_scale": row_scale, "col_scale": col_scale}
            scores = scores * row_scale.double()[:, None] * col_scale.double()
        if rule in ("layers", "both"):
            options["row_layer"], options["col_layer"] = rows, cols = places(n, m, 5)
            allowed &= rows[:, None] < cols
        if rule in ("positions", "both"):
            # some positions have features on one side alone
            rows, cols = places(n, m, 6)[0] * 2, places(n, m, 9)[1]
            options["row_position"], options["col_position"] = rows, cols
            allowed &= rows[:, None] == cols
        scores = scores.to(accumulate_dtype(dtype))
        for k, least in ((1, None), (50, None), (50, 1), (9999, 2)):
            rest = {"k": k, "by": "value" if least == 1 else "abs", "min_value": least}
            with unchanged(w_dec, w_enc, *options.values()):
                found = feature_edges(w_dec, w_enc, **options, **rest, impl=impl)
            assert_found(found, among(scores, allowed, **rest), (n, m))


@pytest.mark.parametrize("n, m, d", [(0, 3, 4), (3, 0, 4), (3, 5, 0), (0, 0, 0)])
def test_feature_edges_empty(impl, n, m, d):
    w_dec, w_enc = torch.ones(n, d), torch.ones(m, d)
    places = {"row_position": torch.zeros(n).long(), "col_position": torch.zeros(m).long()}
    layers = {"row_layer": torch.zeros(n).long(), "col_layer": torch.ones(m).long()}
    for options in ({}, places, layers, {**places, **layers}):
        found = feature_edges(w_dec, w_enc, k=4, **options, impl=impl)
        assert len(found) == min(4, n * m) and found.shape == (n, m) and not found.values.any()
    apart = {"row_position": places["row_position"], "col_position": places["col_position"] + 1}
    assert len(feature_edges(w_dec, w_enc, k=4, **apart, impl=impl)) == 0


def test_feature_edges_non_finite_stay_where_they_are_allowed(impl):
    w_dec, w_enc = randint(8, 5), randint(8, 5, seed=1)
    w_dec[3], w_enc[6, 2] = NAN, NAN
    layers = torch.tensor([0, 1, 2, 9, 0, 1, 2, 3])
    found = feature_edges(w_dec, w_enc, k=99, row_layer=layers, col_layer=layers, impl=impl)
    upstream = (layers < layers[6]).nonzero()[:, 0]
    nan = found.values.isnan()
    assert torch.equal(found.rows[nan], upstream) and (found.cols[nan] == 6).all()
    # a position full of NaN does not hide the others
    at = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    found = feature_edges(w_dec, w_enc, k=99, row_position=at, col_position=at, impl=impl)
    assert len(found) == 9 + 4 + 9 and int(found.values.isnan().sum()) == 2 + 3


def quarter_turn(x, positions):
    """Rotates pairs of numbers by quarter turns, as many as the position: exact."""
    a, b = x[:, ::2], x[:, 1::2]
    turns = positions[:, None] % 4
    even, odd = (torch.where(turns == 1, -b, a), torch.where(turns == 1, a, b))
    even, odd = torch.where(turns == 2, -a, even), torch.where(turns == 2, -b, odd)
    even, odd = torch.where(turns == 3, b, even), torch.where(turns == 3, -a, odd)
    return torch.stack([even, odd], -1).flatten(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal, rotary", [(False, None), (True, None), (True, quarter_turn)])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_qk_interactions_are_exact(impl, dtype, key_heads, rotary, causal):
    n, m, d, e = 30, 23, 6, 4  # integers, and the root is 1/2: exact in every dtype
    q, keys = randint(n, d, dtype=dtype), randint(m, d, dtype=dtype, seed=1)
    w_q, w_k = (randint(h, d, e, dtype=dtype, seed=h) for h in (4, key_heads))
    scales = {
        "q_scale": randint(n, dtype=dtype, seed=8),
        "k_scale": randint(m, dtype=dtype, seed=9),
    }
    q_position, k_position = places(n, m, 12)
    allowed, options = torch.ones(n, m, dtype=torch.bool), {}
    if causal:
        options = {"q_position": q_position, "k_position": k_position, "rotary": rotary}
        allowed = k_position <= q_position[:, None]
    for more in ({}, scales):
        for by, least in (("abs", None), ("value", 1.0)):
            rest = {"k": 40, "by": by, "min_value": least}
            with unchanged(q, keys, w_q, w_k):
                found = qk_interactions(q, keys, w_q, w_k, **options, **more, **rest, impl=impl)
            assert len(found) == 4
            for head, pairs in enumerate(found):
                left = q.double() @ w_q[head].double() / 2
                right = keys.double() @ w_k[head // (4 // key_heads)].double()
                if rotary:
                    left, right = rotary(left, q_position), rotary(right, k_position)
                scores = left @ right.T
                if more:
                    scores = scores * more["q_scale"].double()[:, None] * more["k_scale"].double()
                scores = scores.to(accumulate_dtype(dtype))
                assert_found(pairs, among(scores, allowed, **rest), (n, m))


def test_feature_selections_are_one_function_of_their_input(impl):
    (w_dec, w_enc), row_scale, _ = features(150, 130, 33, torch.float32, randn)
    at = places(150, 130, 3)
    rule = {"row_position": at[0], "col_position": at[1], "row_scale": row_scale}
    first = feature_edges(w_dec, w_enc, k=200, **rule, impl=impl)
    for threads in (1, 2, 2):
        with num_threads(threads):
            again = feature_edges(w_dec, w_enc, k=200, **rule, impl=impl)
        assert identical(again.values, first.values)
        assert torch.equal(again.rows, first.rows) and torch.equal(again.cols, first.cols)


def test_feature_selections_are_no_part_of_a_graph(impl):
    leaves = [randn(*s).requires_grad_() for s in ((4, 3), (5, 3), (4,), (5,))]
    scales = {"row_scale": leaves[2], "col_scale": leaves[3]}
    found = feature_edges(*leaves[:2], k=3, **scales, impl=impl)
    assert not found.values.requires_grad
    heads = randn(1, 3, 2).requires_grad_()
    scales = {"q_scale": leaves[2], "k_scale": leaves[3]}
    (pairs,) = qk_interactions(*leaves[:2], heads, heads, k=3, **scales, impl=impl)
    assert not pairs.values.requires_grad


def test_qk_interactions_of_heads_without_width(impl):
    heads = torch.ones(2, 3, 0)
    for pairs in qk_interactions(torch.ones(4, 3), torch.ones(5, 3), heads, heads, k=2, impl=impl):
        assert len(pairs) == 2 and not pairs.values.any()


E, H, AT = torch.ones(4, 3), torch.ones(2, 3, 5), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "w_enc, options, error, message",
    [
        (E[0], {}, ValueError, r"expected w_dec \[n, d\] and w_enc \[m, d\], got \[4, 3\] and \[3"),
        (E[:, :2], {}, ValueError, r"got \[4, 3\] and \[4, 2\]"),
        (E.half(), {}, TypeError, "w_enc must have the dtype of w_dec"),
        (E, {"row_scale": E[0]}, ValueError, r"row_scale must have shape \[4\], got \[3\]"),
        (E, {"col_scale": AT}, TypeError, "col_scale must be float32, .*, got torch.int64"),
        (E, {"row_layer": AT}, ValueError, "row_layer and col_layer go together, got one"),
        (E, {"col_position": AT}, ValueError, "row_position and col_position go together"),
        (E, {"row_layer": AT.int()}, TypeError, "row_layer must be int64, got torch.int32"),
        (E, {"col_layer": AT[:1]}, ValueError, r"col_layer must have shape \[4\], got \[1\]"),
        (E, {"k": 0}, ValueError, "k must be at least 1, got 0"),
        (E, {"by": "max"}, ValueError, r"by must be one of \['abs', 'value'\], got 'max'"),
        (E, {"min_value": NAN}, ValueError, "min_value must be a number or None, got nan"),
        (E, {"impl": "fast"}, ValueError, "impl must be one of .*, got 'fast'"),
    ],
)
def test_feature_edges_errors(w_enc, options, error, message):
    with pytest.raises(error, match=message):
        feature_edges(E, w_enc, **{"k": 2, **options})


@pytest.mark.parametrize(
    "operands, options, error, message",
    [
        ((E[0, 0], E, H, H), {}, ValueError, r"q_features \[n, d\] and .*, got \[\] and \[4, 3\]"),
        ((E, E[:, :2], H, H), {}, ValueError, r"k_features \[m, d\], got \[4, 3\] and \[4, 2\]"),
        ((E, E, H[:, :2], H), {}, ValueError, r"expected w_q and w_k \[H, 3, d_head\], got"),
        ((E, E, H, H[..., :4]), {}, ValueError, r"d_head\], got \[2, 3, 5\] and \[2, 3, 4\]"),
        ((E, E, H[:1], H), {}, ValueError, "w_k must have a divisor of the 1 heads, got 2"),
        ((E, E, H, H[:0]), {}, ValueError, "w_k must have a divisor of the 2 heads, got 0"),
        ((E, E, H.half(), H), {}, TypeError, "w_q must have the dtype of q_features"),
        ((E, E, H, H), {"q_scale": E[0]}, ValueError, r"q_scale must have shape \[4\], got"),
        ((E, E, H, H), {"q_position": AT}, ValueError, "q_position and k_position go together"),
        ((E, E, H, H), {"rotary": quarter_turn}, ValueError, "rotary needs q_position and"),
        ((E, E, H, H), {"q_position": AT, "k_position": E[:, 0]}, TypeError, "k_position must be"),
        ((E, E, H, H), {"k": 1.0}, TypeError, "k must be an int, got float"),
        ((E, E, H, H), {"impl": "fast"}, ValueError, "impl must be one of .*, got 'fast'"),
    ],
)
def test_qk_interactions_errors(operands, options, error, message):
    with pytest.raises(error, match=message):
        qk_interactions(*operands, **{"k": 2, **options})
