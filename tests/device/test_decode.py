# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from oracle import assert_accurate, far_apart, identical, randn, random_indices, unchanged

from mikernels import SparseCodes, _triton, sparse_decode
from mikernels.ops.sae.decode import decode_error_op, decode_op

NAN = float("nan")


def oracle(values, indices, w, bias):
    terms = values[..., None] * w[indices]
    y = torch.where(values[..., None] != 0, terms, 0).sum(-2)
    return y if bias is None else y + bias


def check(values, indices, w, bias=None):
    with unchanged(values, indices, w, bias):
        y = sparse_decode(SparseCodes(values, indices, w.shape[0]), w, bias, impl="triton")
    wide = [None if t is None else t.double() for t in (values, w, bias)]
    exact = oracle(wide[0], indices, *wide[1:])
    assert y.dtype == values.dtype
    assert_accurate(y, exact, oracle(values, indices, w, bias))


SIZES = [(0, 5, 9, 2), (1, 1, 1, 1), (3, 17, 64, 5), (5, 600, 99, 32), (2, 1025, 40, 7)]


def operands(device, dtype, n, d, f, k):
    values, w = randn(n, k, dtype=dtype), randn(f, d, dtype=dtype, seed=1)
    bias, indices = randn(d, dtype=dtype, seed=2), random_indices(n, k, f)
    return tuple(t.to(device) for t in (values, indices, w, bias))


@pytest.mark.parametrize("n, d, f, k", SIZES)
def test_decode_is_accurate(device, dtype, n, d, f, k):
    values, indices, w, bias = operands(device, dtype, n, d, f, k)
    check(values, indices, w)
    check(values, indices, w, bias)


def test_decode_layouts(device):
    values, indices, w, bias = operands(device, torch.float32, 6, 40, 50, 4)
    check(values[::2], indices[1::2], w.T.contiguous().T, bias[::1])
    check(values[:, ::2], indices[:, 1::2], w[:, 3:20], bias[3:20])
    check(values[:1].expand(6, 4), indices, w, bias[:1].expand(40))


def test_inactive_slots_add_nothing(device):
    values, indices, w, _ = operands(device, torch.float32, 4, 30, 9, 6)
    indices = indices.sort(-1).values
    w[0], values[indices == 0] = NAN, 0
    check(values, indices, w)
    values[0, 0], w[1] = NAN, float("inf")
    check(values, indices, w)


def test_decode_beyond_2_to_the_31_elements(device):
    values, indices, w, bias = operands(device, torch.float16, 3, 20, 2, 2)
    x = randn(3, 20, seed=5).to(device)
    for operator, more in ((decode_op, ()), (decode_error_op, (x,))):
        near = operator(values, indices, None, w, bias, *more, impl="triton")
        far = operator(values, indices, None, far_apart(w), bias, *more, impl="triton")
        for a, b in zip(near, far, strict=True):
            assert identical(a, b)


def test_decode_prefixes(device):
    values, indices, w, bias = operands(device, torch.float32, 5, 24, 60, 8)
    codes = SparseCodes(values, indices, 60)
    y = sparse_decode(codes, w, bias, prefixes=[10, 30, 60], impl="triton")
    for nested, f in zip(y, (10, 30, 60), strict=True):
        kept = values.masked_fill(indices >= f, 0)
        torch.testing.assert_close(nested, oracle(kept, indices, w, bias))


@pytest.mark.parametrize("n, d, f, k", SIZES)
def test_decode_error(device, dtype, n, d, f, k):
    values, indices, w, bias = operands(device, dtype, n, d, f, k)
    x = randn(n, d, seed=5).to(device)
    error, squares = decode_error_op(values, indices, None, w, bias, x, impl="triton")
    exact = oracle(values.double(), indices, w.double(), bias.double()) - x.double()
    eager = oracle(values.float(), indices, w.float(), bias.float()) - x
    assert_accurate(error, exact, eager, scale=float(k))
    assert_accurate(squares, exact.square().sum(-1), eager.square().sum(-1))


def test_decode_gradients(device):
    values, indices, w, bias = operands(device, torch.float32, 4, 20, 33, 5)
    leaves = [t.requires_grad_() for t in (values, w, bias)]
    dy = randn(4, 20, seed=7).to(device)
    y = sparse_decode(SparseCodes(values, indices, 33), w, bias, impl="triton")
    found = torch.autograd.grad(y, leaves, dy)
    expected = torch.autograd.grad(oracle(values, indices, w, bias), leaves, dy)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_decode_is_deterministic(device):
    values, indices, w, bias = operands(device, torch.float32, 9, 700, 200, 16)
    codes = SparseCodes(values, indices, 200)
    first = sparse_decode(codes, w, bias, impl="triton")
    for _ in range(1 if _triton.interpreting() else 20):
        assert identical(sparse_decode(codes, w, bias, impl="triton"), first)
