# SPDX-License-Identifier: Apache-2.0
"""Pairwise products in Triton; for the CPU: tests/ops/test_pair_products.py."""

import pytest
import torch
from oracle import assert_accurate, far_and_near, identical, randint, randn, unchanged

from mikernels import _triton, edge_scores, pairwise_products, second_moment
from mikernels.kernels.pairs import pair_products
from mikernels.ops.pairs.pair_products import pair_products_op

NAN, INF = float("nan"), float("inf")
PLANS = {"": {}, "parts": {"LEAST_STEPS": 1}, "little scratch": {"LEAST_STEPS": 1, "SCRATCH": 300}}


@pytest.fixture(params=PLANS)
def plan(request, monkeypatch):
    for name, value in PLANS[request.param].items():
        monkeypatch.setattr(pair_products, name, value)


def oracle(a, b, scale, weights, prefix):
    """[Q, n, m] of a [S, P, n, D] and b [S, P, m, D], 0 where a pair is not allowed."""
    left = a if scale is None else a * scale
    products = torch.einsum("spid,spjd->sij", left, b)
    if weights is None:
        total = products.sum(0, keepdim=True)
    else:
        total = torch.einsum("qs,sij->qij", weights, products)
    return total if prefix is None else total.where(allowed(a.shape[2], prefix), 0)


def allowed(n, prefix):
    return torch.arange(n, device=prefix.device)[:, None] < prefix


def to(dtype, *tensors):
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]


def run(a, b, scale=None, weights=None, prefix=None, symmetric=False, out=None):
    if out is None:
        q = 1 if weights is None else len(weights)
        out = torch.zeros(q, a.shape[2], b.shape[2], device=a.device)
    with unchanged(a, b, scale, weights, prefix):
        pair_products_op(a, b, scale, weights, prefix, symmetric, out, impl="triton")
    return out


def check(a, b, scale=None, weights=None, prefix=None, symmetric=False):
    """Added to what was in `out`; entries of pairs that are not allowed keep their bits."""
    q = 1 if weights is None else len(weights)
    start = randn(q, a.shape[2], b.shape[2], seed=9).to(a.device)
    found = run(a, b, scale, weights, prefix, symmetric, start.clone())
    operands = a, b, scale, weights, prefix
    exact = start.double() + oracle(*to(torch.float64, *operands))
    # sums are fp32 whatever the operands: eager's fp32 is the yardstick
    eager = start + oracle(*to(torch.float32, *operands))
    sizes = [None if t is None else t.abs() for t in to(torch.float64, *operands[:4])]
    terms = oracle(*(None if t is None else t.nan_to_num(0, 0, 0) for t in sizes), None)
    assert_accurate(found, exact, eager, scale=terms.max().item() + 1)
    if prefix is not None:
        outside = ~allowed(a.shape[2], prefix).expand(found.shape)
        assert identical(found[outside], start[outside])


def operands(device, dtype, s, p, n, m, d, data=randn):
    a, b = data(s, p, n, d, dtype=dtype), data(s, p, m, d, dtype=dtype, seed=1)
    return a.to(device), b.to(device)


def random_prefix(n, m, device):
    return torch.randint(-1, n + 2, (m,), generator=torch.Generator().manual_seed(4)).to(device)


