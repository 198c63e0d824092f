# SPDX-License-Identifier: Apache-2.0
import hypothesis.extra.numpy as hnp
import pytest
import torch
from batch_cases import check
from encode_cases import ADVERSARIAL, COARSE, LARGE, NON_FINITE, several_panels
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, identical, num_threads, randint, randn
from screened import COARSE_LEVELS, screened

import mikernels
from mikernels import batch_topk_encode, topk_encode

SHAPES = [  # N, d, F, k
    (0, 17, 50, 3),
    (1, 1, 1, 1),
    (1, 768, 1009, 16),
    (31, 3, 257, 5.3),
    (33, 1, 64, 64),
    (31, 17, 1, 0.5),
    (33, 17, 523, 0.01),
    (33, 768, 611, 32),
    (5, 33, 70, 69.9),
    (2, 129, 4111, 300),
    (257, 40, 999, 8),
    (1500, 5, 77, 9),
    (300, 5, 4111, 40.5),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d, n_features, k", SHAPES)
def test_batch_topk_encode_is_exact(impl, dtype, n, d, n_features, k):
    x, w = randn(n, d, dtype=dtype), randn(n_features, d, dtype=dtype, seed=1)
    check(impl, x, w, k=k)
    check(impl, x, w, randn(n_features, dtype=dtype, seed=2), k=k, relu=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_topk_encode_options(impl, dtype):
    x, w = randn(3, 11, 40, dtype=dtype), randn(509, 40, dtype=dtype, seed=1)
    b_enc, b_dec = randn(509, dtype=dtype, seed=2), randn(40, dtype=dtype, seed=3)
    signed = randn(509, dtype=dtype, seed=4)
    signed[::5] = 0
    check(impl, x, w, k=7.5, b_dec=b_dec)
    check(impl, x, w, b_enc, k=7.5, b_dec=b_dec, relu=False)
    check(impl, x, w, b_enc, k=7.5, b_dec=b_dec, scale=signed.abs())
    check(impl, x, w, b_enc, k=7.5, b_dec=b_dec, scale=signed)
    check(impl, x, w, k=7.5, scale=signed, relu=False)
    check(impl, x, w, k=7.5, scale=torch.zeros_like(signed))
    check(impl, x, w, b_enc, k=400, b_dec=b_dec)  # beyond the positive ones


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_batch_topk_encode_adversarial(impl, case):
    arguments = ADVERSARIAL[case]()
    # eager torch, and so the reference, sums in fp32
    overflows = arguments.pop("fp32_sums_overflow", False)
    if impl == "cpp" or not overflows:
        check(impl, **arguments)
        check(impl, **{**arguments, "w_enc": arguments["w_enc"].T.contiguous().T, "k": 0.4})


@pytest.mark.parametrize("level", COARSE_LEVELS, indirect=True)
@pytest.mark.parametrize("case", COARSE)
def test_batch_topk_encode_in_bytes_first(level, case):
    with screened() as pairs:
        check("cpp", **COARSE[case]())
    assert pairs[0] > 0 or case in ("outlier numbers", "uneven rows", "non-finite")


@pytest.mark.parametrize("case", NON_FINITE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_topk_encode_non_finite(impl, dtype, case):
    operands = [randint(*shape, dtype=dtype) for shape in ((9, 12), (301, 12), (301,), (12,))]
    NON_FINITE[case](*operands)
    x, w, b_enc, b_dec = operands
    for k in (5.5, 250):
        check(impl, x, w, b_enc, k=k, b_dec=b_dec, exact=True)
        check(impl, x, w, b_enc, k=k, b_dec=b_dec, relu=False, exact=True)


def test_ties_go_to_the_first_places_of_the_batch(impl):
    codes, threshold = batch_topk_encode(torch.ones(5, 3), torch.ones(8, 3), k=2.2, impl=impl)
    assert codes.row_offsets.tolist() == [0, 8, 11, 11, 11, 11]
    assert codes.indices.tolist() == [*range(8), 0, 1, 2] and threshold == 3


@pytest.mark.parametrize("n_features", [300, 70_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_has_the_codes_of_topk_encode(impl, dtype, n_features):
    x, w = randn(1, 70, dtype=dtype), randn(n_features, 70, dtype=dtype, seed=1)
    for weight in (w, w.T.contiguous().T):
        codes, threshold = batch_topk_encode(x, weight, k=17, impl=impl)
        alone = topk_encode(x, weight, k=17, impl=impl)
        assert identical(codes.values, alone.values[0])
        assert torch.equal(codes.indices, alone.indices[0])
        assert threshold.to(dtype) == alone.values.min()


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_topk_encode_layouts(impl, dtype):
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
        check(impl, x, weight, k=9.5, exact=True)
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
        check(impl, tokens, w, vectors[0][::2], k=9, b_dec=vectors[1][::4], exact=True)
        check(impl, tokens, w, vectors[0][:1].expand(300), k=9, scale=vectors[0][::2], exact=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_batch_topk_encode_over_several_weight_panels(level, transposed):
    check("cpp", *several_panels(transposed), randn(24594, seed=2), k=64.5)


def test_batch_topk_encode_over_several_chunks_of_tokens(level):
    # 64 MB hold 2048 rows of 2^14 numbers
    x = torch.zeros(2100, 2**14)
    x[:, 0] = torch.arange(2100.0).roll(1000)
    x[2050:, 1] = 1e6
    w = torch.zeros(3, 2**14)
    w[:, 0] = torch.tensor([1.0, -1.0, 0.5])
    w[2, 1] = 1
    codes, threshold = batch_topk_encode(x, w, k=0.2, impl="cpp")
    expected = (x[:, :2] @ w[:, :2].T).flatten().topk(420).values
    assert torch.equal(codes.values.sort(descending=True).values, expected)
    assert threshold == expected[-1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_topk_encode_is_one_function_of_its_input(level, dtype):
    arguments = randn(301, 70, dtype=dtype), randn(2003, 70, dtype=dtype, seed=1)
    first, threshold = batch_topk_encode(*arguments, k=17.3, impl="cpp")
    for threads in (1, 2, 2):
        with num_threads(threads):
            again, same = batch_topk_encode(*arguments, k=17.3, impl="cpp")
        assert identical(again.values, first.values) and identical(same, threshold)
        assert torch.equal(again.indices, first.indices)
        assert torch.equal(again.row_offsets, first.row_offsets)


@pytest.mark.parametrize("case", ["random", *ADVERSARIAL])
def test_batch_topk_encode_levels_agree(case):
    if len(mikernels.supported_levels()) < 2:
        pytest.skip(f"one level here: {mikernels.supported_levels()}")
    random = {"x": randn(65, 99), "w_enc": randn(1501, 99, seed=1), "k": 20}
    arguments = random if case == "random" else ADVERSARIAL[case]()
    arguments.pop("fp32_sums_overflow", None)
    results = []
    for level in mikernels.supported_levels():
        with mikernels.force_level(level):
            results.append(batch_topk_encode(**arguments, impl="cpp"))
    for codes, threshold in results[1:]:
        assert identical(codes.values, results[0][0].values)
        assert identical(threshold, results[0][1])
        assert torch.equal(codes.indices, results[0][0].indices)


def test_batch_topk_encode_does_not_form_the_score_matrix(peak_growth):
    # scores would take 512 MB
    assert peak_growth("mikernels.batch_topk_encode(x, w, k=8, impl='cpp')", *LARGE) < 64e6


POOL = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 3.0, float("nan"), float("inf"), -float("inf")])


@given(data=st.data())
def test_batch_topk_encode_property(impl, data):
    n, d, n_features = (
        data.draw(st.integers(low, 24), s) for low, s in ((0, "N"), (1, "d"), (1, "F"))
    )

    def draw(name, *shape):
        return torch.from_numpy(data.draw(hnp.arrays("float32", shape, elements=POOL), name))

    x, w = draw("x", n, d), draw("w_enc", d, n_features).T
    optional = {
        name: draw(name, size) if data.draw(st.booleans(), f"with {name}") else None
        for name, size in (("b_enc", n_features), ("b_dec", d), ("scale", n_features))
    }
    k = data.draw(st.floats(0, n_features, exclude_min=True), "k")
    check(impl, x, w, k=k, relu=data.draw(st.booleans(), "relu"), exact=True, **optional)


def test_batch_topk_encode_in_a_graph():
    def function(x, w):
        codes, threshold = batch_topk_encode(x, w, k=2.5)
        return mikernels.sparse_decode(codes, w), codes.l0(), codes.fired(), threshold

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n in (6, 9):
        x, w = randn(n, 5), randn(40, 5, seed=1)
        for actual, expected in zip(compiled(x, w), function(x, w), strict=True):
            assert identical(actual, expected)


X, W = torch.zeros(4, 3), torch.zeros(6, 3)


@pytest.mark.parametrize(
    "x, w, options, error, message",
    [
        (X, W.T, {}, ValueError, r"got \[4, 3\] and \[3, 6\]; pass w_enc.T"),
        (X, W, {"k": 0}, ValueError, r"k must be above 0 and at most 6 \(rows of w_enc\), got 0"),
        (X, W, {"k": -0.5}, ValueError, r"k must be above 0 and at most 6 .*, got -0.5"),
        (X, W, {"k": 6.1}, ValueError, r"k must be above 0 and at most 6 .*, got 6.1"),
        (X, W, {"k": float("nan")}, ValueError, "k must be above 0 .*, got nan"),
        (X, W, {"k": float("inf")}, ValueError, "k must be above 0 .*, got inf"),
        (X, W, {"k": True}, TypeError, "k must be a number, got bool"),
        (X, W, {"k": "2"}, TypeError, "k must be a number, got str"),
        (X, W, {"b_enc": X[0]}, ValueError, r"b_enc must have shape \[6\], got \[3\]"),
        (X, W, {"b_dec": W[:, 0]}, ValueError, r"b_dec must have shape \[3\], got \[6\]"),
        (X, W, {"scale": X[0]}, ValueError, r"scale must have shape \[6\], got \[3\]"),
        (X, W.double(), {}, TypeError, r"w_enc must have the dtype of x .*float32.*got .*float64"),
        (X, W, {"impl": "fast"}, ValueError, "impl must be one of .*, got 'fast'"),
    ],
)
def test_batch_topk_encode_errors(x, w, options, error, message):
    with pytest.raises(error, match=f"batch_topk_encode: .*{message}"):
        batch_topk_encode(x, w, **{"k": 2, **options})
