# SPDX-License-Identifier: Apache-2.0
"""The by-feature operators; test_autograd.py has the gradients that are made of them."""

import gradient_cases
import pytest
import torch
from gradient_cases import feature_sum, gather_dot
from one_level import one_impl, one_level
from oracle import (
    DTYPES,
    assert_accurate,
    identical,
    num_threads,
    randint,
    randn,
    random_indices,
    unchanged,
)

from mikernels import by_feature, topk_encode
from mikernels.ops.sae.gradients import (
    by_feature_op,
    feature_sum_op,
    gather_dot_op,
    sae_gradients_op,
)


@pytest.mark.parametrize(
    "m, n_features", [(0, 0), (0, 7), (1, 1), (97, 13), (1000, 70_000), (5000, 3)]
)
def test_by_feature_is_a_stable_counting_sort(impl, m, n_features):
    generator = torch.Generator().manual_seed(m)
    indices = torch.randint(max(n_features, 1), (m,), generator=generator)
    with unchanged(indices):
        offsets, order = by_feature_op(indices, n_features, impl=impl)
    assert offsets.dtype == order.dtype == torch.int64
    assert torch.equal(order, indices.argsort(stable=True))
    counts = torch.zeros(n_features, dtype=torch.int64).index_add_(
        0, indices, torch.ones_like(indices)
    )
    assert torch.equal(offsets.diff(), counts) and offsets[0] == 0
    strided = torch.stack([indices, indices + 5], 1)[:, 0]
    assert torch.equal(by_feature_op(strided, n_features, impl=impl)[1], order)


@one_impl
@pytest.mark.parametrize("index", [7, -1, 2**40])
def test_by_feature_of_an_index_out_of_range_raises(impl, index):
    with pytest.raises((RuntimeError, ValueError)):
        by_feature_op(torch.tensor([0, index, 3]), 7, impl=impl)


@pytest.mark.parametrize(
    "indices, n_features, error, message",
    [
        (torch.zeros(3), 7, TypeError, "indices must be int64, got torch.float32"),
        (torch.zeros(3, 2).long(), 7, ValueError, r"indices must be .*\[M\].*got \[3, 2\]"),
        (torch.zeros(3).long(), -1, ValueError, "n_features must be .*, got -1"),
    ],
)
def test_by_feature_errors(indices, n_features, error, message):
    with pytest.raises(error, match=message):
        by_feature(indices, n_features)


