# SPDX-License-Identifier: Apache-2.0
import hypothesis.extra.numpy as hnp
import pytest
import torch
from encode_cases import ADVERSARIAL, LARGE, NON_FINITE, several_panels
from groupmax_cases import check, group_counts
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, identical, num_threads, randint, randn

import mikernels
from mikernels import groupmax_encode, topk_encode

SHAPES = [  # N, d, F, k
    (0, 17, 50, 5),
    (1, 1, 1, 1),
    (1, 768, 1008, 16),
    (31, 3, 256, 4),
    (33, 1, 64, 64),
    (31, 17, 1, 1),
    (33, 17, 523, 1),
    (33, 768, 612, 36),
    (5, 33, 70, 70),
    (2, 129, 4110, 822),
    (257, 40, 999, 27),
    (1500, 5, 77, 7),
    (300, 5, 4112, 2056),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d, n_features, k", SHAPES)
def test_groupmax_encode_is_exact(impl, dtype, n, d, n_features, k):
    x, w = randn(n, d, dtype=dtype), randn(n_features, d, dtype=dtype, seed=1)
    check(impl, x, w, k=k)
    check(impl, x, w, randn(n_features, dtype=dtype, seed=2), k=k, relu=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_groupmax_encode_options(impl, dtype):
    x, w = randn(3, 11, 40, dtype=dtype), randn(510, 40, dtype=dtype, seed=1)
    b_enc, b_dec = randn(510, dtype=dtype, seed=2), randn(40, dtype=dtype, seed=3)
    signed = randn(510, dtype=dtype, seed=4)
    signed[::5] = 0
    check(impl, x, w, k=6, b_dec=b_dec)
    check(impl, x, w, b_enc, k=6, b_dec=b_dec, relu=False)
    check(impl, x, w, b_enc, k=6, b_dec=b_dec, scale=signed.abs())
    check(impl, x, w, b_enc, k=102, b_dec=b_dec, scale=signed)
    check(impl, x, w, k=6, scale=signed, relu=False)
    check(impl, x, w, k=6, scale=torch.zeros_like(signed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_groupmax_encode_is_sparsifys(impl, dtype):
    x, w = randint(33, 12, dtype=dtype), randint(600, 12, dtype=dtype, seed=1)
    b_enc = randint(600, dtype=dtype, seed=2) - 8
    for k in (1, 24, 200, 600):
        codes = groupmax_encode(x, w, b_enc, k=k, impl=impl)
        pre_acts = torch.relu(torch.nn.functional.linear(x, w, b_enc))
        values, within = pre_acts.unflatten(-1, (k, -1)).max(dim=-1)
        indices = within + torch.arange(0, 600, 600 // k)
        assert identical(codes.values, values)
        fired = values > 0
        assert torch.equal(codes.indices[fired], indices[fired])
        assert k < 200 or not fired.all()


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_groupmax_encode_adversarial(impl, case):
    arguments = ADVERSARIAL[case]()
    w = arguments.pop("w_enc")
    # eager torch, and so the reference, sums in fp32
    if arguments.pop("fp32_sums_overflow", False) and impl != "cpp":
        return
    # of sums that cancel, an fp64 oracle is sure of the last bit of the largest alone
    for k in group_counts(len(w)) if case != "cancelling" else (1, 3):
        for weight in (w, w.T.contiguous().T):
            check(impl, **{**arguments, "w_enc": weight, "k": k})


@pytest.mark.parametrize("dtype", DTYPES)
def test_groupmax_encode_ties_go_to_the_lowest_feature(impl, dtype):
    x, w = randint(33, 12, dtype=dtype), randint(60, 12, dtype=dtype, seed=1)
    w = w[torch.arange(600) % 60]  # ten copies of each feature, far apart
    b_enc = randint(60, dtype=dtype, seed=2)[torch.arange(600) % 60]
    for k in (1, 2, 5, 20, 600):
        codes = check(impl, x, w, b_enc, k=k, exact=True)
        assert k > 5 or (codes.indices % (600 // k) < 60).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", NON_FINITE)
def test_groupmax_encode_non_finite(impl, dtype, case):
    x, w = randint(9, 12, dtype=dtype), randint(301, 12, dtype=dtype, seed=1)
    b_enc, b_dec = randint(301, dtype=dtype, seed=2), randint(12, dtype=dtype, seed=3)
    NON_FINITE[case](x, w, b_enc, b_dec)
    for k in (1, 7, 43, 301):
        check(impl, x, w, b_enc, k=k, b_dec=b_dec, exact=True)
        check(impl, x, w, b_enc, k=k, relu=False, exact=True)


def test_one_group_is_the_first_of_topk_encode(impl):
    x, w, b_enc = randn(40, 33), randn(700, 33, seed=1), randn(700, seed=2)
    codes, alone = (f(x, w, b_enc, k=1, impl=impl) for f in (groupmax_encode, topk_encode))
    assert identical(codes.values, alone.values) and torch.equal(codes.indices, alone.indices)


def test_groups_of_one_feature_are_the_dense_activations(impl):
    x, w, b_enc = randint(40, 33), randint(70, 33, seed=1), randint(70, seed=2)
    codes = groupmax_encode(x, w, b_enc, k=70, impl=impl)
    assert torch.equal(codes.values, torch.relu(x @ w.T + b_enc))
    assert torch.equal(codes.indices, torch.arange(70).expand(40, 70))


def test_a_group_without_a_positive_score_holds_zero(impl):
    x, w = randn(33, 24).abs(), -randn(400, 24, seed=1).abs()
    w[[7, 300]] *= -1
    codes = check(impl, x, w, k=4)
    assert (codes.l0() == 2).all()
    assert torch.equal(codes.indices[:, [0, 3]], torch.tensor([7, 300]).expand(33, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_groupmax_encode_layouts(impl, dtype):
    # 12 tokens: the screen; a single one: the direct path
    x, w = randint(12, 20, dtype=dtype), randint(300, 20, dtype=dtype, seed=1)
    wide = randint(600, 80, dtype=dtype, seed=2)
    weights = {
        "[d, F].T": w.T.contiguous().T,
        "sliced": wide[::2, ::4],
        "offset": wide[1:301, 3:23],
        "expanded features": w[:1].expand(300, 20),
        "expanded dimensions": w[:, :1].expand(300, 20),
    }
    for weight in weights.values():
        check(impl, x, weight, k=12, exact=True)
    inputs = {
        "transposed": randint(20, 12, dtype=dtype).T,
        "strided": wide[:24:2, :80:4],
        "expanded tokens": x[:1].expand(12, 20),
        "expanded dimensions": x[:, :1].expand(12, 20),
        "one token": x[0],
        "3-D": randint(2, 20, 6, dtype=dtype).transpose(1, 2),
        "no tokens": x[:0].reshape(2, 0, 20),
    }
    vectors = wide[:, 0], wide[0]
    for tokens in inputs.values():
        check(impl, tokens, w, k=12, exact=True)
        check(impl, tokens, w, vectors[0][::2], k=12, b_dec=vectors[1][::4], exact=True)
        check(impl, tokens, w, vectors[0][:1].expand(300), k=12, scale=vectors[0][::2], exact=True)


# groups that span panels, and panels that cut groups
@pytest.mark.parametrize(
    "transposed, k", [(False, 1), (False, 2), (False, 6), (False, 4099), (True, 2), (True, 4099)]
)
def test_groupmax_encode_over_several_weight_panels(level, transposed, k):
    check("cpp", *several_panels(transposed), randn(24594, seed=2), k=k)


def test_groupmax_encode_over_several_chunks_of_tokens(level):
    # 64 MB hold the lists of some 2000 tokens
    x, w = randint(2100, 3), randint(2048, 3, seed=1)
    codes = groupmax_encode(x, w, k=1024, relu=False, impl="cpp")
    values, within = (x @ w.T).unflatten(-1, (1024, 2)).max(-1)
    assert torch.equal(codes.values, values)
    assert torch.equal(codes.indices, within + torch.arange(0, 2048, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_groupmax_encode_is_one_function_of_its_input(level, dtype):
    arguments = randn(301, 70, dtype=dtype), randn(2004, 70, dtype=dtype, seed=1)
    first = groupmax_encode(*arguments, k=12, impl="cpp")
    for threads in (1, 2, 2):
        with num_threads(threads):
            again = groupmax_encode(*arguments, k=12, impl="cpp")
        assert identical(again.values, first.values)
        assert torch.equal(again.indices, first.indices)
    # nor does a token depend on the tokens beside it
    for count in (1, 8, 13):
        alone = groupmax_encode(arguments[0][150 : 150 + count], arguments[1], k=12, impl="cpp")
        assert identical(alone.values, first.values[150 : 150 + count])
        assert torch.equal(alone.indices, first.indices[150 : 150 + count])


@pytest.mark.parametrize("case", ["random", *ADVERSARIAL])
def test_groupmax_encode_levels_agree(case):
    if len(mikernels.supported_levels()) < 2:
        pytest.skip(f"one level here: {mikernels.supported_levels()}")
    random = {"x": randn(65, 99), "w_enc": randn(1500, 99, seed=1)}
    arguments = random if case == "random" else ADVERSARIAL[case]()
    arguments.pop("fp32_sums_overflow", None)
    for k in group_counts(len(arguments["w_enc"])):
        results = []
        for level in mikernels.supported_levels():
            with mikernels.force_level(level):
                results.append(groupmax_encode(**{**arguments, "k": k}, impl="cpp"))
        for codes in results[1:]:
            assert identical(codes.values, results[0].values)
            assert torch.equal(codes.indices, results[0].indices)


def test_groupmax_encode_does_not_form_the_score_matrix(peak_growth):
    # scores would take 512 MB
    assert peak_growth("mikernels.groupmax_encode(x, w, k=64, impl='cpp')", *LARGE) < 64e6


POOL = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 3.0, float("nan"), float("inf"), -float("inf")])


@given(data=st.data())
def test_groupmax_encode_property(impl, data):
    n, d, k, group = (
        data.draw(st.integers(low, high), s)
        for low, high, s in ((0, 24, "N"), (1, 24, "d"), (1, 8, "k"), (1, 8, "group"))
    )

    def draw(name, *shape):
        return torch.from_numpy(data.draw(hnp.arrays("float32", shape, elements=POOL), name))

    n_features = k * group
    x, w = draw("x", n, d), draw("w_enc", d, n_features).T
    optional = {
        name: draw(name, size) if data.draw(st.booleans(), f"with {name}") else None
        for name, size in (("b_enc", n_features), ("b_dec", d), ("scale", n_features))
    }
    check(impl, x, w, k=k, relu=data.draw(st.booleans(), "relu"), exact=True, **optional)


def test_groupmax_encode_in_a_graph():
    def function(x, w):
        codes = groupmax_encode(x, w, k=5)
        return mikernels.sparse_decode(codes, w), codes.l0()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n in (6, 9):
        x, w = randn(n, 5).requires_grad_(), randn(40, 5, seed=1)
        for actual, expected in zip(compiled(x, w), function(x, w), strict=True):
            assert identical(actual, expected)
        found, expected = (torch.autograd.grad(f(x, w)[0].sum(), x) for f in (compiled, function))
        assert identical(found[0], expected[0])


X, W = torch.zeros(4, 3), torch.zeros(6, 3)


@pytest.mark.parametrize(
    "x, w, options, error, message",
    [
        (X, W.T, {}, ValueError, r"got \[4, 3\] and \[3, 6\]; pass w_enc.T"),
        (X, W, {"k": 0}, ValueError, r"k must be in 1\.\.6 \(rows of w_enc\), got 0"),
        (X, W, {"k": 7}, ValueError, r"k must be in 1\.\.6 \(rows of w_enc\), got 7"),
        (X, W, {"k": 5}, ValueError, r"k must divide 6 \(rows.*, got 5; .* below that does is 3"),
        (X, W, {"k": 4}, ValueError, r"k must divide 6 \(rows.*, got 4; .* below that does is 3"),
        (X, W, {"k": 2.0}, TypeError, "k must be an int, got float"),
        (X, W, {"k": True}, TypeError, "k must be an int, got bool"),
        (X, W, {"b_enc": X[0]}, ValueError, r"b_enc must have shape \[6\], got \[3\]"),
        (X, W, {"b_dec": W[:, 0]}, ValueError, r"b_dec must have shape \[3\], got \[6\]"),
        (X, W, {"scale": X[0]}, ValueError, r"scale must have shape \[6\], got \[3\]"),
        (X, W.double(), {}, TypeError, r"w_enc must have the dtype of x .*float32.*got .*float64"),
        (X, W, {"impl": "fast"}, ValueError, "impl must be one of .*, got 'fast'"),
    ],
)
def test_groupmax_encode_errors(x, w, options, error, message):
    with pytest.raises(error, match=f"groupmax_encode: .*{message}"):
        groupmax_encode(x, w, **{"k": 2, **options})
