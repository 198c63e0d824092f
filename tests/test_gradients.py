# SPDX-License-Identifier: Apache-2.0
from itertools import product

import pytest
import torch
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

from mikernels import SparseCodes, by_feature, row_topk, sparse_decode, topk_encode
from mikernels._dispatch import resolve_impl
from mikernels.ops.gradients import by_feature_op, feature_sum_op, gather_dot_op, sae_gradients_op

N, D, F, K = 3, 3, 19, 2


def leaves(*shapes, dtype=torch.float64):
    return [randn(*s, dtype=dtype, seed=i).detach().requires_grad_() for i, s in enumerate(shapes)]


INDICES = random_indices(N, K, F)
SCALE = randn(F, dtype=torch.float64, seed=9)

# name -> (function of impl and differentiable tensors, their shapes)
FUNCTIONS = {
    "row_topk": (lambda impl, s: row_topk(s, K, impl=impl)[0], [(N, F)]),
    "row_topk sorted": (lambda impl, s: row_topk(s, K, sorted=True, impl=impl)[0], [(N, F)]),
    "topk_encode": (
        lambda impl, x, w, b, c: topk_encode(x, w, b, k=K, b_dec=c, impl=impl).values,
        [(N, D), (F, D), (F,), (D,)],
    ),
    "topk_encode relu=False": (
        lambda impl, x, w, c: topk_encode(x, w, k=K, b_dec=c, relu=False, impl=impl).values,
        [(N, D), (F, D), (D,)],
    ),
    "topk_encode scale": (
        lambda impl, x, w, b: topk_encode(x, w, b, k=K, scale=SCALE, impl=impl).values,
        [(1, N, D), (F, D), (F,)],
    ),
    "topk_encode transposed": (
        lambda impl, x, w: topk_encode(x, w.T, k=K, impl=impl).values,
        [(N, D), (D, F)],
    ),
    "sparse_decode": (
        lambda impl, v, w, b: sparse_decode(SparseCodes(v, INDICES, F), w, b, impl=impl),
        [(N, K), (F, D), (D,)],
    ),
    "sparse_decode prefixes": (
        lambda impl, v, w, b: sparse_decode(
            SparseCodes(v, INDICES, F), w, b, prefixes=[3, 9, F], impl=impl
        ),
        [(N, K), (F, D), (D,)],
    ),
    "sparse_decode transposed": (
        lambda impl, v, w: sparse_decode(SparseCodes(v, INDICES, F), w.T, impl=impl),
        [(N, K), (D, F)],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_gradcheck(impl, name):
    function, shapes = FUNCTIONS[name]
    inputs = leaves(*shapes)
    assert torch.autograd.gradcheck(lambda *args: function(impl, *args), inputs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_any_subset_of_the_inputs(impl, name):
    function, shapes = FUNCTIONS[name]
    inputs = leaves(*shapes)
    output = function(impl, *inputs)
    dy = randn(*output.shape, dtype=torch.float64, seed=7)
    everything = torch.autograd.grad(output, inputs, dy)
    for needed in product([False, True], repeat=len(inputs)):
        some = [t.detach().requires_grad_(wanted) for t, wanted in zip(inputs, needed, strict=True)]
        output = function(impl, *some)
        assert output.requires_grad == any(needed)
        if any(needed):
            output.backward(dy)
        for t, wanted, expected in zip(some, needed, everything, strict=True):
            assert (t.grad is not None) == wanted
            assert not wanted or torch.equal(t.grad, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_expanded_and_strided_output_gradients(impl, name):
    function, shapes = FUNCTIONS[name]
    inputs = leaves(*shapes)
    output = function(impl, *inputs)
    ones = torch.ones_like(output)
    # .sum() hands back one number expanded to the output's shape
    dense = torch.autograd.grad(output, inputs, ones, retain_graph=True)
    expanded = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
    strided = torch.autograd.grad(output, inputs, ones.mT.contiguous().mT)
    for a, b, c in zip(dense, expanded, strided, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_twice_raises(impl, name):
    function, shapes = FUNCTIONS[name]
    inputs = leaves(*shapes)
    first = torch.autograd.grad(
        function(impl, *inputs).square().sum(), inputs, create_graph=True, allow_unused=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.sum() for g in first if g.requires_grad).backward()


def sae(impl, x, w_enc, b_enc, w_dec, b_dec, k):
    codes = topk_encode(x, w_enc, b_enc, k=k, b_dec=b_dec, impl=impl)
    return codes, sparse_decode(codes, w_dec, b_dec, impl=impl)


def dense_sae(codes, x, w_enc, b_enc, w_dec, b_dec):
    """The same SAE as plain torch, with the selection of `codes` as a mask."""
    h = (x - b_dec) @ w_enc.T + b_enc
    mask = torch.zeros(h.shape, dtype=torch.bool).scatter_(-1, codes.indices, True)
    return torch.where(mask, h.relu(), 0) @ w_dec + b_dec


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d, n_features, k", [(1, 1, 1, 1), (33, 17, 203, 5), (67, 96, 300, 40)])
def test_gradients_equal_dense_autograd(impl, dtype, n, d, n_features, k):
    shapes = [(n, d), (n_features, d), (n_features,), (n_features, d), (d,)]
    inputs = leaves(*shapes, dtype=dtype)
    dy = randn(n, d, dtype=dtype, seed=9)
    with unchanged(*inputs, dy):
        codes, y = sae(impl, *inputs, k)
        gradients = torch.autograd.grad(y, inputs, dy)
    eager_y = dense_sae(codes, *inputs)
    eager = torch.autograd.grad(eager_y, inputs, dy)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    wide_y = dense_sae(codes, *wide)
    oracle = torch.autograd.grad(wide_y, wide, dy.double())
    assert_accurate(y, wide_y, eager_y)
    for gradient, exact, in_eager in zip(gradients, oracle, eager, strict=True):
        assert_accurate(gradient, exact, in_eager)


def test_gradients_of_slots_at_zero_are_zero(impl):
    x, w_enc = leaves((6, 8), (90, 8), dtype=torch.float32)
    bias = torch.full((90,), -1e3)
    bias[:2] = 1e3
    codes = topk_encode(x, w_enc, bias, k=5, impl=impl)
    assert (codes.l0() == 2).all()
    codes.values.backward(torch.full_like(codes.values, 3.0))
    assert torch.equal(w_enc.grad[2:], torch.zeros(88, 8))
    torch.testing.assert_close(w_enc.grad[:2], (3 * x.detach()).sum(0).expand(2, 8))
    torch.testing.assert_close(x.grad, (3 * w_enc.detach()[:2]).sum(0).expand(6, 8))


def test_gradients_show_nan(impl):
    x, w_enc = leaves((3, 8), (90, 8), dtype=torch.float32)
    with torch.no_grad():
        x[1, 2] = float("nan")
    topk_encode(x, w_enc, k=5, impl=impl).values.sum().backward()
    assert x.grad[[0, 2]].isfinite().all()
    assert w_enc.grad.isnan().any()


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


def gather_dot(rows, w, indices):
    return (rows[:, None] * w[indices]).sum(-1)


def feature_sum(coefficients, rows, indices, n_features):
    dw = rows.new_zeros(n_features, rows.shape[1])
    terms = coefficients[..., None] * rows[:, None]
    dw.index_add_(0, indices.reshape(-1), terms.reshape(-1, rows.shape[1]))
    db = rows.new_zeros(n_features).index_add_(0, indices.reshape(-1), coefficients.reshape(-1))
    return dw, db


SHAPES = [(0, 3, 5, 2), (1, 1, 1, 1), (33, 17, 101, 7), (257, 130, 40, 9), (5, 768, 300, 16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d, n_features, k", SHAPES)
def test_gather_dot(impl, dtype, n, d, n_features, k):
    rows, w = randn(n, d, dtype=dtype), randn(n_features, d, dtype=dtype, seed=1)
    indices = random_indices(n, k, n_features)
    with unchanged(rows, w, indices):
        out = gather_dot_op(rows, w, indices, impl=impl)
    eager = gather_dot(rows, w, indices)
    assert_accurate(out, gather_dot(rows.double(), w.double(), indices), eager)
    transposed = w.T.contiguous().T, indices.T.contiguous().T
    expanded = gather_dot_op(rows[:, :1].expand(n, d), *transposed, impl=impl)
    full = gather_dot_op(rows[:, :1].expand(n, d).contiguous(), w, indices, impl=impl)
    assert torch.equal(expanded, full)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d, n_features, k", SHAPES)
def test_feature_sum(impl, dtype, n, d, n_features, k):
    coefficients, rows = randn(n, k, dtype=dtype), randn(n, d, dtype=dtype, seed=1)
    indices = random_indices(n, k, n_features)
    indices[:, 0] = n_features - 1  # a hot feature
    slots = by_feature_op(indices.reshape(-1), n_features)
    with unchanged(coefficients, rows, *slots):
        actual = feature_sum_op(coefficients, rows, *slots, impl=impl)
    oracle = feature_sum(coefficients.double(), rows.double(), indices, n_features)
    eager = feature_sum(coefficients, rows, indices, n_features)
    for result, exact, in_eager in zip(actual, oracle, eager, strict=True):
        assert_accurate(result, exact, in_eager)
    transposed = coefficients.T.contiguous().T, rows[:, :1].expand(n, d)
    strided = feature_sum_op(*transposed, *slots, impl=impl)
    dense = feature_sum_op(coefficients, transposed[1].contiguous(), *slots, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


def sae_operands(n, d, n_features, k, dtype, data=randn):
    values = data(n, k, dtype=dtype).relu()
    indices = random_indices(n, k, n_features)
    dy, x, w_dec = (
        data(rows, d, dtype=dtype, seed=seed) for seed, rows in enumerate((n, n, n_features), 1)
    )
    return values, indices, *by_feature_op(indices.reshape(-1), n_features), dy, x, w_dec


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d, n_features, k", SHAPES)
def test_sae_gradients(impl, dtype, n, d, n_features, k, accumulate):
    operands = sae_operands(n, d, n_features, k, dtype)
    values, indices, _, _, dy, x, w_dec = operands
    start = randn(n_features, d), randn(n_features, d, seed=1), randn(n_features, seed=2)
    out = [t.clone() for t in start] if accumulate else [torch.empty_like(t) for t in start]
    with unchanged(*operands):
        sae_gradients_op(*operands, *out, accumulate, impl=impl)

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
    sae_gradients_op(*operands, *dense, False, impl=impl)
    for layout in (lambda t: t.mT.contiguous().mT, lambda t: torch.stack([t, t + 1], -1)[..., 0]):
        strided = [t if t.dim() < 2 else layout(t) for t in operands]
        out = [torch.zeros(60, 8), torch.zeros(60, 8), torch.zeros(60)]
        sae_gradients_op(*strided, *out, False, impl=impl)
        assert all(identical(a, b) for a, b in zip(out, dense, strict=True))


def test_sae_gradients_with_a_low_precision_shadow_of_the_decoder(impl):
    operands = list(sae_operands(33, 17, 101, 7, torch.float32, randint))
    out, shadowed = ([torch.empty(101, 17), torch.empty(101, 17), torch.empty(101)] for _ in "12")
    sae_gradients_op(*operands, *out, False, impl=impl)
    operands[-1] = operands[-1].bfloat16()
    sae_gradients_op(*operands, *shadowed, False, impl=impl)
    assert all(identical(a, b) for a, b in zip(out, shadowed, strict=True))


def test_gradients_are_one_function_of_their_input(impl):
    operands = sae_operands(501, 33, 700, 8, torch.float32)
    values, indices, offsets, order, dy, _, w_dec = operands

    def run():
        out = [torch.empty(700, 33), torch.empty(700, 33), torch.empty(700)]
        sae_gradients_op(*operands, *out, False, impl=impl)
        sums = feature_sum_op(values, dy, offsets, order, impl=impl)
        return *out, *sums, gather_dot_op(dy, w_dec, indices, impl=impl)

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


@pytest.mark.parametrize("case", BAD_SLOTS)
def test_feature_sum_of_broken_slots_raises(level, case):
    coefficients, rows = randint(6, 3), randint(6, 5)
    slots = BAD_SLOTS[case](*by_feature_op(random_indices(6, 3, 9).reshape(-1), 9))
    resolve_impl(feature_sum_op, "cpp", rows.device)
    with pytest.raises(RuntimeError):
        feature_sum_op(coefficients, rows, *slots)


@pytest.mark.parametrize("index", [9, -1, 2**40])
def test_gather_dot_of_an_index_out_of_range_raises(level, index):
    resolve_impl(gather_dot_op, "cpp", torch.device("cpu"))
    with pytest.raises(RuntimeError, match="indices must be in"):
        gather_dot_op(randn(2, 3), randn(9, 3), torch.tensor([[0, 1], [2, index]]))
