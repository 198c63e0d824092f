# SPDX-License-Identifier: Apache-2.0
"""Gradients of the public functions: gradcheck, dense autograd, every subset of the inputs."""

from itertools import product

import pytest
import torch
from one_level import one_impl
from oracle import DTYPES, assert_accurate, randn, random_indices, unchanged

from mikernels import (
    SparseCodes,
    batch_topk_encode,
    edge_mix,
    edge_scores,
    groupmax_encode,
    pairwise_products,
    row_topk,
    sparse_decode,
    threshold_encode,
    topk_encode,
)
from mikernels.ops.sae.threshold_encode import slots_above

N, D, F, K = 3, 3, 19, 2


def leaves(*shapes, dtype=torch.float64):
    return [randn(*s, dtype=dtype, seed=i).detach().requires_grad_() for i, s in enumerate(shapes)]


INDICES = random_indices(N, K, F)
# tokens of 3, 0 and 2 slots, and two that are not in use: the gradients count them as the last's
RAGGED = torch.tensor([1, 4, 8, 0, 4, 18, 4]), torch.tensor([0, 3, 3, 5])
SCALE = randn(F, dtype=torch.float64, seed=9)
PREFIX, COUNTS = torch.tensor([0, 1, 9, 2]), torch.tensor([[1, 1], [0, 2], [2, 0]])

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
    "batch_topk_encode": (
        lambda impl, x, w, b, c: batch_topk_encode(x, w, b, k=2.5, b_dec=c, impl=impl)[0].values,
        [(N, D), (F, D), (F,), (D,)],
    ),
    "batch_topk_encode scale": (
        lambda impl, x, w, b: (
            batch_topk_encode(x, w.T, b, k=K, scale=SCALE, relu=False, impl=impl)[0].values
        ),
        [(1, N, D), (D, F), (F,)],
    ),
    "groupmax_encode": (
        lambda impl, x, w, b, c: groupmax_encode(x, w, b, k=3, b_dec=c, impl=impl).values,
        [(N, D), (F - 1, D), (F - 1,), (D,)],
    ),
    "groupmax_encode scale": (
        lambda impl, x, w: (
            groupmax_encode(x, w.T, k=6, scale=SCALE[1:], relu=False, impl=impl).values
        ),
        [(1, N, D), (D, F - 1)],
    ),
    "threshold_encode": (
        lambda impl, x, w, b, c: (
            threshold_encode(x, w, b, threshold=0.3, b_dec=c, impl=impl).values
        ),
        [(N, D), (F, D), (F,), (D,)],
    ),
    "slots_above": (
        lambda impl, x, w, b: slots_above(x, w.T, b, None, SCALE - 1, impl=impl).values,
        [(1, N, D), (D, F), (F,)],
    ),
    "ragged to_dense": (
        lambda impl, v: SparseCodes.ragged(v, *RAGGED, F).to_dense(),
        [(7,)],
    ),
    "sparse_decode ragged": (
        lambda impl, v, w, b: sparse_decode(SparseCodes.ragged(v, *RAGGED, F), w, b, impl=impl),
        [(7,), (F, D), (D,)],
    ),
    "sparse_decode ragged prefixes": (
        lambda impl, v, w: sparse_decode(
            SparseCodes.ragged(v, *RAGGED, F), w, prefixes=[3, 9, F], impl=impl
        ),
        [(7,), (F, D)],
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
    "pairwise_products": (
        lambda impl, a, b, w: pairwise_products(a, b, weight=w, impl=impl),
        [(2, N, D), (2, 4, D), (D,)],
    ),
    "pairwise_products of one side": (
        lambda impl, a, w: pairwise_products(a, weight=w, impl=impl),
        [(2, N, D), (D,)],
    ),
    "pairwise_products transposed": (
        lambda impl, a, b: pairwise_products(a.T, b.T, impl=impl),
        [(D, N), (D, 4)],
    ),
    "edge_scores": (
        lambda impl, delta, grad: edge_scores(delta, grad, impl=impl),
        [(2, 2, N, D), (2, 2, 4, D)],
    ),
    "edge_scores prefix and weights": (
        lambda impl, delta, grad: edge_scores(
            delta, grad, prefix=PREFIX, weights=COUNTS, impl=impl
        ),
        [(2, 2, N, D), (2, 2, 4, D)],
    ),
    "edge_scores transposed": (
        lambda impl, delta, grad: edge_scores(delta.mT, grad.mT, prefix=2, impl=impl),
        [(2, 2, D, N), (2, 2, D, 4)],
    ),
    "edge_mix": (
        lambda impl, base, delta, mask: edge_mix(base, delta, mask, impl=impl),
        [(2, 2, 4, D), (2, 2, N, D), (N, 4)],
    ),
    "edge_mix of one base": (
        lambda impl, base, delta, mask: edge_mix(base, delta, mask, impl=impl),
        [(2, 2, D), (2, 2, N, D), (N, 4)],
    ),
    "edge_mix without a base": (
        lambda impl, delta, mask: edge_mix(None, delta.mT, mask.T, impl=impl),
        [(2, 2, D, N), (4, N)],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autograd_gradcheck(impl, name):
    function, shapes = FUNCTIONS[name]
    inputs = leaves(*shapes)
    assert torch.autograd.gradcheck(lambda *args: function(impl, *args), inputs)


@one_impl
@pytest.mark.parametrize("name", FUNCTIONS)
def test_autograd_of_any_subset_of_the_inputs(impl, name):
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
def test_autograd_of_expanded_and_strided_output_gradients(impl, name):
    function, shapes = FUNCTIONS[name]
    inputs = leaves(*shapes)
    output = function(impl, *inputs)
    ones = torch.ones_like(output)
    # .sum() hands back one number expanded to the output's shape
    dense = torch.autograd.grad(output, inputs, ones, retain_graph=True)
    expanded = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
    strided = torch.autograd.grad(output, inputs, torch.stack([ones, ones], -1)[..., 0])
    for a, b, c in zip(dense, expanded, strided, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@one_impl
@pytest.mark.parametrize("name", FUNCTIONS)
def test_autograd_gradgradcheck(impl, name):
    function, shapes = FUNCTIONS[name]
    inputs = leaves(*shapes)
    assert torch.autograd.gradgradcheck(lambda *args: function(impl, *args), inputs)


def row_topk_in_torch(s):
    return s.gather(-1, row_topk(s.detach(), K)[1])


def encode_in_torch(x, w, b, c):
    h = (x - c) @ w.T + b
    return h.gather(-1, topk_encode(x, w, b, k=K, b_dec=c).indices).relu()


def groupmax_in_torch(x, w, b, c):
    return ((x - c) @ w.T + b).relu().unflatten(-1, (3, -1)).max(-1).values


def decode_in_torch(v, w, b):
    return v.new_zeros(N, F).scatter(-1, INDICES, v) @ w + b


# what the functions of the same names compute, in differentiable torch
IN_TORCH = {
    "row_topk": row_topk_in_torch,
    "topk_encode": encode_in_torch,
    "groupmax_encode": groupmax_in_torch,
    "sparse_decode": decode_in_torch,
    "pairwise_products": lambda a, b, w: torch.einsum("bid,d,bjd->ij", a, w, b),
    "pairwise_products of one side": lambda a, w: torch.einsum("bid,d,bjd->ij", a, w, a),
    "edge_scores": lambda delta, grad: torch.einsum("bpwd,bprd->wr", delta, grad),
    "edge_scores prefix and weights": lambda delta, grad: torch.einsum(
        "qb,bpwd,bprd->qwr", COUNTS.double(), delta, grad
    ).where(torch.arange(N)[:, None] < PREFIX, 0),
    "edge_mix": lambda base, delta, mask: base + torch.einsum("wr,bpwd->bprd", mask, delta),
}


def cubes(function):
    """A scalar whose second and third derivatives are not constant."""
    return lambda *args: function(*args).pow(3).sum()


@one_impl
@pytest.mark.parametrize("name", IN_TORCH)
def test_autograd_second_derivatives_are_those_of_torch(impl, name):
    function, shapes = FUNCTIONS[name]
    inputs = [t.detach() for t in leaves(*shapes)]
    ours, torchs = cubes(lambda *args: function(impl, *args)), cubes(IN_TORCH[name])
    hessian = torch.autograd.functional.hessian(ours, tuple(inputs))
    for mine, theirs in zip(
        hessian, torch.autograd.functional.hessian(torchs, tuple(inputs)), strict=True
    ):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)
    assert any(block.any() for row in hessian for block in row)
    places = tuple(range(len(inputs)))

    def twice(f):
        inner = torch.func.grad(f, places)
        return torch.func.grad(lambda *args: sum(g.pow(2).sum() for g in inner(*args)), places)

    for order in (twice, lambda f: twice(lambda *args: twice(f)(*args)[0].sum())):
        for a, b in zip(order(ours)(*inputs), order(torchs)(*inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_autograd_hvp_of_an_sae(impl):
    inputs = [t.detach() for t in leaves((N, D), (F, D), (F,), (F, D), (D,))]
    v = tuple(randn(*t.shape, dtype=torch.float64, seed=5) for t in inputs)
    codes, _ = sae(impl, *inputs, K)
    ours = torch.autograd.functional.hvp(cubes(lambda *a: sae(impl, *a, K)[1]), tuple(inputs), v)
    theirs = torch.autograd.functional.hvp(cubes(lambda *a: dense_sae(codes, *a)), tuple(inputs), v)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert b.any()
        torch.testing.assert_close(a, b)


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
def test_autograd_equal_dense_autograd(impl, dtype, n, d, n_features, k):
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


def test_autograd_of_slots_at_zero_are_zero(impl):
    x, w_enc = leaves((6, 8), (90, 8), dtype=torch.float32)
    bias = torch.full((90,), -1e3)
    bias[:2] = 1e3
    codes = topk_encode(x, w_enc, bias, k=5, impl=impl)
    assert (codes.l0() == 2).all()
    codes.values.backward(torch.full_like(codes.values, 3.0))
    assert torch.equal(w_enc.grad[2:], torch.zeros(88, 8))
    torch.testing.assert_close(w_enc.grad[:2], (3 * x.detach()).sum(0).expand(2, 8))
    torch.testing.assert_close(x.grad, (3 * w_enc.detach()[:2]).sum(0).expand(6, 8))


def test_autograd_show_nan(impl):
    x, w_enc = leaves((3, 8), (90, 8), dtype=torch.float32)
    with torch.no_grad():
        x[1, 2] = float("nan")
    topk_encode(x, w_enc, k=5, impl=impl).values.sum().backward()
    assert x.grad[[0, 2]].isfinite().all()
    assert w_enc.grad.isnan().any()
