# SPDX-License-Identifier: Apache-2.0
import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_level import one_impl
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

from mikernels import SparseCodes, sparse_decode

NAN, INF = float("nan"), float("inf")


def dense_decode(values, indices, w, bias):
    """Gather and sum in the dtype of the arguments; slots at 0 add nothing, whatever their row."""
    terms = values[..., None] * w[indices]
    y = torch.where(values[..., None] != 0, terms, 0).sum(-2)
    return y if bias is None else y + bias


def check(impl, values, indices, w, bias=None, exact=False):
    with unchanged(values, indices, w, bias):
        codes = SparseCodes(values, indices, w.shape[0])
        y = sparse_decode(codes, w, bias, impl=impl)
    assert y.dtype == values.dtype
    wide = [None if t is None else t.double() for t in (values, w, bias)]
    oracle = dense_decode(wide[0], indices, *wide[1:])
    if exact:
        assert torch.equal(y, oracle.to(y.dtype))
    else:
        assert_accurate(y, oracle, dense_decode(values, indices, w, bias))
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, d, n_features, k",
    [
        (0, 17, 50, 3),
        (1, 1, 1, 1),
        (1, 768, 1009, 16),
        (31, 3, 257, 5),
        (33, 17, 64, 64),
        (67, 131, 523, 1),
        (257, 40, 999, 32),
        (5, 2305, 300, 64),
    ],
)
def test_decode_accuracy(impl, dtype, n, d, n_features, k):
    values, w = randn(n, k, dtype=dtype), randn(n_features, d, dtype=dtype, seed=1)
    indices = random_indices(n, k, n_features)
    check(impl, values, indices, w)
    check(impl, values.relu(), indices, w, randn(d, dtype=dtype, seed=2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_layouts(impl, dtype):
    values, w = randint(12, 5, dtype=dtype), randint(60, 8, dtype=dtype, seed=1)
    wide = randint(120, 32, dtype=dtype, seed=2)
    indices = random_indices(12, 5, 60)
    for weight in (
        w.T.contiguous().T,
        wide[::2, ::4],
        wide[1:61, 3:11],
        w[:1].expand(60, 8),
        w[:, :1].expand(60, 8),
    ):
        check(impl, values, indices, weight, wide[0, ::4], exact=True)
        check(impl, values, indices, weight, wide[0, :1].expand(8), exact=True)
    slots = values.T.contiguous().T, indices.T.contiguous().T
    check(impl, *slots, w, exact=True)
    check(impl, values[:1].expand(12, 5), indices[:1].expand(12, 5), w, exact=True)
    check(impl, values[:, :1].expand(12, 5), indices, w, exact=True)
    check(impl, values[::2, 1:4], indices[::2, 1:4], w, exact=True)
    check(impl, values[3], indices[3], w, exact=True)
    check(impl, values.reshape(3, 2, 2, 5), indices.reshape(3, 2, 2, 5), w, exact=True)
    check(impl, values[:0].reshape(2, 0, 5), indices[:0].reshape(2, 0, 5), w, exact=True)


def test_decode_hot_feature(impl):
    indices = random_indices(100, 4, 50)
    indices[:, 0] = 49
    check(impl, randn(100, 4), indices, randn(50, 9, seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_non_finite_stays_with_its_token(impl, dtype):
    values, w = randint(6, 3, dtype=dtype), randint(30, 5, dtype=dtype, seed=1)
    values[values == 0] = 1
    indices = torch.arange(18).reshape(6, 3)
    w[4, 2], w[7, 1], values[3, 0], values[4, 1] = NAN, INF, NAN, -INF
    y = check(impl, values, indices, w)
    assert y[[0, 5]].isfinite().all() and not y[1:5].isfinite().all(-1).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_skips_rows_of_inactive_slots(impl, dtype):
    values, w = randint(6, 3, dtype=dtype), randint(30, 5, dtype=dtype, seed=1)
    values[:, 1] = 0
    w[7] = NAN
    indices = torch.tensor([1, 7, 3]).expand(6, 3)
    assert check(impl, values, indices, w, exact=True).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_prefixes(impl, dtype):
    n, d, n_features, k = 33, 17, 101, 9
    prefixes = [1, 7, 50, 101]
    values, w = randn(n, k, dtype=dtype), randn(n_features, d, dtype=dtype, seed=1)
    b_dec, indices = randn(d, dtype=dtype, seed=2), random_indices(n, k, n_features)
    codes = SparseCodes(values, indices, n_features)
    with unchanged(values, w, b_dec):
        nested = sparse_decode(codes, w, b_dec, prefixes=prefixes, impl=impl)
    assert nested.shape == (4, n, d)
    for y, prefix in zip(nested, prefixes, strict=True):
        inside = torch.where(indices < prefix, values, 0)
        oracle = dense_decode(inside.double(), indices, w.double(), b_dec.double())
        assert_accurate(y, oracle, dense_decode(inside, indices, w, b_dec))


def test_decode_prefixes_keep_non_finite_values_to_their_own_prefix(impl):
    values = torch.tensor([[1.0, NAN], [2.0, INF]])
    codes = SparseCodes(values, torch.tensor([[0, 5], [1, 5]]), 6)
    narrow, full = sparse_decode(codes, torch.ones(6, 2), prefixes=[4, 6], impl=impl)
    assert torch.equal(narrow, torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    assert full[0].isnan().all() and full[1].isinf().all()


def test_decode_is_one_function_of_its_input(impl):
    codes = SparseCodes(randn(501, 16), random_indices(501, 16, 3000), 3000)
    w, b_dec = randn(3000, 97, seed=1), randn(97, seed=2)
    first = sparse_decode(codes, w, b_dec, impl=impl)
    for threads in (1, 2, 2):
        with num_threads(threads):
            assert identical(sparse_decode(codes, w, b_dec, impl=impl), first)
    assert identical(sparse_decode(codes[100:131], w, b_dec, impl=impl), first[100:131])


POOL = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 3.0, NAN, INF, -INF])


@given(data=st.data())
def test_decode_property(impl, data):
    n, d, n_features = (
        data.draw(st.integers(low, 24), size) for low, size in ((0, "N"), (1, "d"), (1, "F"))
    )
    k = data.draw(st.integers(1, n_features), "k")
    arrays = {"values": (n, k), "w": (d, n_features), "b_dec": (d,)}
    values, w, b_dec = (
        torch.from_numpy(data.draw(hnp.arrays("float32", shape, elements=POOL), name))
        for name, shape in arrays.items()
    )
    indices = random_indices(n, k, n_features, seed=data.draw(st.integers(0, 9), "seed"))
    check(impl, values, indices, w.T, data.draw(st.sampled_from([None, b_dec]), "b_dec"))


@one_impl
@pytest.mark.parametrize("index", [6, -1, 2**40, -(2**40)])
def test_decode_of_an_index_out_of_range_raises(impl, index):
    with pytest.raises(ValueError, match=rf"SparseCodes: indices must be in 0..5, got {index}"):
        SparseCodes(torch.ones(2, 2), torch.tensor([[0, 1], [2, index]]), 6)
    codes = SparseCodes(torch.ones(2, 2), torch.tensor([[0, 1], [2, 3]]), 6)
    codes.indices[1, 1] = index
    with pytest.raises((IndexError, RuntimeError, ValueError), match=r"ind(ex|ices)"):
        sparse_decode(codes, torch.ones(6, 3), impl=impl)


CODES, W = SparseCodes(torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.int64), 6), torch.ones(6, 3)


@pytest.mark.parametrize(
    "codes, w, options, error, message",
    [
        (CODES, W.T, {}, ValueError, r"codes have 6 features, w_dec has 3 rows; pass w_dec as"),
        (CODES, W[0], {}, ValueError, r"w_dec must be \[F, d\], got \[3\]"),
        (CODES, W, {"b_dec": W[:, 0]}, ValueError, r"b_dec must have shape \[3\], got \[6\]"),
        (CODES, W, {"prefixes": [3, 7]}, ValueError, r"ascend within 1\.\.6, got \[3, 7\]"),
        (CODES, W, {"prefixes": [3, 3]}, ValueError, r"ascend within 1\.\.6, got \[3, 3\]"),
        (CODES, W, {"prefixes": [0, 3]}, ValueError, r"ascend within 1\.\.6, got \[0, 3\]"),
        (CODES, W, {"prefixes": []}, ValueError, r"prefixes must .*, got \[\]"),
        (CODES, W.double(), {}, TypeError, r"values must have the dtype of w_dec .*float64"),
        (CODES, W.long(), {}, TypeError, r"w_dec must be float32, .*, got torch.int64"),
        (CODES, W, {"b_dec": W[0].half()}, TypeError, "b_dec must have the dtype of w_dec"),
        (CODES, W.to("meta"), {}, ValueError, r"values must be on the device of w_dec \(meta\)"),
        (CODES, W, {"impl": "fast"}, ValueError, "impl must be one of .*, got 'fast'"),
    ],
)
def test_decode_errors(codes, w, options, error, message):
    with pytest.raises(error, match=message):
        sparse_decode(codes, w, **options)
