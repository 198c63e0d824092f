# SPDX-License-Identifier: Apache-2.0
"""edge_mix, and what edges are: one bilinear map, exact where the model is linear."""

import pytest
import torch
from edge_cases import SHAPES, check_mix, deltas, operands, plain_mix, plain_scores
from oracle import DTYPES, assert_accurate, far_apart, identical, num_threads, randint, randn

from mikernels import edge_mix, edge_scores
from mikernels._dispatch import accumulate_dtype

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_edge_mix_accuracy(impl, dtype, shape):
    delta, _, mask, base = operands(*shape, dtype)
    check_mix(impl, None, delta, mask)
    check_mix(impl, base, delta, mask)
    check_mix(impl, base[:, :, 0], delta, mask)
    check_mix(impl, base[:, :, :1], delta, mask.sign())


@pytest.mark.parametrize("zero", range(5))
def test_edge_mix_empty(impl, zero):
    shape = [2, 3, 4, 5, 6]
    shape[zero] = 0
    delta, _, mask, base = operands(*shape, make=randint)
    for own in (None, base, base.sum(2)):
        check_mix(impl, own, delta, mask, exact=True)
        leaves = [t.clone().requires_grad_() for t in (delta, mask)]
        base_leaf = None if own is None else own.clone().requires_grad_()
        edge_mix(base_leaf, *leaves, impl=impl).sum().backward()
        for leaf in (*leaves, *([] if own is None else [base_leaf])):
            assert leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_mix_layouts(impl, dtype):
    wide, mask = randint(4, 6, 40, 36, dtype=dtype), randint(20, 40, dtype=dtype, seed=1)
    for delta in deltas(wide).values():
        for m in (mask[:10, :7], mask[::2, ::5], mask.T[:10], mask[:1, :1].expand(10, 7)):
            check_mix(impl, None, delta, m, exact=True)
            check_mix(impl, wide[1:3, 1:4, 7, 4:13], delta, m, exact=True)
            check_mix(impl, wide[2:, :3, : m.shape[1], ::4], delta, m, exact=True)
            check_mix(impl, wide[:1, :1, 5, ::4].expand(2, 3, 9), delta, m, exact=True)
            check_mix(impl, wide[:2, :3, :9, :1].mT, delta, m, exact=True)


def test_edge_mix_of_rows_far_apart(impl):
    far = far_apart(randint(2, 33))
    for buffer in (far[None, None], far[:, None, None], far[None, :, None], far.T[None, None]):
        near = buffer.contiguous()
        mask = randint(near.shape[2], 3, seed=2)
        y = edge_mix(buffer[:, :, 0], buffer, mask, impl=impl)
        assert torch.equal(y.double(), plain_mix(near[:, :, 0], near, mask))


@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_mix_non_finite_stay_at_their_place(impl, dtype):
    delta, _, mask, base = operands(3, 2, 40, 35, 9, dtype, make=randint)
    delta[1, 0, 20, 7], base[2, 1, 33, 2], base[0, 0, 3, 4] = NAN, INF, -INF
    y = check_mix(impl, base, delta, mask, exact=True)
    touched = torch.zeros(y.shape, dtype=torch.bool)
    touched[1, 0, :, 7] = touched[2, 1, 33, 2] = touched[0, 0, 3, 4] = True
    assert torch.equal(y.isfinite(), ~touched)
    mask[20, 4], mask[3, 5] = NAN, INF
    y = check_mix(impl, None, delta, mask, exact=True)
    assert y[:, :, 4].isnan().all() and y[0, :, :4].isfinite().all()


