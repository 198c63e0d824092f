# SPDX-License-Identifier: Apache-2.0
import sys

import numpy as np
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
from pairwise_cases import among, assert_found

from mikernels import grad_gram
from mikernels._dispatch import accumulate_dtype

NAN, INF = float("nan"), float("inf")


def listed(layers):
    return [layers] if torch.is_tensor(layers) else layers


def explicit(acts, grads, dtype=torch.float64, change=lambda t: t):
    """[n, parameters]: the gradients themselves."""
    parts = []
    for a, g in zip(listed(acts), listed(grads), strict=True):
        a, g = (change((t if t.dim() == 3 else t[:, None]).to(dtype)) for t in (a, g))
        parts.append(torch.einsum("nto,nti->noi", g, a).flatten(1))
    return torch.cat(parts, 1)


def plain(sides, dtype=torch.float64, normalize=False, change=lambda t: t):
    rows = [explicit(*side, dtype, change) for side in sides]
    gram = rows[0] @ rows[-1].T
    if not normalize:
        return gram
    norms = [(r * r).sum(1).numpy() for r in rows]
    if dtype == torch.float64:  # an oracle for fp64 has to know more digits
        norms = [n.astype(np.longdouble) for n in norms]
    product = np.sqrt(norms[0])[:, None] * np.sqrt(norms[-1])
    # with a gradient that is 0, too
    cosines = np.divide(gram.numpy(), product, out=np.zeros_like(product), where=product != 0)
    return torch.from_numpy(cosines.astype(gram.numpy().dtype))


def check(impl, *sides, exact=False, **options):
    """sides: (acts, grads), and the other side's if there is one."""
    tensors = [t for side in sides for layers in side for t in listed(layers)]
    with unchanged(*tensors):
        gram = grad_gram(*(t for side in sides for t in side), **options, impl=impl)
    acc = accumulate_dtype(tensors[0].dtype)
    assert gram.dtype == acc
    oracle = plain(sides, **options)
    if exact:
        torch.testing.assert_close(gram, oracle.to(acc), rtol=0, atol=0, equal_nan=True)
    else:
        # a cosine is three rounded numbers, of which none is above 1 after the division
        scale = 3 if options else plain(sides, change=torch.abs).max().item()
        assert_accurate(gram, oracle, plain(sides, acc, **options), scale=scale)
    return gram


def side(n, *layers, dtype=torch.float32, make=randn, seed=0):
    """acts and grads of layers (T, d_in, d_out); T is None for [n, d]."""
    acts, grads = [], []
    for i, (positions, d_in, d_out) in enumerate(layers):
        shape = (n,) if positions is None else (n, positions)
        acts.append(make(*shape, d_in, dtype=dtype, seed=seed + 2 * i))
        grads.append(make(*shape, d_out, dtype=dtype, seed=seed + 2 * i + 1))
    return acts, grads