SHAPES = [(0, 3, 5, 2), (1, 1, 1, 1), (33, 17, 101, 7), (257, 130, 40, 9), (5, 768, 300, 16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d, n_features, k", SHAPES)
def test_gather_dot(impl, dtype, n, d, n_features, k):
    rows, w = randn(n, d, dtype=dtype), randn(n_features, d, dtype=dtype, seed=1)
    indices = random_indices(n, k, n_features)
    with unchanged(rows, w, indices):
        out = gather_dot_op(rows, w, indices, None, None, impl=impl)
    eager = gather_dot(rows, w, indices)
    assert_accurate(out, gather_dot(rows.double(), w.double(), indices), eager)
    transposed = w.T.contiguous().T, indices.T.contiguous().T
    expanded = gather_dot_op(rows[:, :1].expand(n, d), *transposed, None, None, impl=impl)
    full = gather_dot_op(rows[:, :1].expand(n, d).contiguous(), w, indices, None, None, impl=impl)
    assert torch.equal(expanded, full)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d, n_features, k", SHAPES)
def test_feature_sum(impl, dtype, n, d, n_features, k):
    coefficients, rows = randn(n, k, dtype=dtype), randn(n, d, dtype=dtype, seed=1)
    indices = random_indices(n, k, n_features)
    indices[:, 0] = n_features - 1  # a hot feature
    slots = by_feature_op(indices.reshape(-1), n_features)
    with unchanged(coefficients, rows, *slots):
        actual = feature_sum_op(coefficients, rows, *slots, None, impl=impl)
    oracle = feature_sum(coefficients.double(), rows.double(), indices, n_features)
    eager = feature_sum(coefficients, rows, indices, n_features)
    for result, exact, in_eager in zip(actual, oracle, eager, strict=True):
        assert_accurate(result, exact, in_eager)
    transposed = coefficients.T.contiguous().T, rows[:, :1].expand(n, d)
    strided = feature_sum_op(*transposed, *slots, None, impl=impl)
    dense = feature_sum_op(coefficients, transposed[1].contiguous(), *slots, None, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


def sae_operands(n, d, n_features, k, dtype, data=randn):
    values = data(n, k, dtype=dtype).relu()
    indices = random_indices(n, k, n_features)
    dy, x, w_dec = (
        data(rows, d, dtype=dtype, seed=seed) for seed, rows in enumerate((n, n, n_features), 1)
    )
    return values, indices, *by_feature_op(indices.reshape(-1), n_features), None, dy, x, w_dec


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d, n_features, k", SHAPES)
def test_sae_gradients(impl, dtype, n, d, n_features, k, accumulate):
    operands = sae_operands(n, d, n_features, k, dtype)
    values, indices, _, _, _, dy, x, w_dec = operands
    start = randn(n_features, d), randn(n_features, d, seed=1), randn(n_features, seed=2)
    out = [t.clone() for t in start] if accumulate else [torch.empty_like(t) for t in start]
    with unchanged(*operands):
        sae_gradients_op(*operands, None, None, *out, accumulate, impl=impl)

    def plain(values, dy, x, w_dec, start):
        dv = torch.where(values != 0, gather_dot(dy, w_dec, indices), 0)
        dw_dec, _ = feature_sum(values, dy, indices, n_features)
        results = dw_dec, *feature_sum(dv, x, indices, n_features)
        return [r + s if accumulate else r for r, s in zip(results, start, strict=True)]

    wide = [t.double() for t in (values, dy, x, w_dec)]
    oracle = plain(*wide, [t.double() for t in start])
    # sums are kept in fp32 buffers: eager's fp32 is the yardstick, whatever the operands' dtype
    eager = plain(*(t.float() for t in wide), start)
    for result, exact, in_eager in zip(out, oracle, eager, strict=True):
        assert_accurate(result, exact, in_eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sae_gradients_layouts(impl, dtype):
    operands = sae_operands(12, 8, 60, 5, dtype, randint)
    dense = [torch.zeros(60, 8), torch.zeros(60, 8), torch.zeros(60)]
    sae_gradients_op(*operands, None, None, *dense, False, impl=impl)
    for layout in (lambda t: t.mT.contiguous().mT, lambda t: torch.stack([t, t + 1], -1)[..., 0]):
        strided = [t if t is None or t.dim() < 2 else layout(t) for t in operands]
        out = [torch.zeros(60, 8), torch.zeros(60, 8), torch.zeros(60)]
        sae_gradients_op(*strided, None, None, *out, False, impl=impl)
        assert all(identical(a, b) for a, b in zip(out, dense, strict=True))


def test_sae_gradients_with_a_low_precision_shadow_of_the_decoder(impl):
    operands = list(sae_operands(33, 17, 101, 7, torch.float32, randint))
    out, shadowed = ([torch.empty(101, 17), torch.empty(101, 17), torch.empty(101)] for _ in "12")
    sae_gradients_op(*operands, None, None, *out, False, impl=impl)
    operands[-1] = operands[-1].bfloat16()
    sae_gradients_op(*operands, None, None, *shadowed, False, impl=impl)
    assert all(identical(a, b) for a, b in zip(out, shadowed, strict=True))


def test_gradients_are_one_function_of_their_input(impl):
    operands = sae_operands(501, 33, 700, 8, torch.float32)
    values, indices, offsets, order, _, dy, _, w_dec = operands

    def run():
        out = [torch.empty(700, 33), torch.empty(700, 33), torch.empty(700)]
        sae_gradients_op(*operands, None, None, *out, False, impl=impl)
        sums = feature_sum_op(values, dy, offsets, order, None, impl=impl)
        return *out, *sums, gather_dot_op(dy, w_dec, indices, None, None, impl=impl)

    first = run()
    for threads in (1, 2, 2):
        with num_threads(threads):
            assert all(identical(a, b) for a, b in zip(run(), first, strict=True))


BAD_SLOTS = {
    "order out of range": lambda o, i: (o, i.clone().fill_(99)),
    "negative order": lambda o, i: (o, i - 1),
    "short order": lambda o, i: (o, i[:-1]),
    "offsets past the end": lambda o, i: (o * 2, i),
    "negative offsets": lambda o, i: (o - 1, i),
    "descending offsets": lambda o, i: (o.flip(0), i),
    "int32": lambda o, i: (o.int(), i.int()),
}


@one_level
@pytest.mark.parametrize("case", BAD_SLOTS)
def test_feature_sum_of_broken_slots_raises(level, case):
    coefficients, rows = randint(6, 3), randint(6, 5)
    slots = BAD_SLOTS[case](*by_feature_op(random_indices(6, 3, 9).reshape(-1), 9))
    feature_sum_op.resolve("cpp", rows.device)
    with pytest.raises(RuntimeError):
        feature_sum_op(coefficients, rows, *slots, None)


@one_level
@pytest.mark.parametrize("index", [9, -1, 2**40])
def test_gather_dot_of_an_index_out_of_range_raises(level, index):
    gather_dot_op.resolve("cpp", torch.device("cpu"))
    with pytest.raises(RuntimeError, match="indices must be in"):
        gather_dot_op(randn(2, 3), randn(9, 3), torch.tensor([[0, 1], [2, index]]), None, None)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", gradient_cases.FORMS)
def test_sae_gradients_of_levels_widths_and_given_gradients(impl, dtype, form, accumulate):
    for sizes in gradient_cases.WIDTHS:
        o = gradient_cases.operands(*sizes, dtype, **gradient_cases.FORMS[form])
        gradient_cases.check(o, impl, accumulate=accumulate)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sae_gradients_of_levels_layouts(impl, dtype):
    gradient_cases.check_layouts(dtype, impl)


def test_sae_gradients_read_what_is_selected(impl):
    gradient_cases.check_skips(impl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_level_is_none(impl, dtype):
    gradient_cases.check_one_level_is_none(dtype, impl)


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_dots_are_the_dots(impl, dtype, levels):
    gradient_cases.check_given_dots(dtype, impl, levels=levels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_dot_by_level(impl, dtype):
    gradient_cases.check_dots_by_level(dtype, impl)


@pytest.mark.parametrize("form", gradient_cases.FORMS)
def test_sae_gradients_of_levels_are_one_function_of_their_input(impl, form):
    o = gradient_cases.operands(101, 33, 21, 40, 4, torch.float32, **gradient_cases.FORMS[form])
    first = o.run(impl)
    for threads in (1, 2, 2):
        with num_threads(threads):
            assert all(map(identical, o.run(impl), first))


@one_level
@pytest.mark.parametrize("bad", [3, -1, 2**40, -(2**62)])
def test_a_level_out_of_range_raises(level, bad):
    o = gradient_cases.operands(5, 3, 3, 9, 2, torch.float32, levels=3)
    o.levels[4] = bad
    for impl in ("reference", "cpp"):
        with pytest.raises((RuntimeError, ValueError), match=r"levels must be in 0\.\.2, got"):
            o.run(impl)
        with pytest.raises((RuntimeError, ValueError), match=r"levels must be in 0\.\.2, got"):
            gather_dot_op(o.dy, o.w_dec, o.indices, None, o.levels, impl=impl)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_slots_at_zero_take_nothing_from_rows_without_numbers(impl, value):
    rows = torch.ones(2, 4)
    rows[0] = value
    coefficients, indices = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[0, 1], [1, 2]])
    dw, db = feature_sum_op(
        coefficients, rows, *by_feature(indices.reshape(-1), 3), None, impl=impl
    )
    assert torch.equal(dw, torch.tensor([0.0, 2.0, 0.0])[:, None].expand(3, 4))
    assert torch.equal(db, torch.tensor([0.0, 2.0, 0.0]))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_gradients_of_clamped_slots_are_zero_whatever_comes_back(impl, value):
    x = randn(6, 8).requires_grad_()
    w = randn(30, 8, seed=1).requires_grad_()
    codes = topk_encode(x, w, torch.full((30,), -3.0), k=20, impl=impl)
    clamped = codes.values == 0
    assert clamped.any() and not clamped.all()
    dense = codes.values.detach().sign()
    expected = torch.autograd.grad(codes.values, (x, w), dense, retain_graph=True)
    actual = torch.autograd.grad(codes.values, (x, w), dense.masked_fill(clamped, value))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