SHAPES = {
    "one": (1, 1, 1, 1, 1),
    "small": (3, 2, 5, 7, 17),
    "odd": (2, 1, 3, 70, 33),
    "large": (2, 1, 65, 66, 80),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_pair_products_are_accurate(device, dtype, plan, shape):
    a, b = operands(device, dtype, *SHAPES[shape])
    prefix = random_prefix(a.shape[2], b.shape[2], device)
    check(a, b)
    check(a, b, prefix=prefix, weights=randn(3, a.shape[0], seed=2).to(device))


@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_products_are_accurate(device, dtype, shape):
    a, b = operands(device, dtype, *SHAPES[shape])
    prefix = random_prefix(a.shape[2], b.shape[2], device)
    check(a, b, scale=randn(a.shape[3], dtype=dtype, seed=3).to(device), prefix=prefix)


def test_pair_products_of_many_replicates(device):
    a, b = operands(device, torch.float32, 17, 1, 3, 4, 6)
    check(a, b, weights=randn(18, 17, seed=2).to(device))


@pytest.mark.parametrize("shape", ["small", "large"])
def test_scaled_bf16_loses_nothing(device, shape):
    """a * scale has more bits than bf16: as fp32 arithmetic, to one rounding."""
    a, b = operands(device, torch.bfloat16, *SHAPES[shape])
    scale = randn(a.shape[3], dtype=torch.bfloat16, seed=3).to(device)
    check(a, b, scale)
    a[0, 0, 1, 2], a[1, 0, 3, 0], b[0, 0, 2, 3] = INF, NAN, -INF
    check(a, b, scale)


@pytest.mark.parametrize("n, scaled", [(9, False), (66, True)])
def test_symmetric_is_the_general_product(device, dtype, plan, n, scaled):
    a, _ = operands(device, dtype, 2, 1, n, 1, 80, randint)
    scale = randint(80, dtype=dtype, seed=3).to(device) if scaled else None
    start = randint(1, n, n, seed=5).to(device)
    general = run(a, a, scale, out=start.clone())
    assert identical(run(a, a, scale, symmetric=True, out=start.clone()), general)


def test_symmetric_with_weights_and_prefix(device):
    a, _ = operands(device, torch.float32, 3, 2, 9, 1, 20, randint)
    weights, prefix = randint(2, 3, seed=6).to(device), random_prefix(9, 9, device)
    for more in ((weights, None), (None, prefix), (weights, prefix)):
        assert identical(run(a, a, None, *more, symmetric=True), run(a, a, None, *more))


def test_symmetric_results_are_symmetric(device, dtype):
    a, _ = operands(device, dtype, 1, 1, 67, 1, 40)
    scale = randn(40, dtype=dtype, seed=3).to(device)
    out = run(a, a, scale, symmetric=True)
    assert identical(out, out.mT)
    check(a, a, scale, symmetric=True)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "padded": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "positions last": lambda t: t.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pair_products_layouts(device, layout):
    make = LAYOUTS[layout]
    a, b = operands(device, torch.float16, 3, 2, 18, 9, 16, randint)
    weights, prefix = randint(2, 3, seed=2).to(device), random_prefix(18, 9, device)
    expected = run(a, b, None, weights, prefix)
    assert identical(run(make(a), make(b), None, weights, prefix), expected)
    strided = torch.stack([weights, weights], -1)[..., 0], torch.stack([prefix, prefix], -1)[:, 0]
    assert identical(run(make(a), b, None, *strided), expected)
    out = torch.zeros(9, 18, 4, device=device).permute(2, 1, 0)[::2]
    assert identical(run(a, make(b), None, weights, prefix, out=out), expected)
    out = torch.zeros(1, 18, 18, device=device)[:, :, ::2]
    assert identical(run(make(a), b, out=out), run(a, b))


def test_pair_products_of_expanded_operands(device):
    a, b = operands(device, torch.float32, 3, 2, 5, 6, 16, randint)
    for thin in (a[:1], a[:, :1], a[:, :, :1], a[..., :1]):
        wide = thin.expand(a.shape)
        assert identical(run(wide, b), run(wide.contiguous(), b))
        assert identical(run(b, wide), run(b, wide.contiguous()))


@pytest.mark.parametrize("axis", range(5))
def test_pair_products_of_nothing(device, axis):
    sizes = [2, 3, 4, 5, 6]
    sizes[axis] = 0
    a, b = operands(device, torch.float32, *sizes)
    start = randn(2, *a.shape[2:3], *b.shape[2:3], seed=9).to(device)
    weights = randn(2, a.shape[0]).to(device)
    assert identical(run(a, b, None, weights, out=start.clone()), start)
    assert identical(run(a, b, out=start[:1].clone()), start[:1])
    assert run(a, b, None, weights[:0]).shape == (0, *start.shape[1:])


def test_nan_stays_with_its_pairs(device, plan):
    a, b = operands(device, torch.float32, 2, 3, 9, 8, 20, randint)
    a[1, 2, 4, 5], b[0, 1, 3, 0], b[1, 1, 6, 7] = NAN, INF, NAN
    prefix = torch.tensor([5, 4, 0, 9, 5, 3, 1, 9], device=device)
    weights = randint(3, 2, seed=2).to(device)
    check(a, b)
    check(a, b, prefix=prefix)
    check(a, b, prefix=prefix, weights=weights)
    assert run(a, b, prefix=prefix)[0, 4].isnan().tolist() == [True, False, False] + 2 * [
        True
    ] + 2 * [False] + [True]


@pytest.mark.parametrize("axis", range(4))
def test_pair_products_beyond_2_to_the_31_elements(device, axis):
    far, near = far_and_near(device, 3, axis)
    s, p, _, d = near.shape
    other, _ = operands(device, torch.float16, s, p, 3, 1, d)
    assert identical(run(far, other), run(near, other))
    assert identical(run(other, far), run(other, near))


def test_pair_products_are_deterministic(device):
    a, b = operands(device, torch.float32, 2, 3, 17, 20, 70)
    weights = randn(3, 2).to(device)
    first = run(a, b), run(a, b, None, weights)
    for _ in range(1 if _triton.interpreting() else 20):
        assert identical(run(a, b), first[0])
        assert identical(run(a, b, None, weights), first[1])


def test_public_functions_run_it(device):
    """Integers: every order of summation is exact."""
    x, w = randint(4, 6, 10).to(device), randint(10, seed=1).to(device)
    products = torch.einsum("bid,bjd->ij", x * w, x)
    assert identical(pairwise_products(x, weight=w, impl="triton"), products)
    moments = torch.einsum("bid,bie->de", x, x)
    assert identical(second_moment(x, impl="triton"), moments)
    grad, counts = randint(4, 6, 3, 10, seed=2).to(device), randint(5, 4, seed=3).to(device)
    delta = x[:, :, None].expand(4, 6, 7, 10)
    scores = edge_scores(delta, grad, prefix=2, weights=counts, impl="triton")
    expected = torch.einsum("qb,bpwd,bprd->qwr", counts, delta, grad)
    expected[:, 2:] = 0
    assert identical(scores, expected)
