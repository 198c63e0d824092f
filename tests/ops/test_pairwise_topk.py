# SPDX-License-Identifier: Apache-2.0
import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, far_apart, identical, num_threads, randint, randn
from pairwise_cases import (
    INF,
    MANY,
    NAN,
    POWERS,
    SPECIAL,
    best_pairs,
    check,
    every_way,
    exact_scores,
    near_ties,
)
from screened import COARSE_LEVELS, screened

from mikernels import pairwise_topk
from mikernels.ops.pairs.pairwise_topk import pairwise_topk_op

SHAPES = [  # B, n, m, D
    (1, 1, 1, 1),
    (1, 3, 5, 7),
    (2, 97, 33, 17),
    (1, 130, 210, 64),
    (3, 40, 41, 129),
    (1, 1, 257, 768),
    (1, 200, 180, 5),
    (1, 20011, 3, 2),
    (1, 2, 20011, 3),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, n, m, d", SHAPES)
def test_pairwise_topk_is_exact(impl, dtype, batch, n, m, d):
    a, b = randn(batch, n, d, dtype=dtype), randn(batch, m, d, dtype=dtype, seed=1)
    check(impl, a, b, k=1)
    check(impl, a, b, k=33, by="value")
    check(impl, a[0], b[0], k=200, upper=True)
    small = min((a, b), key=lambda t: t.shape[1])
    check(impl, small, k=20)
    check(impl, small, k=50, by="value", upper=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairwise_topk_ties(impl, dtype):
    a, b = randint(41, 6, dtype=dtype), randint(37, 6, dtype=dtype, seed=1)
    every_way(impl, a, b, 1, 7, 64, 65, 500, 1516, 1517, 2**63 - 1)
    every_way(impl, randint(2, 9, 6, dtype=dtype), randint(2, 70, 6, dtype=dtype, seed=1), 5, 99)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", SPECIAL)
def test_pairwise_topk_special_values(impl, dtype, case):
    a, b = randint(50, 6, dtype=dtype), randint(43, 6, dtype=dtype, seed=1)
    SPECIAL[case](a, b)
    check(impl, a, b, k=1)
    every_way(impl, a, b, 30)


def test_pairwise_topk_of_nan_that_no_pair_may_have(impl):
    a, b = randint(9, 4), randint(9, 4, seed=1)
    a[8], b[0] = NAN, NAN
    assert check(impl, a, b, k=100, upper=True).values.isfinite().all()


@pytest.mark.parametrize("name", POWERS)
def test_pairwise_topk_magnitudes(impl, name):
    a, b = randn(60, 20), randn(53, 20, seed=1)
    scaled, other = a * POWERS[name](60)[:, None], b * POWERS[name](53)[:, None]
    # scores overflow to inf and underflow to 0 in fp32, where they tie
    for left, right in ((scaled, b), (scaled, other), (scaled, None)):
        for k in (1, 40, 1200):
            check(impl, left, right, k=k)
            check(impl, left, right, k=k, by="value")
    columns = a * POWERS[name](20)
    check(impl, columns, b * POWERS[name](20).flip(0), k=40)


@pytest.mark.parametrize("relative", [1e-3, 1e-5, 1e-6])
def test_pairwise_topk_near_ties(impl, relative):
    every_way(impl, *near_ties(relative), 1, 40)


@pytest.mark.parametrize("level", COARSE_LEVELS, indirect=True)
@pytest.mark.parametrize("case", MANY)
def test_pairwise_topk_in_bytes_first(level, case):
    a, b, options = MANY[case]()
    with screened() as pairs:
        check("cpp", a, b, **options)
    assert pairs[0] > 0
    check("cpp", a.T.contiguous().T.bfloat16(), None if b is None else b.bfloat16(), **options)


@pytest.mark.parametrize("relative", [1e-5, 1e-6])
def test_pairwise_topk_near_ties_do_defeat_sixteen_bits(relative):
    tensors = near_ties(relative)
    exact = best_pairs(exact_scores(*tensors), 40)[1:]
    steps = [2**15 / t.abs().amax(-1, keepdim=True) for t in tensors]
    for low in (
        [t.bfloat16().float() for t in tensors],
        [(t * s).round() / s for t, s in zip(tensors, steps, strict=True)],
    ):
        chosen = best_pairs(exact_scores(*low), 40)[1:]
        wrong = {*zip(*chosen, strict=True)} - {*zip(*exact, strict=True)}
        assert len(wrong) > 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairwise_topk_of_long_rows(impl, dtype):
    a, b = randn(12, 20011, dtype=dtype), randn(2, 9, 9973, dtype=dtype, seed=1)
    check(impl, a, k=30)
    check(impl, b, b[:, 3:], k=30, by="value")


@pytest.mark.parametrize("by", ["abs", "value"])
@pytest.mark.parametrize("least", [-INF, -3, 0, 2, 2.5, 1e9, INF])
def test_pairwise_topk_min_value(impl, by, least):
    a, b = randint(41, 6), randint(37, 6, seed=1)
    a[3, 0], b[7, 1] = INF, NAN
    for k in (1, 50, 5000):
        check(impl, a, b, k=k, by=by, min_value=least)
        check(impl, a, k=k, by=by, min_value=least, upper=True)


def test_pairwise_topk_min_value_is_in_the_dtype_of_the_scores(impl):
    # 0.7 is above its fp32, 0.3 below
    for number in (0.3, 0.7):
        a, one = torch.tensor([[number]]), torch.ones(1, 1)
        assert len(pairwise_topk(a, one, k=1, min_value=number, impl=impl)) == 1
        assert len(pairwise_topk(a, one, k=1, min_value=number + 1e-7, impl=impl)) == 0


@pytest.mark.parametrize("batch, n, m, d", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_pairwise_topk_empty(impl, batch, n, m, d):
    a, b = torch.ones(batch, n, d), torch.ones(batch, m, d)
    every_way(impl, a, b, 1, 5, 20)
    every_way(impl, a.sum(0), b.sum(0), 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairwise_topk_layouts(impl, dtype):
    wide, b = randint(6, 60, 80, dtype=dtype), randint(3, 37, 20, dtype=dtype, seed=1)
    for a in (
        wide[::2, ::2, ::4],
        wide[1:4, 3:44, 7:27],
        wide[:3, :20, :47].mT,
        randint(31, 20, 3, dtype=dtype).movedim(2, 0),
        wide[:1, :41, :20].expand(3, 41, 20),
        wide[:3, :1, :20].expand(3, 39, 20),
        wide[:3, :39, :1].expand(3, 39, 20),
    ):
        check(impl, a, b.mT.contiguous().mT, k=50)
        check(impl, b, a, k=50, by="value")
        check(impl, a, k=50, upper=True)
        check(impl, a[1], k=50)


def test_pairwise_topk_of_rows_far_apart(impl):
    far, b = far_apart(randint(2, 33)), randint(5, 33, seed=1)
    for rows, other in ((far, b), (far.T, b[:, :2]), (far[:, None], b[:2, None])):
        near = rows.contiguous()
        for found in (
            pairwise_topk(rows, other, k=7, impl=impl),
            pairwise_topk(other, rows, k=7, impl=impl),
        ):
            flipped = found.shape[0] == other.shape[-2]
            values, _, _ = best_pairs(
                exact_scores(*((other, near) if flipped else (near, other))), 7
            )
            assert torch.equal(found.values, values)


def test_pairwise_topk_is_one_function_of_its_input(impl):
    a, b = randn(301, 65), randn(280, 65, seed=1)
    a[200:] = a[:101]
    first = pairwise_topk(a, b, k=500, impl=impl), pairwise_topk(a, k=500, impl=impl)
    for threads in (1, 2, 2):
        with num_threads(threads):
            again = pairwise_topk(a, b, k=500, impl=impl), pairwise_topk(a, k=500, impl=impl)
        for one, other in zip(again, first, strict=True):
            assert identical(one.values, other.values)
            assert torch.equal(one.rows, other.rows) and torch.equal(one.cols, other.cols)


@pytest.mark.parametrize("k", [5, 1000, 2**40])
def test_pairwise_topk_raw_operator_pads(impl, k):
    a, b, ranks = randn(1, 2, 9, 3), randn(1, 2, 7, 3, seed=1), torch.arange(9)
    rule = None, None, ranks, ranks[:7], k, "abs", 0.5, False
    values, rows, cols = pairwise_topk_op(a, b, *rule, impl=impl)
    assert len(values) == len(rows) == len(cols) == min(k, 63)
    found = int((rows >= 0).sum())
    assert 0 < found <= 21
    assert (rows[found:] == -1).all() and (cols[found:] == -1).all() and not values[found:].any()
    assert (rows[:found] < cols[:found]).all()


def test_pairwise_topk_is_no_part_of_a_graph(impl):
    a = randn(5, 3).requires_grad_()
    assert not pairwise_topk(a, k=3, upper=True, impl=impl).values.requires_grad


def test_pairwise_topk_does_not_form_the_matrix(peak_growth):
    # it would take 400 MB
    call = "mikernels.pairwise_topk(x, w, k=1000, impl='cpp')"
    assert peak_growth(call, "torch.randn(10000, 8), torch.randn(10000, 8)") < 64e6


POOL = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 3.0, NAN, INF, -INF])
# powers of two: sums stay exact, scores overflow and underflow
EXPONENTS = st.sampled_from([0, 1, -3, 100, -100, -140])


@given(data=st.data())
def test_pairwise_topk_property(impl, data):
    n, m, d, batch = (
        data.draw(st.integers(0, high), s) for high, s in ((14, "n"), (14, "m"), (5, "D"), (2, "B"))
    )

    def draw(name, rows):
        x = data.draw(hnp.arrays("float32", (batch, d, rows), elements=POOL), name)
        powers = data.draw(hnp.arrays("int64", rows, elements=EXPONENTS), f"powers of {name}")
        x = torch.from_numpy(x) * 2.0 ** torch.from_numpy(powers)
        return x.mT if data.draw(st.booleans(), f"{name} transposed") else x.mT.contiguous()

    a = draw("a", n)
    b = draw("b", m) if data.draw(st.booleans(), "with b") else None
    check(
        impl,
        a,
        b,
        k=data.draw(st.integers(1, 220), "k"),
        by=data.draw(st.sampled_from(["abs", "value"]), "by"),
        upper=data.draw(st.booleans(), "upper"),
        min_value=data.draw(st.sampled_from([None, 0.0, 1.0, -2.0, 1e30]), "min_value"),
    )


A = torch.ones(4, 3)


@pytest.mark.parametrize(
    "a, options, error, message",
    [
        (A[0], {}, ValueError, r"a must be \[n, D\] or \[B, n, D\], got \[3\]"),
        (A, {"b": A.T}, ValueError, r"b must have the B and D of a \[4, 3\], got \[3, 4\]"),
        (A, {"b": A[None]}, ValueError, r"b must have the B and D of a .*, got \[1, 4, 3\]"),
        (
            A[None],
            {"b": A.expand(2, 4, 3)},
            ValueError,
            r"b must .* \[1, 4, 3\], got \[2, 4, 3\]",
        ),
        (A, {"b": A.half()}, TypeError, r"b must have the dtype of a \(torch.float32\), got"),
        (A, {"b": A.to("meta")}, ValueError, r"b must be on the device of a \(cpu\), got meta"),
        (A.long(), {}, TypeError, r"a must be float32, .*, got torch.int64; .*a\.float\(\)"),
        (A.tolist(), {}, TypeError, "a must be a torch.Tensor, got list"),
        (A, {"k": 0}, ValueError, "k must be at least 1, got 0"),
        (A, {"k": -3}, ValueError, "k must be at least 1, got -3"),
        (A, {"k": 2.0}, TypeError, "k must be an int, got float"),
        (A, {"k": True}, TypeError, "k must be an int, got bool"),
        (A, {"by": "max"}, ValueError, r"by must be one of \['abs', 'value'\], got 'max'"),
        (A, {"min_value": NAN}, ValueError, "min_value must be a number or None, got nan"),
        (A, {"impl": "fast"}, ValueError, "impl must be one of .*, got 'fast'"),
    ],
)
def test_pairwise_topk_errors(a, options, error, message):
    with pytest.raises(error, match=message):
        pairwise_topk(a, **{"k": 2, **options})