def test_edge_mix_is_one_function_of_its_input(impl):
    delta, _, mask, base = operands(3, 7, 150, 110, 65)
    first = edge_mix(base, delta, mask, impl=impl)
    for threads in (1, 2, 2):
        with num_threads(threads):
            assert identical(edge_mix(base, delta, mask, impl=impl), first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges_are_one_bilinear_map(impl, dtype):
    acc = accumulate_dtype(dtype)
    delta, grad, mask, base = operands(3, 4, 21, 17, 33, dtype)
    mask.requires_grad_()
    edge_mix(base, delta, mask, impl=impl).backward(grad)
    assert identical(mask.grad, edge_scores(delta, grad, impl=impl).to(dtype))
    # and both gradients of the scores are mixes of the other side
    leaves = [t.clone().requires_grad_() for t in (delta, grad)]
    prefix, weights = torch.arange(17) + 2, randn(2, 3, dtype=acc, seed=8)
    for given in (None, weights):
        ds = randn(*(() if given is None else (2,)), 21, 17, dtype=acc, seed=9)

        def gradients(wanted, given=given, ds=ds):
            copies = [t.detach().to(wanted).requires_grad_() for t in leaves]
            scores = plain_scores(*copies, prefix, given, dtype=wanted)
            return torch.autograd.grad(scores, copies, ds.to(wanted))

        scores = edge_scores(*leaves, prefix=prefix, weights=given, impl=impl)
        actual, oracle = torch.autograd.grad(scores, leaves, ds), gradients(torch.float64)
        for one, exact, eager in zip(actual, oracle, gradients(acc), strict=True):
            assert one.dtype == dtype
            # the mask of a mix is in the dtype of its rows
            assert_accurate(one, exact, eager.to(dtype))


def writers_and_readers():
    """A linear residual stream: two layers and an unembedding read what was written before."""
    d, layers = 6, [randint(6, 6, dtype=torch.float64, seed=i) for i in range(2)]
    unembed = randint(d, dtype=torch.float64, seed=3)

    def run(embedded, added=(0, 0, 0)):
        stream, written, read = embedded, [embedded], []
        for layer, change in zip(layers, added, strict=False):
            read.append(stream + change)
            written.append(read[-1] @ layer)
            stream = stream + written[-1]
        read.append(stream + added[2])
        return written, read, (read[-1] @ unembed).sum()

    return run


def test_edge_scores_are_the_effects_of_patches_in_a_linear_model(impl):
    run = writers_and_readers()
    clean, corrupted = (randint(2, 4, 6, dtype=torch.float64, seed=s) for s in (5, 6))
    leaf = clean.clone().requires_grad_()
    written, read, metric = run(leaf)
    grad = torch.stack(torch.autograd.grad(metric, read), 2)
    other = run(corrupted)[0]
    delta = torch.stack([b - a.detach() for a, b in zip(written, other, strict=True)], 2)
    before = torch.tensor([1, 2, 3])
    scores = edge_scores(delta, grad, prefix=before, impl=impl)
    for writer in range(3):
        for reader in range(3):
            mask = torch.zeros(3, 3, dtype=torch.float64)
            mask[writer, reader] = 1
            patched = run(clean, edge_mix(None, delta, mask, impl=impl).unbind(2))[2]
            effect = patched - metric.detach() if writer < before[reader] else 0
            assert scores[writer, reader] == effect
    # every edge into the output at once is the corrupted run
    total = scores[:, 2].sum()
    assert total == run(corrupted)[2] - metric.detach()
    every_edge = torch.ones(3, 3, dtype=torch.float64).triu()
    inputs = edge_mix(torch.stack(read, 2).detach(), delta, every_edge, impl=impl)
    assert torch.equal(inputs, torch.stack(run(corrupted)[1], 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edge_scores_are_complete(impl, dtype):
    delta, grad, _, _ = operands(2, 3, 20, 9, 12, dtype, make=randint)
    prefix = torch.arange(9) * 2 + 1
    scores = edge_scores(delta, grad, prefix=prefix, impl=impl)
    for reader, before in enumerate(prefix.tolist()):
        change = delta[:, :, :before].float().sum(2)
        assert scores[:, reader].sum() == (change * grad[:, :, reader].float()).sum()


def test_edges_compile():
    prefix, weights = torch.tensor([0, 1, 3, 4, 2]), randn(2, 2, seed=7)

    def function(delta, grad, base, mask):
        scores = edge_scores(delta, grad, prefix=prefix, weights=weights)
        plain = edge_scores(delta, edge_mix(base, delta, mask), prefix=3)
        return (scores.square().sum(0) + plain.square()).sum()

    delta, grad, mask, base = operands(2, 3, 4, 5, 6)
    leaves = [t.requires_grad_() for t in (delta, grad, base[:, :, 0].contiguous(), mask)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(*leaves), leaves)
    for one, other in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_edges_take_meta_tensors():
    delta, grad, mask, base = (t.bfloat16().to("meta") for t in operands(2, 3, 4, 5, 6))
    y = edge_mix(base, delta, mask)
    assert y.is_meta and y.shape == (2, 3, 5, 6) and y.dtype == torch.bfloat16
    scores = edge_scores(delta, grad, prefix=2, weights=torch.ones(7, 2))
    assert scores.is_meta and scores.shape == (7, 4, 5) and scores.dtype == torch.float32


D, M, B = torch.ones(2, 3, 5, 6), torch.ones(5, 4), torch.ones(2, 3, 4, 6)


@pytest.mark.parametrize(
    "base, delta, mask, options, error, message",
    [
        (
            None,
            D[0],
            M,
            {},
            ValueError,
            r"expected delta \[B, P, W, d\] and mask \[W, R\], got \[3",
        ),
        (None, D, M[0], {}, ValueError, r"and mask \[W, R\], got \[2, 3, 5, 6\] and \[4\]"),
        (None, D, M.T, {}, ValueError, r"and mask \[W, R\], got \[2, 3, 5, 6\] and \[4, 5\]"),
        (B[:1], D, M, {}, ValueError, r"base must have shape \[2, 3, 4, 6\], got \[1, 3, 4, 6\]"),
        (
            B[:, :, 0, :3],
            D,
            M,
            {},
            ValueError,
            r"base must have shape \[2, 3, .*6\], got \[2, 3, .*3\]",
        ),
        (B[:, :, :2], D, M, {}, ValueError, r"base must have shape .*, got \[2, 3, 2, 6\]"),
        (B[0, 0], D, M, {}, ValueError, r"base must have shape .*, got \[4, 6\]"),
        (
            B.half(),
            D,
            M,
            {},
            TypeError,
            r"base must have the dtype of delta \(torch.float32\), got",
        ),
        (None, D, M.double(), {}, TypeError, "mask must have the dtype of delta"),
        (None, D, M > 0, {}, TypeError, "mask must be float32, .*, got torch.bool"),
        (None, D.long(), M, {}, TypeError, "delta must be float32, .*, got torch.int64"),
        (None, D, M.to("meta"), {}, ValueError, r"mask must be on the device of delta \(cpu\)"),
        ([1], D, M, {}, TypeError, "base must be a torch.Tensor, got list"),
        (None, D, M, {"impl": "fast"}, ValueError, "impl must be one of .*, got 'fast'"),
    ],
)
def test_edge_mix_errors(base, delta, mask, options, error, message):
    with pytest.raises(error, match=message):
        edge_mix(base, delta, mask, **options)
