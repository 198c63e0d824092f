# SPDX-License-Identifier: Apache-2.0
"""edge_scores; what it has to do with edge_mix is in test_edge_mix.py."""

import pytest
import torch
from edge_cases import SHAPES, allowed, check_scores, deltas, operands, plain_scores
from oracle import DTYPES, far_apart, identical, num_threads, randint, randn

from mikernels import edge_scores
from mikernels._dispatch import accumulate_dtype

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_edge_scores_accuracy(impl, dtype, shape):
    delta, grad, _, _ = operands(*shape, dtype)
    batch, _, writers, readers, _ = shape
    before = torch.arange(readers) * (writers + 3) // readers
    check_scores(impl, delta, grad)
    check_scores(impl, delta, grad, prefix=writers // 2)
    check_scores(impl, delta, grad, before, randn(3, batch, dtype=accumulate_dtype(dtype), seed=5))


@pytest.mark.parametrize("zero", range(5))
def test_edge_scores_empty(impl, zero):
    shape = [2, 3, 4, 5, 6]
    shape[zero] = 0
    delta, grad, _, _ = operands(*shape, make=randint)
    weights = randint(3, shape[0])
    for prefix in (None, 2, torch.full((shape[3],), 2)):
        for given in (None, weights, weights[:0]):
            check_scores(impl, delta, grad, prefix, given, exact=True)
    for given in (None, weights, weights[:0]):
        leaves = [t.clone().requires_grad_() for t in (delta, grad)]
        edge_scores(*leaves, weights=given, impl=impl).sum().backward()
        for leaf in leaves:
            assert leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("prefix", [0, 1, 4, 9, 12, -1, [0, 3, 9], [12, -1, 4]])
def test_edge_scores_prefix(impl, prefix):
    delta, grad, _, _ = operands(2, 3, 9, 3, 8, make=randint)
    before = prefix if isinstance(prefix, int) else torch.tensor(prefix)
    for weights in (None, randint(2, 2)):
        scores = check_scores(impl, delta, grad, before, weights, exact=True)
        assert not scores[..., ~allowed(9, before).expand(9, 3)].any()
    if not isinstance(prefix, int):
        every_other = torch.stack([before, before + 1], 1).flatten()[::2]
        check_scores(impl, delta, grad, every_other, exact=True)
        check_scores(impl, delta, grad, before[:1].expand(3), exact=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_scores_weights(impl, dtype):
    delta, grad, _, _ = operands(5, 2, 9, 4, 8, dtype, make=randint)
    whole = edge_scores(delta, grad, prefix=5, impl=impl)
    counts = torch.tensor([[1, 1, 1, 1, 1], [0, 3, 0, 1, 1], [0, 0, 0, 0, 0]])
    replicates = check_scores(impl, delta, grad, 5, counts, exact=True)
    assert torch.equal(replicates[0], whole) and not replicates[2].any()
    each = check_scores(impl, delta, grad, 5, torch.eye(5), exact=True)
    assert torch.equal(each.sum(0), whole)
    assert torch.equal(replicates[1], 3 * each[1] + each[3] + each[4])
    check_scores(impl, delta, grad, None, counts.double().T.contiguous().T, exact=True)
    check_scores(impl, delta, grad, None, counts[1:2].expand(70, 5), exact=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_scores_layouts(impl, dtype):
    wide = randint(4, 6, 40, 36, dtype=dtype)
    prefix = torch.tensor([0, 3, 10, 5, 20])
    for delta in deltas(wide).values():
        grad = wide[2:, 3:, 1:21:4, 9:18]
        for other in (grad, grad.mT.contiguous().mT, grad[:, :, :1].expand(2, 3, 5, 9)):
            check_scores(impl, delta, other, prefix, exact=True)
            check_scores(impl, other, delta, 3, randint(3, 2), exact=True)
        check_scores(impl, delta, delta, 7, exact=True)


def test_edge_scores_of_rows_far_apart(impl):
    far = far_apart(randint(2, 33))
    for buffer in (far[None, None], far[:, None, None], far[None, :, None], far.T[None, None]):
        near = buffer.contiguous()
        grad = randint(*near.shape, seed=1)
        assert torch.equal(edge_scores(buffer, grad, impl=impl).double(), plain_scores(near, grad))
        assert torch.equal(edge_scores(grad, buffer, impl=impl).double(), plain_scores(grad, near))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_edge_scores_add_to_out(impl, dtype, weighted):
    acc = accumulate_dtype(dtype)
    weights = randint(2, 3) if weighted else None
    pages = torch.full((2, 13, 40) if weighted else (13, 40), 7, dtype=acc)
    out, total = pages[..., ::2, ::4], 7
    for seed in range(3):
        delta, grad = (randint(3, 2, size, 9, dtype=dtype, seed=seed + size) for size in (7, 10))
        assert edge_scores(delta, grad, prefix=5, weights=weights, out=out, impl=impl) is out
        total = total + plain_scores(delta, grad, 5, weights).to(acc)
    assert torch.equal(out, total)
    assert (pages[..., 1::2, :] == 7).all() and (out[..., 5:, :] == 7).all()
    # pairs that are not allowed are not touched, whatever they hold
    out[..., 6, :] = NAN
    edge_scores(delta, grad, prefix=6, weights=weights, out=out, impl=impl)
    assert out[..., 6, :].isnan().all() and out[..., :6, :].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_scores_non_finite_stay_with_their_pairs(impl, dtype):
    delta, grad, _, _ = operands(3, 2, 40, 35, 9, dtype, make=randint)
    delta[1, 0, 20], delta[2, 1, 30, 3], grad[0, 1, 33, 2], grad[2, 0, 34, 5] = NAN, INF, -INF, NAN
    prefix = torch.arange(35) + 1
    scores = check_scores(impl, delta, grad, prefix, exact=True)
    clean = torch.ones(40, 35, dtype=torch.bool)
    clean[[20, 30]] = clean[:, [33, 34]] = False
    assert scores[clean].isfinite().all()
    assert torch.equal(scores[20].isnan(), torch.arange(35) >= 20)
    assert scores[:34, 33].isfinite().logical_not().all() and not scores[34:, 33].any()
    # a weight of 0 is a factor, not a filter, and no weight reaches a pair that is not allowed
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [INF, NAN, 1.0]])
    each = check_scores(impl, delta, grad, prefix, weights, exact=True)
    assert each[:2, clean].isfinite().all() and each[:, 20, 20:].isnan().all()
    assert not each[:, ~allowed(40, prefix)].any()


def test_edge_scores_are_one_function_of_their_input(impl):
    delta, grad, _, _ = operands(3, 7, 150, 110, 65)
    weights, prefix = randn(4, 3, seed=7), torch.arange(110) + 20
    first = [edge_scores(delta, grad, prefix=prefix, weights=w, impl=impl) for w in (None, weights)]
    for threads in (1, 2, 2):
        with num_threads(threads):
            for w, expected in zip((None, weights), first, strict=True):
                again = edge_scores(delta, grad, prefix=prefix, weights=w, impl=impl)
                assert identical(again, expected)


D, G, OUT = torch.ones(2, 3, 5, 6), torch.ones(2, 3, 4, 6), torch.zeros(5, 4)
PREFIX = torch.tensor([0, 1, 2, 5])


@pytest.mark.parametrize(
    "delta, grad, options, error, message",
    [
        (D[0], G, {}, ValueError, r"expected delta \[B, P, W, d\] .* \[3, 5, 6\] and \[2, 3, 4, 6"),
        (D, G[:1], {}, ValueError, r"of one B and P, got \[2, 3, 5, 6\] and \[1, 3, 4, 6\]"),
        (D, G[:, :2], {}, ValueError, r"of one B and P, got .* \[2, 2, 4, 6\]"),
        (D, G[..., :5], {}, ValueError, "grad must have the d of delta, 6, got 5"),
        (D, G.half(), {}, TypeError, r"grad must have the dtype of delta \(torch.float32\), got"),
        (D.int(), G, {}, TypeError, "delta must be float32, .*, got torch.int32"),
        (D, G.to("meta"), {}, ValueError, r"grad must be on the device of delta \(cpu\), got meta"),
        (D, [1.0], {}, TypeError, "grad must be a torch.Tensor, got list"),
        (D, G, {"prefix": PREFIX[:3]}, ValueError, r"prefix must have shape \[4\], got \[3\]"),
        (D, G, {"prefix": PREFIX.int()}, TypeError, "prefix must be .* int64 .*, got torch.int32"),
        (D, G, {"prefix": PREFIX.to("meta")}, TypeError, "prefix must be .* on cpu, got .* meta"),
        (D, G, {"prefix": 2.0}, TypeError, "prefix must be an int or .* int64 tensor.*got float"),
        (D, G, {"prefix": [0, 1, 2, 5]}, TypeError, "prefix must be an int or .*, got list"),
        (D, G, {"weights": D[:, 0, 0, 0]}, ValueError, r"weights must be \[Q, B\] .*, got \[2\]"),
        (D, G, {"weights": D[0, :, :3, 0]}, ValueError, r"with B = 2, got \[3, 3\]"),
        (D, G, {"out": OUT.T}, ValueError, r"out must have shape \[5, 4\], got \[4, 5\]"),
        (D, G, {"out": OUT.half()}, TypeError, "out must be torch.float32 .*, got torch.float16"),
        (D.double(), G.double(), {"out": OUT}, TypeError, "out must be torch.float64 for"),
        (D, G, {"out": OUT.to("meta")}, ValueError, "out must be on cpu, got meta; move it"),
        (D, G, {"out": OUT.clone().requires_grad_()}, ValueError, "out must not require grad"),
        (D, G, {"out": OUT, "weights": D[:, :2, 0, 0].T}, ValueError, r"shape \[2, 5, 4\]"),
        (D.clone().requires_grad_(), G, {"out": OUT}, ValueError, r"torch\.no_grad\(\), or leave"),
        (D, G.clone().requires_grad_(), {"out": OUT}, ValueError, "nothing is recorded"),
        (D, G, {"impl": "fast"}, ValueError, "impl must be one of .*, got 'fast'"),
    ],
)
def test_edge_scores_errors(delta, grad, options, error, message):
    with pytest.raises(error, match=message):
        edge_scores(delta, grad, **options)


def test_edge_scores_with_out_under_no_grad(impl):
    out = torch.zeros(5, 4)
    with torch.no_grad():
        edge_scores(D.clone().requires_grad_(), G.clone().requires_grad_(), out=out, impl=impl)
    assert (out == 36).all() and not out.requires_grad