LAYERS = {
    "one": [(None, 17, 9)],
    "one number": [(1, 1, 1)],
    "sequences": [(5, 12, 33)],
    "several": [(None, 17, 9), (5, 33, 2), (3, 1, 40)],
    "wide": [(2, 515, 3)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", LAYERS)
def test_grad_gram_accuracy(impl, dtype, layers):
    for n, m in ((1, 1), (33, 20), (70, 3)):
        one, other = (side(s, *LAYERS[layers], dtype=dtype, seed=s) for s in (n, m + 50))
        check(impl, one)
        check(impl, one, other)
        check(impl, one, normalize=True)
        check(impl, one, other, normalize=True)
    # other sequences than the first side's
    longer = [(3 + (p or 1), *d) for p, *d in LAYERS[layers]]
    check(impl, one, side(5, *longer, dtype=dtype, seed=90))


@pytest.mark.parametrize("positions", [1, 5])
def test_grad_gram_equals_autograd(impl, positions):
    """Two layers and a square: integers throughout, so gradients are exact."""
    n, weights = 7, [randint(d, 4, seed=d).double().requires_grad_() for d in (5, 3)]
    x = randint(n, positions, 4, dtype=torch.float64, seed=9)
    inputs, outputs, gradients = [], [], []
    for sample in x:
        hidden = sample @ weights[0].T
        inner = hidden[:, :4] ** 2
        out = inner @ weights[1].T
        loss = (out**2).sum() / 2
        inputs.append((sample, inner))
        outputs.append(torch.autograd.grad(loss, (hidden, out), retain_graph=True))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    layers = [[torch.stack(t).detach() for t in zip(*v, strict=True)] for v in (inputs, outputs)]
    gradients = torch.stack(gradients)
    assert torch.equal(grad_gram(*layers, impl=impl), gradients @ gradients.T)
    if positions == 1:
        flat = [[t[:, 0] for t in v] for v in layers]
        assert torch.equal(grad_gram(*flat, impl=impl), gradients @ gradients.T)


@pytest.mark.parametrize("zero", range(5))
def test_grad_gram_empty(impl, zero):
    n, m, positions, d_in, d_out = (0 if i == zero else s for i, s in enumerate((4, 3, 2, 5, 6)))
    one, other = side(n, (positions, d_in, d_out)), side(m, (positions, d_in, d_out), seed=7)
    for sides in ((one,), (one, other), (other, one)):
        gram = grad_gram(*(t for s in sides for t in s), impl=impl)
        assert gram.shape == (len(sides[0][0][0]), len(sides[-1][0][0]))
        assert zero < 2 or not gram.any()
        assert len(grad_gram(*(t for s in sides for t in s), k=99, impl=impl)) <= gram.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_gram_layouts(impl, dtype):
    wide = randint(40, 24, 60, dtype=dtype)
    other = side(11, (5, 9, 7), dtype=dtype, make=randint, seed=5)
    for make in (
        lambda d: wide[:13, :5, :d],
        lambda d: wide[::3, ::5, 3 : 3 + d],
        lambda d: wide[:5, :13, :d].transpose(0, 1),
        lambda d: wide[:d, :5, :13].permute(2, 1, 0),
        lambda d: wide[:13, :5, : 4 * d : 4],
        lambda d: wide[:1, :5, :d].expand(14, 5, d),
        lambda d: wide[:14, :1, :d].expand(14, 5, d),
        lambda d: wide[:14, :5, :1].expand(14, 5, d),
    ):
        one = make(9), make(7)
        check(impl, one, exact=True)
        check(impl, one, other, exact=True)
        check(impl, other, one, exact=True)
        check(impl, [t[:, 0] for t in one], exact=True)


def test_grad_gram_of_rows_far_apart(impl):
    far = far_apart(randint(2, 9))
    for acts in (far, far[:, None], far[None], far.T):
        grads = randint(*acts.shape[:-1], 3, seed=1)
        near = acts.contiguous()
        assert torch.equal(grad_gram(acts, grads, impl=impl).double(), plain([(near, grads)]))
        assert torch.equal(grad_gram(grads, acts, impl=impl).double(), plain([(grads, near)]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_gram_non_finite_stay_with_their_pairs(impl, dtype):
    one = side(30, (3, 6, 4), dtype=dtype, make=randint)
    other = side(20, (2, 6, 4), dtype=dtype, make=randint, seed=8)
    one[0][0][4, 1, 2], other[1][0][7] = NAN, NAN
    expected = torch.zeros(30, 20, dtype=torch.bool)
    expected[4] = expected[:, 7] = True
    assert torch.equal(check(impl, one, other, exact=True).isnan(), expected)
    assert torch.equal(check(impl, one, exact=True).isnan().sum(), torch.tensor(59))
    assert check(impl, one, normalize=True)[5].isnan().sum() == 1


@pytest.mark.parametrize("block", [1, 4, 1024])
@pytest.mark.parametrize("by", ["abs", "value"])
def test_grad_gram_keeps_the_strongest(impl, monkeypatch, block, by):
    # the function has the module's name
    monkeypatch.setattr(sys.modules[grad_gram.__module__], "BLOCK", block)
    one = side(13, (3, 4, 5), (None, 2, 2), make=randint)
    other = side(9, (3, 4, 5), (None, 2, 2), make=randint, seed=8)
    for k in (1, 20, 78, 1000):
        pairs = torch.ones(13, 13, dtype=torch.bool).triu(1)
        found = grad_gram(*one, k=k, by=by, impl=impl)
        assert_found(found, among(plain([one]).float(), pairs, k, by), (13, 13))
        found = grad_gram(*one, *other, k=k, by=by, impl=impl)
        pairs = torch.ones(13, 9, dtype=torch.bool)
        assert_found(found, among(plain([one, other]).float(), pairs, k, by), (13, 9))
    other[0][0][3, 1, 2] = NAN
    found = grad_gram(*one, *other, k=20, by=by, impl=impl)
    assert found.values[:13].isnan().all() and (found.cols[:13] == 3).all()
    assert_found(found, among(plain([one, other]).float(), pairs, 20, by), (13, 9))


def test_grad_gram_keeps_the_most_alike(impl):
    acts, grads = side(12, (3, 8, 5))
    acts[0][7], grads[0][7] = acts[0][2] * 4, grads[0][2] * 0.5
    found = grad_gram(acts, grads, k=1, normalize=True, impl=impl)
    assert (found.rows.item(), found.cols.item()) == (2, 7)
    cosines = grad_gram(acts, grads, normalize=True, impl=impl)
    assert identical(found.values, cosines[2, 7][None])


def test_grad_gram_is_one_function_of_its_input(impl):
    one, other = side(40, (3, 33, 17), (None, 9, 40)), side(35, (3, 33, 17), (None, 9, 40), seed=9)
    first = grad_gram(*one, impl=impl), grad_gram(*one, *other, impl=impl)
    for threads in (1, 2, 2):
        with num_threads(threads):
            assert identical(grad_gram(*one, impl=impl), first[0])
            assert identical(grad_gram(*one, *other, impl=impl), first[1])


A, G, T = torch.ones(4, 3), torch.ones(4, 2), torch.ones(4, 5, 3)


@pytest.mark.parametrize(
    "sides, options, error, message",
    [
        ((A[0], G), {}, ValueError, r"acts must be \[n, d\] or \[n, T, d\] a layer, got \[3\] at"),
        (
            ([A, A], G),
            {},
            ValueError,
            "one tensor a layer each, got 2 and 1",
        ),
        (([], []), {}, ValueError, "must have one tensor a layer each, got 0 and 0"),
        ((A, G[:3]), {}, ValueError, r"same samples and positions, got .* at layer 0"),
        ((T, G), {}, ValueError, r"same samples and positions, got \[4, 5, 3\] and \[4, 1, 2\]"),
        (([A, A[:3]], [G, G[:3]]), {}, ValueError, "same samples .* at layer 1"),
        ((A, G.half()), {}, TypeError, "grads must have the dtype of acts"),
        ((A.long(), G), {}, TypeError, "acts must be float32, .*, got torch.int64"),
        (([1.0], [G]), {}, TypeError, "acts must be .*torch.Tensor.*, got float"),
        ((A, G, A), {}, ValueError, "acts2 and grads2 go together, got one of them"),
        ((A, G, [A, A], [G, G]), {}, ValueError, "acts2 .*layers?.*, got 2"),
        ((A, G, A[:, :2], G), {}, ValueError, r"acts2 must have .*3.*, got .*2"),
        ((A, G, A, A), {}, ValueError, r"grads2 must have .*2.*, got .*3"),
        ((A, G, A.half(), G.half()), {}, TypeError, "acts2 must have the dtype of acts"),
        ((A, G, A, G[:3]), {}, ValueError, "acts2 and grads2 must have the same samples"),
        ((A, G), {"k": 0}, ValueError, "k must be at least 1, got 0"),
        ((A, G), {"k": 2.0}, TypeError, "k must be an int, got float"),
        ((A, G), {"k": 2, "by": "max"}, ValueError, "by must be one of .*, got 'max'"),
        ((A, G), {"impl": "fast"}, ValueError, "impl must be one of .*, got 'fast'"),
    ],
)
def test_grad_gram_errors(sides, options, error, message):
    with pytest.raises(error, match=message):
        grad_gram(*sides, **options)
