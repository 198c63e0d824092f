# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from oracle import (
    DTYPES,
    assert_accurate,
    far_apart,
    identical,
    num_threads,
    randint,
    randn,
    unchanged,
)

from mikernels import block_norms
from mikernels._dispatch import accumulate_dtype

NAN, INF = float("nan"), float("inf")


def plain(a, b, dtype=torch.float64):
    products = torch.einsum("nrd,mds->nmrs", a.to(dtype), b.to(dtype))
    return products.square().sum((2, 3)).sqrt()


def check(impl, a, b, exact=False):
    with unchanged(a, b):
        norms = block_norms(a, b, impl=impl)
    acc = accumulate_dtype(a.dtype)
    assert norms.dtype == acc
    oracle = plain(a, b)
    if exact:
        torch.testing.assert_close(norms, oracle.to(acc), rtol=0, atol=0, equal_nan=True)
    else:
        sizes = plain(*(t.abs().nan_to_num(0, 0) for t in (a, b)))
        assert_accurate(norms, oracle, plain(a, b, acc), scale=sizes.max().item())
    return norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, r, d, m, s",
    [
        (1, 1, 1, 1, 1),
        (2, 3, 5, 4, 7),
        (12, 16, 40, 9, 16),
        (5, 33, 17, 30, 1),
        (30, 1, 65, 3, 34),
        (3, 64, 129, 4, 70),
    ],
)
def test_block_norms_accuracy(impl, dtype, n, r, d, m, s):
    check(impl, randn(n, r, d, dtype=dtype), randn(m, d, s, dtype=dtype, seed=1))


def test_block_norms_of_one_pair_are_the_norm_of_its_product(impl):
    a, b = randn(3, 6, 10, dtype=torch.float64), randn(2, 10, 4, dtype=torch.float64, seed=1)
    norms = block_norms(a, b, impl=impl)
    for i in range(3):
        for j in range(2):
            expected = torch.linalg.matrix_norm(a[i] @ b[j])
            assert_accurate(norms[i, j], expected, plain(a[i : i + 1], b[j : j + 1])[0, 0])


@pytest.mark.parametrize("zero", range(5))
def test_block_norms_empty(impl, zero):
    n, r, d, m, s = (0 if i == zero else size for i, size in enumerate((3, 4, 5, 6, 7)))
    assert check(impl, torch.ones(n, r, d), torch.ones(m, d, s), exact=True).shape == (n, m)


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_norms_layouts(impl, dtype):
    wide = randint(40, 24, 60, dtype=dtype)
    lefts = {
        "sliced": wide[::4, ::3, ::5],
        "offset": wide[3:13, 2:10, 7:19],
        "transposed": wide[:10, :12, :8].mT,
        "all reversed": wide[:12, :8, :10].permute(2, 1, 0),
        "expanded blocks": wide[:1, :8, :12].expand(10, 8, 12),
        "expanded rows": wide[:10, :1, :12].expand(10, 8, 12),
        "expanded columns": wide[:10, :8, :1].expand(10, 8, 12),
    }
    rights = {
        "dense": randint(7, 12, 9, dtype=dtype, seed=1),
        "transposed": randint(7, 9, 12, dtype=dtype, seed=1).mT,
        "strided": wide[1:8, ::2, 1:50:6],
        "d last": randint(7, 9, 12, dtype=dtype, seed=1).movedim(2, 1),
        "expanded": wide[:7, :12, :1].expand(7, 12, 9),
    }
    for a in lefts.values():
        for b in rights.values():
            check(impl, a, b, exact=dtype != torch.float64)


def test_block_norms_of_rows_far_apart(impl):
    far = far_apart(randint(2, 9))
    for a in (far[None], far[:, None], far.T[None]):
        b = randint(3, a.shape[2], 4, seed=1)
        assert torch.equal(block_norms(a, b, impl=impl), plain(a.contiguous(), b).float())
        left, right = b.mT, a.mT
        expected = plain(left.contiguous(), right.contiguous()).float()
        assert torch.equal(block_norms(left, right, impl=impl), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_norms_non_finite_stay_with_their_pairs(impl, dtype):
    a, b = randint(20, 5, 6, dtype=dtype), randint(15, 6, 4, dtype=dtype, seed=1)
    a[3, 4, 5], a[7, 0, 0], b[9, 2, 1] = NAN, INF, -INF
    norms = check(impl, a, b, exact=dtype != torch.float64)
    touched = torch.zeros(20, 15, dtype=torch.bool)
    touched[[3, 7]] = touched[:, 9] = True
    assert torch.equal(norms.isfinite(), ~touched)


def test_block_norms_are_one_function_of_their_input(impl):
    a, b = randn(31, 33, 40), randn(29, 40, 17, seed=1)
    first = block_norms(a, b, impl=impl)
    for threads in (1, 2, 2):
        with num_threads(threads):
            assert identical(block_norms(a, b, impl=impl), first)


def test_block_norms_are_no_part_of_a_graph(impl):
    a, b = randn(2, 3, 4).requires_grad_(), randn(2, 4, 3).requires_grad_()
    assert not block_norms(a, b, impl=impl).requires_grad


def test_block_norms_take_meta_tensors():
    norms = block_norms(*(torch.empty(s, device="meta").half() for s in ((5, 3, 4), (2, 4, 3))))
    assert norms.is_meta and norms.shape == (5, 2) and norms.dtype == torch.float32


A, B = torch.ones(2, 3, 4), torch.ones(5, 4, 6)


@pytest.mark.parametrize(
    "a, b, options, error, message",
    [
        (A[0], B, {}, ValueError, r"expected a \[n, r, d\] and b \[m, d, s\], got \[3, 4\] and"),
        (A, B[0], {}, ValueError, r"b \[m, d, s\], got \[2, 3, 4\] and \[4, 6\]"),
        (A, B.mT, {}, ValueError, r"b \[m, d, s\], got \[2, 3, 4\] and \[5, 6, 4\]"),
        (A, B.half(), {}, TypeError, r"b must have the dtype of a \(torch.float32\), got"),
        (A.long(), B, {}, TypeError, "a must be float32, .*, got torch.int64"),
        (A, B.to("meta"), {}, ValueError, r"b must be on the device of a \(cpu\), got meta"),
        (A, [1.0], {}, TypeError, "b must be a torch.Tensor, got list"),
        (A, B, {"impl": "fast"}, ValueError, "impl must be one of .*, got 'fast'"),
    ],
)
def test_block_norms_errors(a, b, options, error, message):
    with pytest.raises(error, match=message):
        block_norms(a, b, **options)
