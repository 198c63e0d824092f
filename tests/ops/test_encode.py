# SPDX-License-Identifier: Apache-2.0
import hypothesis.extra.numpy as hnp
import pytest
import torch
from encode_cases import ADVERSARIAL, COARSE, LARGE, NON_FINITE, check, several_panels
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    DTYPES,
    best,
    encode_scores,
    identical,
    num_threads,
    randint,
    randn,
)
from screened import COARSE_LEVELS, screened

import mikernels
from mikernels import topk_encode

SHAPES = [  # N, d, F, k
    (0, 17, 50, 3),
    (1, 1, 1, 1),
    (1, 768, 1009, 16),
    (31, 3, 257, 5),
    (33, 1, 64, 64),
    (31, 17, 1, 1),
    (33, 17, 523, 1),
    (33, 768, 611, 32),
    (5, 33, 70, 70),
    (2, 129, 4111, 300),
    (257, 40, 999, 8),
    (1500, 5, 77, 9),
    (300, 5, 4111, 4000),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d, n_features, k", SHAPES)
def test_encode_is_exact(impl, dtype, n, d, n_features, k):
    x, w = randn(n, d, dtype=dtype), randn(n_features, d, dtype=dtype, seed=1)
    check(impl, x, w, k=k)
    check(impl, x, w, randn(n_features, dtype=dtype, seed=2), k=k, relu=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_options(impl, dtype):
    x, w = randn(3, 11, 40, dtype=dtype), randn(509, 40, dtype=dtype, seed=1)
    b_enc, b_dec = randn(509, dtype=dtype, seed=2), randn(40, dtype=dtype, seed=3)
    signed = randn(509, dtype=dtype, seed=4)
    signed[::5] = 0
    check(impl, x, w, k=7, b_dec=b_dec)
    check(impl, x, w, b_enc, k=7, b_dec=b_dec, relu=False)
    check(impl, x, w, b_enc, k=7, b_dec=b_dec, scale=signed.abs())
    check(impl, x, w, b_enc, k=7, b_dec=b_dec, scale=signed)
    check(impl, x, w, k=7, scale=signed, relu=False)
    check(impl, x, w, k=7, scale=torch.zeros_like(signed))


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_encode_adversarial(impl, case):
    arguments = ADVERSARIAL[case]()
    # eager torch, and so the reference, sums in fp32
    overflows = arguments.pop("fp32_sums_overflow", False)
    if impl == "cpp" or not overflows:
        check(impl, **arguments)


@pytest.mark.parametrize("level", COARSE_LEVELS, indirect=True)
@pytest.mark.parametrize("case", COARSE)
def test_encode_in_bytes_first(level, case):
    arguments = COARSE[case]()
    with screened() as pairs:
        codes = check("cpp", **arguments)
    coarse, fine = pairs
    # padded to whole blocks
    assert coarse + fine == 320 * 3001
    assert coarse > 0 or case in ("outlier numbers", "uneven rows")
    # strided weights and 16-bit operands
    w = arguments["w_enc"].T.contiguous().T
    again = check("cpp", **{**arguments, "w_enc": w})
    assert identical(again.values, codes.values)
    assert torch.equal(again.indices, codes.indices)
    for dtype in (torch.bfloat16, torch.float16) if case in ("random", "non-finite") else ():
        short = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in arguments.items()}
        check("cpp", **short)


def test_encode_screens_in_bytes_where_it_can(level):
    with screened() as pairs:
        topk_encode(**COARSE["random"](), impl="cpp")
    assert (sum(pairs) > 0) == (level in COARSE_LEVELS)


def test_encode_leaves_bytes_that_do_not_pay():
    if mikernels.cpu_level() not in COARSE_LEVELS:
        pytest.skip(f"no coarse screen at {mikernels.cpu_level()}")
    shares = []
    for case in ("random", "turning to the worse"):
        with screened() as pairs:
            topk_encode(**COARSE[case](), impl="cpp")
        shares.append(pairs[0] / sum(pairs))
    assert shares[0] > 0.6 and 0 < shares[1] < 0.3


@pytest.mark.parametrize("relative", [1e-4, 1e-5])
def test_encode_near_ties_do_defeat_sixteen_bits(relative):
    case = ADVERSARIAL[f"near ties {relative:g}"]()
    x, w, k = case["x"], case["w_enc"], case["k"]
    exact = best(encode_scores(x, w)[1], k).sort(-1).values
    low = best(encode_scores(x.bfloat16(), w.bfloat16())[1], k).sort(-1).values
    steps = [2**15 / t.abs().amax(-1, keepdim=True) for t in (x, w)]
    int16 = best(encode_scores((x * steps[0]).round(), (w * steps[1]).round() / steps[1])[1], k)
    assert (low != exact).any(-1).all()
    assert (int16.sort(-1).values != exact).any(-1).float().mean() > 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_ties_go_to_the_lowest_feature(impl, dtype):
    x, w = randint(33, 12, dtype=dtype), randint(60, 12, dtype=dtype, seed=1)
    w = w[torch.arange(600) % 60]  # ten copies of each feature, far apart
    b_enc = randint(60, dtype=dtype, seed=2)[torch.arange(600) % 60]
    for k in (1, 4, 10, 15, 77, 599):
        check(impl, x, w, b_enc, k=k, exact=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", NON_FINITE)
def test_encode_non_finite(impl, dtype, case):
    x, w = randint(9, 12, dtype=dtype), randint(301, 12, dtype=dtype, seed=1)
    b_enc, b_dec = randint(301, dtype=dtype, seed=2), randint(12, dtype=dtype, seed=3)
    NON_FINITE[case](x, w, b_enc, b_dec)
    for k in (1, 5, 33):
        check(impl, x, w, b_enc, k=k, b_dec=b_dec, exact=True)
        check(impl, x, w, b_enc, k=k, relu=False, exact=True)


def test_encode_with_fewer_positives_than_k_pads_with_zeros(impl):
    x, w = randn(33, 24).abs(), -randn(400, 24, seed=1).abs()
    w[[7, 300]] *= -1
    codes = check(impl, x, w, k=6)
    assert (codes.l0() == 2).all()
    assert (codes.indices.diff(dim=-1) > 0).all()
    assert (check(impl, x, w[8:290], k=6).values == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_layouts(impl, dtype):
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
        check(impl, x, weight, k=9, exact=True)
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
        check(impl, tokens, w, k=9, exact=True)
        check(impl, tokens, w, vectors[0][::2], k=9, b_dec=vectors[1][::4], exact=True)
        check(impl, tokens, w, vectors[0][:1].expand(300), k=9, scale=vectors[0][::2], exact=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_encode_over_several_weight_panels(level, transposed):
    check("cpp", *several_panels(transposed), randn(24594, seed=2), k=64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_is_one_function_of_its_input(level, dtype):
    arguments = randn(301, 70, dtype=dtype), randn(2003, 70, dtype=dtype, seed=1)
    first = topk_encode(*arguments, k=17, impl="cpp")
    for threads in (1, 2, 2):
        with num_threads(threads):
            again = topk_encode(*arguments, k=17, impl="cpp")
        assert identical(again.values, first.values)
        assert torch.equal(again.indices, first.indices)
    # nor does a token depend on the tokens beside it
    for count in (1, 8, 13):
        alone = topk_encode(arguments[0][150 : 150 + count], arguments[1], k=17, impl="cpp")
        assert identical(alone.values, first.values[150 : 150 + count])
        assert torch.equal(alone.indices, first.indices[150 : 150 + count])


@pytest.mark.parametrize("case", ["random", *ADVERSARIAL])
def test_encode_levels_agree(case):
    if len(mikernels.supported_levels()) < 2:
        pytest.skip(f"one level here: {mikernels.supported_levels()}")
    random = {"x": randn(65, 99), "w_enc": randn(1501, 99, seed=1), "k": 20}
    arguments = random if case == "random" else ADVERSARIAL[case]()
    arguments.pop("fp32_sums_overflow", None)
    results = []
    for level in mikernels.supported_levels():
        with mikernels.force_level(level):
            results.append(topk_encode(**arguments, impl="cpp"))
    for codes in results[1:]:
        assert identical(codes.values, results[0].values)
        assert torch.equal(codes.indices, results[0].indices)


@pytest.mark.parametrize("n_features, k", [(512, 8), (60, 8), (8, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_best_of_the_device(dtype, n_features, k):
    x, w = randn(40, 33, dtype=dtype), randn(n_features, 33, dtype=dtype, seed=1)
    check(None, x, w, randn(n_features, dtype=dtype, seed=2), k=k)
    check(None, x.sign(), w.sign(), k=k, exact=True)


def test_encode_precision_rounds_the_operands_first(impl):
    x, w, b_enc = randn(9, 33), randn(200, 33, seed=1), randn(200, seed=2)
    low = topk_encode(x, w, b_enc, k=5, precision=torch.bfloat16, impl=impl)
    rounded = topk_encode(*(t.bfloat16() for t in (x, w, b_enc)), k=5, impl=impl)
    assert low.values.dtype == torch.float32
    assert torch.equal(low.values, rounded.values.float())
    assert torch.equal(low.indices, rounded.indices)


def test_encode_does_not_form_the_score_matrix(peak_growth):
    # scores would take 512 MB
    assert peak_growth("mikernels.topk_encode(x, w, k=8, impl='cpp')", LARGE[0]) < 64e6


POOL = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 3.0, float("nan"), float("inf"), -float("inf")])


@given(data=st.data())
def test_encode_property(impl, data):
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
    k = data.draw(st.integers(1, n_features), "k")
    check(impl, x, w, k=k, relu=data.draw(st.booleans(), "relu"), exact=True, **optional)


X, W = torch.zeros(4, 3), torch.zeros(6, 3)


@pytest.mark.parametrize(
    "x, w, options, error, message",
    [
        (X, W.T, {}, ValueError, r"got \[4, 3\] and \[3, 6\]; pass w_enc.T"),
        (X, W[0], {}, ValueError, r"w_enc \[F, d\], got \[4, 3\] and \[3\]"),
        (X[0, 0], W, {}, ValueError, r"x \[\.\.\., d\].*, got \[\] and"),
        (X, W, {"k": 0}, ValueError, r"k must be in 1\.\.6 \(rows of w_enc\), got 0"),
        (X, W, {"k": 7}, ValueError, r"k must be in 1\.\.6 \(rows of w_enc\), got 7"),
        (X, W, {"k": 1.5}, TypeError, "k must be an int, got float"),
        (X, W, {"b_enc": X[0]}, ValueError, r"b_enc must have shape \[6\], got \[3\]"),
        (X, W, {"b_dec": W[:, 0]}, ValueError, r"b_dec must have shape \[3\], got \[6\]"),
        (X, W, {"scale": X[0]}, ValueError, r"scale must have shape \[6\], got \[3\]"),
        (X, W.double(), {}, TypeError, r"w_enc must have the dtype of x .*float32.*got .*float64"),
        (X, W, {"b_enc": W[:, 0].bfloat16()}, TypeError, "b_enc must have the dtype of x"),
        (X.long(), W, {}, TypeError, r"x must be float32, .*, got torch.int64; .*x\.float\(\)"),
        (X, W.to("meta"), {}, ValueError, r"w_enc must be on the device of x \(cpu\), got meta"),
        (X, W, {"impl": "fast"}, ValueError, "impl must be one of .*, got 'fast'"),
        (X.tolist(), W, {}, TypeError, "x must be a torch.Tensor, got list"),
    ],
)
def test_encode_errors(x, w, options, error, message):
    with pytest.raises(error, match=message):
        topk_encode(x, w, **{"k": 2, **options})
