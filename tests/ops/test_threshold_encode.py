# SPDX-License-Identifier: Apache-2.0

import hypothesis.extra.numpy as hnp
import pytest
import torch
from encode_cases import ADVERSARIAL, COARSE, LARGE, NON_FINITE, several_panels
from hypothesis import given
from hypothesis import strategies as st
from one_level import one_impl
from oracle import DTYPES, encode_scores, identical, num_threads, randint, randn
from screened import COARSE_LEVELS, screened
from threshold_cases import at_scores, check, floors

import mikernels
from mikernels import jump, threshold_encode
from mikernels.ops.sae.threshold_encode import slots_above, threshold_encode_op

NAN, INF = float("nan"), float("inf")
SHAPES = [  # N, d, F
    (0, 17, 50),
    (1, 1, 1),
    (1, 768, 1009),
    (31, 3, 257),
    (33, 1, 64),
    (31, 17, 1),
    (33, 17, 523),
    (33, 768, 611),
    (5, 33, 70),
    (2, 129, 4111),
    (257, 40, 999),
    (1500, 5, 77),
    (300, 5, 4111),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d, n_features", SHAPES)
def test_threshold_encode_is_exact(impl, dtype, n, d, n_features):
    x, w = randn(n, d, dtype=dtype), randn(n_features, d, dtype=dtype, seed=1)
    floor = floors(n_features, dtype)
    check(impl, x, w, floor=floor)
    # about as many as an SAE has
    check(impl, x, w, randn(n_features, dtype=dtype, seed=2), floor=floor.clamp(0) + 2 * d**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_encode_options(impl, dtype):
    x, w = randn(3, 11, 40, dtype=dtype), randn(509, 40, dtype=dtype, seed=1)
    b_enc, b_dec = randn(509, dtype=dtype, seed=2), randn(40, dtype=dtype, seed=3)
    for floor in (floors(509, dtype), floors(509, dtype)[:1].expand(509), floors(1018, dtype)[::2]):
        check(impl, x, w, floor=floor, b_dec=b_dec)
        check(impl, x, w, b_enc, floor=floor, b_dec=b_dec)
        check(impl, x, w, b_enc, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [5, 60])
def test_threshold_encode_of_all_and_of_nothing(impl, dtype, n):
    x, w = randn(n, 40, dtype=dtype), randn(509, 40, dtype=dtype, seed=1)
    acc = floors(1, dtype).dtype
    for weight in (w, w.T.contiguous().T):
        everything = check(impl, x, weight, floor=torch.full((509,), -INF, dtype=acc))
        assert (everything.row_offsets.diff() == 509).all()
        nothing = check(impl, x, weight, floor=torch.full((509,), INF, dtype=acc))
        assert not nothing.row_offsets.any() and nothing.values.shape == (0,)
        half = check(impl, x, weight, floor=torch.zeros(509, dtype=acc))
        assert 0.4 < len(half.values) / (509 * n) < 0.6


def test_threshold_encode_of_more_than_a_buffer_holds(impl):
    """Pairs are computed in several rounds within a block of tokens, and stay in order."""
    x, w = randn(700, 9), randn(1501, 9, seed=1)
    for transposed in (False, True):
        weight = w.T.contiguous().T if transposed else w
        check(impl, x, weight, floor=floors(1501))
        check(impl, x, weight, floor=torch.full((1501,), -INF))


@pytest.mark.parametrize("case", ADVERSARIAL)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_threshold_encode_adversarial(impl, case, layout):
    arguments = at_scores(case)
    if layout == "columns":
        arguments["w_enc"] = arguments["w_enc"].T.contiguous().T
    if impl == "cpp" or case != "overflow":  # eager torch, and so the reference, sums in fp32
        check(impl, **arguments)


@pytest.mark.parametrize("level", COARSE_LEVELS, indirect=True)
@pytest.mark.parametrize("case", COARSE)
def test_threshold_encode_in_bytes_first(level, case):
    arguments = {k: v for k, v in COARSE[case]().items() if k not in ("k", "scale")}
    # about one pair in 200
    h = encode_scores(**arguments)[0].float()
    floor = h.nan_to_num(0, 0, 0).quantile(0.995, dim=0)
    with screened() as pairs:
        check("cpp", **arguments, floor=floor)
    # tokens too much alike for 8 bits, or too far apart in size
    never = case in ("outlier numbers", "turning to the worse", "uneven rows")
    assert pairs[0] > 0 or never


def test_adversarial_floors_are_decided_by_rounding(level):
    """Were the screen's scores believed, pairs would be wrong."""
    undecided = 0
    for case in ("near ties 1e-05", "neighbouring floats", "cancelling", "ties by rounding"):
        arguments = at_scores(case)
        codes = slots_above(
            arguments["x"],
            arguments["w_enc"],
            arguments.get("b_enc"),
            None,
            arguments["floor"],
            impl="cpp",
        )
        distance = codes.values - arguments["floor"][codes.indices]
        undecided += (distance <= 2**-22 * codes.values.abs()).sum()
    assert undecided > 100


@pytest.mark.parametrize("case", NON_FINITE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_encode_non_finite(impl, dtype, case):
    operands = [randint(*shape, dtype=dtype) for shape in ((9, 12), (301, 12), (301,), (12,))]
    NON_FINITE[case](*operands)
    x, w, b_enc, b_dec = operands
    for floor in (floors(301, dtype), torch.full_like(floors(301, dtype), 5)):
        check(impl, x, w, b_enc, floor=floor, b_dec=b_dec, exact=True)
        check(impl, x.repeat(8, 1), w, b_enc, floor=floor, b_dec=b_dec, exact=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_at_the_floor_are_out(impl, dtype):
    x, w = torch.ones(40, 3, dtype=dtype), torch.ones(5, 3, dtype=dtype)
    b_enc = torch.tensor([0, 1, -3, -4, -3], dtype=dtype)
    floor = floors(1, dtype).new_tensor([3, 3, 0, -1, -0.0])
    for n in (3, 40):
        codes = slots_above(x[:n], w, b_enc, None, floor, wide=True, impl=impl)
        assert codes.indices.tolist() == [1] * n and codes.values.tolist() == [4] * n
        for inclusive, found in ((False, [1]), (True, [0, 1, 2, 4])):
            theta = floor.clamp(0)
            codes = threshold_encode(
                x[:n], w, b_enc, threshold=theta, inclusive=inclusive, impl=impl
            )
            assert codes.indices.tolist() == found * n
            # of those at 0 the value is 0
            assert codes.l0().tolist() == [1 + inclusive] * n


@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_encode_layouts(impl, dtype):
    x, w = randint(12, 20, dtype=dtype), randint(300, 20, dtype=dtype, seed=1)
    wide = randint(600, 80, dtype=dtype, seed=2)
    floor = floors(300, dtype)
    weights = {
        "[d, F].T": w.T.contiguous().T,
        "sliced": wide[::2, ::4],
        "offset": wide[1:301, 3:23],
        "expanded features": w[:1].expand(300, 20),
        "expanded dimensions": w[:, :1].expand(300, 20),
    }
    for weight in weights.values():
        check(impl, x, weight, floor=floor, exact=True)
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
        check(impl, tokens, w, vectors[0][::2], floor=floor, b_dec=vectors[1][::4], exact=True)
        check(impl, tokens, w, vectors[0][:1].expand(300), floor=floor, exact=True)


@pytest.mark.parametrize("n", [3, 20])
def test_encoders_of_no_width(impl, n):
    """h is the bias; the encoders that choose k divide by no width either."""
    x, w, b_enc = torch.ones(n, 0), torch.ones(50, 0), randn(50)
    codes = check(impl, x, w, b_enc, floor=torch.zeros(50), exact=True)
    assert torch.equal(codes.values[: codes.row_offsets[1]], b_enc[b_enc > 0])
    assert mikernels.topk_encode(x, w, b_enc, k=2, impl=impl).values.amax() == b_enc.amax()
    best = mikernels.batch_topk_encode(x, w, b_enc, k=2, impl=impl)[0].values
    assert best.amax() == b_enc.amax()


@pytest.mark.parametrize("transposed", [False, True])
def test_threshold_encode_over_several_weight_panels(level, transposed):
    floor = 60 + randn(24594, seed=2)
    check("cpp", *several_panels(transposed), randn(24594, seed=3), floor=floor)


def test_threshold_encode_over_several_chunks_of_tokens(level):
    # 64 MB hold 2048 rows of 2^14 numbers
    x = torch.zeros(2100, 2**14)
    x[:, 0] = torch.arange(2100.0).roll(1000)
    x[2050:, 1] = 1e6
    w = torch.zeros(3, 2**14)
    w[:, 0] = torch.tensor([1.0, -1.0, 0.5])
    w[2, 1] = 1
    floor = torch.tensor([700.0, -3.0, 900.0])
    codes = slots_above(x, w, None, None, floor, impl="cpp")
    h = x[:, :2] @ w[:, :2].T
    tokens, indices = (h > floor).nonzero(as_tuple=True)
    assert torch.equal(codes.tokens, tokens) and torch.equal(codes.indices, indices)
    assert torch.equal(codes.values, h[tokens, indices])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_encode_is_one_function_of_its_input(level, dtype):
    x, w = randn(301, 70, dtype=dtype), randn(2003, 70, dtype=dtype, seed=1)
    for floor in (8.0, 0.0):
        first = slots_above(x, w, None, None, floor, impl="cpp")
        for threads in (1, 2, 3, 2):
            with num_threads(threads):
                again = slots_above(x, w, None, None, floor, impl="cpp")
            assert identical(again.values, first.values)
            assert torch.equal(again.indices, first.indices)
            assert torch.equal(again.row_offsets, first.row_offsets)


@pytest.mark.parametrize("case", ["random", *ADVERSARIAL])
def test_threshold_encode_levels_agree(case):
    if len(mikernels.supported_levels()) < 2:
        pytest.skip(f"one level here: {mikernels.supported_levels()}")
    random = {"x": randn(65, 99), "w_enc": randn(1501, 99, seed=1), "floor": floors(1501)}
    arguments = random if case == "random" else at_scores(case)
    operands = [arguments.get(name) for name in ("x", "w_enc", "b_enc", "b_dec", "floor")]
    results = []
    for level in mikernels.supported_levels():
        with mikernels.force_level(level):
            results.append(threshold_encode_op(*operands, impl="cpp"))
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            assert identical(a, b)


def test_threshold_encode_does_not_form_the_score_matrix(peak_growth):
    # scores would take 512 MB, and those that are kept, 0.3 % of them, take 5 MB as codes
    call = "kept = mikernels.threshold_encode(x, w, threshold=12.0, impl='cpp').values"
    assert peak_growth(f"{call}; assert 3e3 < len(kept) < 1e6", LARGE[0]) < 64e6


POOL = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 3.0, NAN, INF, -INF])


@given(data=st.data())
def test_threshold_encode_property(impl, data):
    n, d, n_features = (
        data.draw(st.integers(low, 24), s) for low, s in ((0, "N"), (1, "d"), (1, "F"))
    )

    def draw(name, *shape):
        return torch.from_numpy(data.draw(hnp.arrays("float32", shape, elements=POOL), name))

    x, w = draw("x", n, d), draw("w_enc", d, n_features).T
    optional = {
        name: draw(name, size) if data.draw(st.booleans(), f"with {name}") else None
        for name, size in (("b_enc", n_features), ("b_dec", d))
    }
    floor = draw("floor", n_features).nan_to_num(0.5)
    check(impl, x, w, floor=floor, exact=True, **optional)


def test_threshold_encode_in_a_graph():
    def function(x, w, t):
        codes = threshold_encode(x, w, threshold=t, bandwidth=0.5)
        return mikernels.sparse_decode(codes, w), codes.l0(), codes.fired(), codes.values

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    w, t = randn(40, 5, seed=1).requires_grad_(), randn(40, seed=2).abs().requires_grad_()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for n in (6, 9):
            results = []
            for run in (function, compiled):
                found = run(randn(n, 5), w, t)
                gradients = torch.autograd.grad(found[0].square().sum(), (w, t))
                results.append([*found, *gradients])
            for actual, expected in zip(*results, strict=True):
                assert identical(actual.detach(), expected.detach())


# SAELens, its ste_to_input, Goreg, Tigges, and no straight-through gradient
FORMS = {
    "gated": {"bandwidth": 0.75},
    "both": {"bandwidth": 0.75, "input_gradient": "both"},
    "relu": {"bandwidth": 0.75, "input_gradient": "relu"},
    "score": {"bandwidth": 0.75, "inclusive": True, "threshold_gradient": "score"},
    "none": {"bandwidth": 0.0},
    "none, inclusive": {"bandwidth": 0.0, "inclusive": True},
    "none, relu": {"bandwidth": 0.0, "input_gradient": "relu"},
}


def gradients(output, leaves, g):
    found = torch.autograd.grad(output, leaves, g, allow_unused=True)
    return [torch.zeros_like(t) if d is None else d for t, d in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [5, 40])
def test_slots_hold_all_that_the_dense_function_has(impl, form, n):
    """Values and gradients are those of `jump` of all pre-activations; fp64, on a grid."""
    f, d = 70, 6
    leaves = [
        randn(*shape, dtype=torch.float64, seed=i).requires_grad_()
        for i, shape in enumerate(((n, d), (f, d), (f,), (d,)))
    ]
    t = randn(f, dtype=torch.float64, seed=9).abs().requires_grad_()
    for threshold in (t, t.detach()[3].clone().requires_grad_()):
        x, w, b_enc, b_dec = leaves
        codes = threshold_encode(
            x, w, b_enc, b_dec=b_dec, threshold=threshold, impl=impl, **FORMS[form]
        )
        dense = jump((x - b_dec) @ w.T + b_enc, threshold, **FORMS[form])
        assert torch.equal(codes.to_dense(), dense)
        assert (codes.l0() == (dense != 0).sum(-1)).all()
        g = randn(n, f, dtype=torch.float64, seed=5)
        ours = gradients(codes.to_dense(), (*leaves, threshold), g)
        theirs = gradients(dense, (*leaves, threshold), g)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
        assert bool(ours[-1].any()) == bool(FORMS[form]["bandwidth"])


@one_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_16_bit_inputs_are_decided_in_fp32(impl, form, dtype):
    """With and without a bandwidth the same features are active."""
    x, w = randn(40, 33, dtype=dtype), randn(501, 33, dtype=dtype, seed=1)
    t = randn(501, seed=2).abs() + 5
    codes = threshold_encode(x, w, threshold=t, impl=impl, **FORMS[form])
    h = slots_above(x, w, None, None, -INF, wide=True, impl=impl).values.reshape(40, 501)
    expected = torch.where(h > t, h, 0).to(dtype)
    assert codes.values.dtype == dtype and torch.equal(codes.to_dense(), expected)


def test_threshold_gradients_are_the_same_every_time(impl):
    x, w = randn(200, 20), randn(900, 20, seed=1)
    t = randn(900, seed=2).abs().requires_grad_()
    found = []
    for threads in (1, 2, 1):
        with num_threads(threads):
            codes = threshold_encode(x, w, threshold=t, bandwidth=0.5, impl=impl)
            found.append(torch.autograd.grad(codes.values.sum(), t)[0])
    assert identical(found[0], found[1]) and identical(found[0], found[2])


def test_slots_below_zero_have_gradients(impl):
    """No slot is masked for its value, as those of an encoder with relu are."""
    x = torch.ones(12, 2, requires_grad=True)
    w = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [-9.0, 0.0]], requires_grad=True)
    codes = slots_above(x, w, None, None, -2.0, impl=impl)
    assert codes.indices.tolist() == [0, 1, 2] * 12 and codes.values.tolist() == [1, -1, 0] * 12
    dx, dw = torch.autograd.grad(codes.values.sum(), (x, w))
    assert torch.equal(dx, torch.zeros(12, 2))
    assert dw.tolist() == [[12, 12]] * 3 + [[0, 0]]


