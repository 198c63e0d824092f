# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from oracle import DTYPES, identical, num_threads, randint, randn, unchanged
from pairwise_cases import INF, NAN, among, assert_found

from mikernels import edge_scores, edge_topk
from mikernels._dispatch import accumulate_dtype


def before(writers, readers, prefix):
    prefix = writers if prefix is None else prefix
    return (torch.arange(writers)[:, None] < prefix).expand(writers, readers)


def check_topk(impl, delta, grad, prefix=None, **options):
    with unchanged(delta, grad, prefix if torch.is_tensor(prefix) else None):
        found = edge_topk(delta, grad, prefix=prefix, **options, impl=impl)
    scores = torch.einsum("bpwd,bprd->wr", delta.double(), grad.double())
    scores = scores.to(accumulate_dtype(delta.dtype))
    expected = among(scores, before(*scores.shape, prefix), **options)
    assert_found(found, expected, scores.shape)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, positions, writers, readers, d",
    [(1, 1, 1, 1, 1), (2, 3, 70, 41, 17), (4, 5, 9, 12, 1031), (3, 7, 12, 130, 33)],
)
def test_edge_topk_is_exact(impl, dtype, batch, positions, writers, readers, d):
    for make in (randn, randint):
        delta = make(batch, positions, writers, d, dtype=dtype)
        grad = make(batch, positions, readers, d, dtype=dtype, seed=1)
        prefix = torch.arange(readers) * (writers + 2) // readers
        for k in (1, 40, 10000):
            check_topk(impl, delta, grad, k=k)
            check_topk(impl, delta, grad, prefix, k=k, by="value")
        check_topk(impl, delta, grad, writers // 2, k=9)
        check_topk(impl, delta, grad, prefix, k=300, min_value=2)


def test_edge_topk_are_the_strongest_edge_scores(impl):
    delta, grad, prefix = randint(2, 3, 20, 8), randint(2, 3, 15, 8, seed=1), torch.arange(15) + 1
    scores = edge_scores(delta, grad, prefix=prefix, impl=impl)
    found = edge_topk(delta, grad, prefix=prefix, k=1000, impl=impl)
    assert len(found) == 120 and torch.equal(found.to_dense(), scores)


@pytest.mark.parametrize("zero", range(5))
def test_edge_topk_empty(impl, zero):
    shape = [2, 3, 4, 5, 6]
    shape[zero] = 0
    batch, positions, writers, readers, d = shape
    delta, grad = torch.ones(batch, positions, writers, d), torch.ones(batch, positions, readers, d)
    for prefix in (None, 0, 2, torch.arange(readers)):
        check_topk(impl, delta, grad, prefix, k=7)


def test_edge_topk_layouts_and_non_finite(impl):
    wide = randint(4, 6, 40, 36)
    grad, prefix = wide[2:, 3:, 1:36:2, 9:18], torch.arange(18)
    for delta in (wide[::2, ::2, ::2, ::4], wide[:2, :3, :9, :20].mT, wide[:1, :3, :20, :9]):
        delta = delta.expand(2, 3, 20, 9)
        check_topk(impl, delta, grad, prefix, k=50)
        delta = delta.clone()
        # writers 18 and 19 come before no reader
        delta[0, 1, 18:], delta[1, 2, 10, 3], delta[0, 0, 5, 5] = NAN, NAN, INF
        assert check_topk(impl, delta, grad, prefix, k=50).values[:7].isnan().all()


def test_edge_topk_is_one_function_of_its_input(impl):
    delta, grad = randn(2, 3, 150, 33), randn(2, 3, 130, 33, seed=1)
    first = edge_topk(delta, grad, k=200, prefix=90, impl=impl)
    for threads in (1, 2, 2):
        with num_threads(threads):
            again = edge_topk(delta, grad, k=200, prefix=90, impl=impl)
        assert identical(again.values, first.values)
        assert torch.equal(again.rows, first.rows) and torch.equal(again.cols, first.cols)


D, PREFIX = torch.ones(2, 3, 4, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "operands, options, error, message",
    [
        ((D[0], D), {}, ValueError, r"expected delta \[B, P, W, d\] and grad"),
        ((D, D[..., :2]), {}, ValueError, "grad must have the d of delta, 3, got 2"),
        ((D, D.half()), {}, TypeError, "grad must have the dtype of delta"),
        ((D, D), {"prefix": PREFIX[:3]}, ValueError, r"prefix must have shape \[4\], got"),
        ((D, D), {"prefix": PREFIX.int()}, TypeError, "prefix must be .*, got torch.int32"),
        ((D, D), {"k": 0}, ValueError, "k must be at least 1, got 0"),
    ],
)
def test_edge_topk_errors(operands, options, error, message):
    with pytest.raises(error, match=message):
        edge_topk(*operands, **{"k": 2, **options})