X, W = torch.zeros(4, 3), torch.zeros(6, 3)
THETA = torch.ones(6)


@pytest.mark.parametrize(
    "x, w, options, error, message",
    [
        (X, W.T, {}, ValueError, r"got \[4, 3\] and \[3, 6\]; pass w_enc.T"),
        (X, W, {"b_enc": X[0]}, ValueError, r"b_enc must have shape \[6\], got \[3\]"),
        (X, W, {"b_dec": W[:, 0]}, ValueError, r"b_dec must have shape \[3\], got \[6\]"),
        (X, W.double(), {}, TypeError, r"w_enc must have the dtype of x .*float32.*got .*float64"),
        (X, W, {"impl": "fast"}, ValueError, "impl must be one of .*, got 'fast'"),
        (X, W, {"threshold": X[0]}, ValueError, r"threshold must have shape \[6\] .*got \[3\]"),
        (X, W, {"threshold": W}, ValueError, r"threshold must have shape \[6\] .*got \[6, 3\]"),
        (X, W, {"threshold": -0.5}, ValueError, "must not be NaN, and at least 0, got -0.5"),
        (X, W, {"threshold": THETA * NAN}, ValueError, "must not be NaN, and at least 0, got nan"),
        (X, W, {"threshold": THETA - 2}, ValueError, "must not be NaN, and at least 0, got -1.0"),
        (X, W, {"threshold": None}, TypeError, "must be a tensor or a number, got NoneType"),
        (X, W, {"threshold": True}, TypeError, "must be a tensor or a number, got bool"),
        (X, W, {"threshold": THETA.long()}, TypeError, r"floating, got torch.int64; pass thresh"),
        (X, W, {"threshold": THETA.to("meta")}, ValueError, "must be on cpu, got meta; move it"),
        (X, W, {"bandwidth": -1.0}, ValueError, "bandwidth must be finite and .*, got -1.0"),
        (X, W, {"bandwidth": NAN}, ValueError, "bandwidth must be finite and .*, got nan"),
        (X, W, {"bandwidth": None}, TypeError, "bandwidth must be a number, got NoneType"),
        (X, W, {"input_gradient": "dense"}, ValueError, "input_gradient must be .* got 'dense'"),
        (X, W, {"threshold_gradient": 1}, ValueError, "threshold_gradient must be one of .* got 1"),
    ],
)
def test_threshold_encode_errors(x, w, options, error, message):
    with pytest.raises(error, match=f"threshold_encode: .*{message}"):
        threshold_encode(x, w, **{"threshold": THETA, **options})


def test_slots_above_errors():
    for floor, error, message in (
        (NAN, ValueError, "floor must not be NaN, got nan"),
        (THETA * NAN, ValueError, "floor must not be NaN, got nan"),
        (X[0], ValueError, r"floor must have shape \[6\] .*, got \[3\]"),
        ("0", TypeError, "floor must be a tensor or a number, got str"),
        (THETA.bool(), TypeError, "floor must be floating, got torch.bool"),
    ):
        with pytest.raises(error, match=f"slots_above: {message}"):
            slots_above(X, W, None, None, floor)
    assert slots_above(X, W, None, None, THETA.double()).values.dtype == torch.float32
