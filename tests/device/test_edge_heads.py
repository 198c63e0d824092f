# SPDX-License-Identifier: Apache-2.0
"""Edge scores of heads in Triton; for the CPU: tests/ops/test_edge_heads.py."""

import pytest
import torch
from oracle import assert_accurate, far_and_near, identical, randint, randn, unchanged

from mikernels import _triton, edge_scores, edge_scores_heads
from mikernels.kernels.pairs import edge_heads, pair_products
from mikernels.ops.pairs.edge_heads import edge_heads_op

NAN, INF = float("nan"), float("inf")
# blocks of whole examples and of positions, several blocks of heads, parts of sums
PLANS = {
    "": {},
    "an example at a time": {"SCRATCH": 1000},
    "a position at a time": {"SCRATCH": 1},
    "blocks of heads": {"SCRATCH": 400, "MOST_HEADS": 2},
}


@pytest.fixture(params=PLANS)
def plan(request, monkeypatch):
    for name, value in PLANS[request.param].items():
        monkeypatch.setattr(edge_heads, name, value)
    monkeypatch.setattr(pair_products, "LEAST_STEPS", 1 if request.param else 8)


def oracle(dz, w_o, grad, weights, prefix):
    """[Q, H, R], 0 where a pair is not allowed."""
    rows = torch.einsum("bphe,hed->bphd", dz, w_o)
    products = torch.einsum("bphd,bprd->bhr", rows, grad)
    if weights is None:
        total = products.sum(0, keepdim=True)
    else:
        total = torch.einsum("qb,bhr->qhr", weights, products)
    return total if prefix is None else total.where(allowed(total, prefix), 0)


def allowed(scores, prefix):
    return torch.arange(scores.shape[1], device=prefix.device)[:, None] < prefix


def to(dtype, *tensors):
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]


def run(dz, w_o, grad, weights=None, prefix=None, out=None):
    if out is None:
        q = 1 if weights is None else len(weights)
        out = torch.zeros(q, dz.shape[2], grad.shape[2], device=dz.device)
    with unchanged(dz, w_o, grad, weights, prefix):
        edge_heads_op(dz, w_o, grad, weights, prefix, out, impl="triton")
    return out


def check(dz, w_o, grad, weights=None, prefix=None):
    """Added to what was in `out`; entries of pairs that are not allowed keep their bits."""
    q = 1 if weights is None else len(weights)
    start = randn(q, dz.shape[2], grad.shape[2], seed=9).to(dz.device)
    found = run(dz, w_o, grad, weights, prefix, start.clone())
    given = dz, w_o, grad, weights, prefix
    exact = start.double() + oracle(*to(torch.float64, *given))
    # sums are fp32 whatever the operands: eager's fp32 is the yardstick
    eager = start + oracle(*to(torch.float32, *given))
    sizes = [
        None if t is None else t.abs().nan_to_num(0, 0, 0) for t in to(torch.float64, *given[:4])
    ]
    scale = oracle(*sizes, None).max().item() + 1
    assert_accurate(found, exact, eager, scale=scale)
    if prefix is not None:
        outside = ~allowed(start, prefix).expand(start.shape)
        assert identical(found[outside], start[outside])


def operands(device, dtype, b, p, h, e, r, d, data=randn):
    shapes = (b, p, h, e), (h, e, d), (b, p, r, d)
    return [data(*s, dtype=dtype, seed=i).to(device) for i, s in enumerate(shapes)]


# (B, P, heads, d_head, R, d)
SHAPES = {"one": 6 * (1,), "small": (2, 3, 5, 4, 7, 9), "large": (2, 2, 66, 16, 70, 32)}


@pytest.mark.parametrize("shape", ["one", "small"])
def test_edge_heads_are_accurate(device, dtype, plan, shape):
    given = operands(device, dtype, *SHAPES[shape])
    weights = randn(3, given[0].shape[0], seed=4).to(device)
    prefix = torch.randint(-1, 7, given[2].shape[2:3], generator=torch.Generator().manual_seed(4))
    check(*given)
    check(*given, weights, prefix.to(device))


def test_many_edge_heads_are_accurate(device, dtype):
    check(*operands(device, dtype, *SHAPES["large"]))


@pytest.mark.parametrize("shape", ["small", "large"])
def test_rows_of_bf16_heads_lose_nothing(device, shape):
    """Rows are fp32 numbers against bf16 gradients: as fp32 arithmetic, to one rounding."""
    dz, w_o, grad = operands(device, torch.bfloat16, *SHAPES[shape])
    check(dz, w_o, grad)
    dz[0, 1, 2, 3], grad[1, 1, 4, 5], grad[0, 0, 6, 7] = INF, NAN, -INF
    check(dz, w_o, grad)


def test_edge_heads_are_the_edge_scores_of_their_outputs(device):
    dz, w_o, grad = operands(device, torch.float32, 2, 3, 5, 4, 7, 9, randint)
    rows = torch.einsum("bphe,hed->bphd", dz, w_o)
    weights, more = randint(2, 2, seed=4).to(device), {"prefix": 3, "impl": "triton"}
    for w in (None, weights):
        found = edge_scores_heads(dz, w_o, grad, weights=w, **more)
        assert identical(found, edge_scores(rows, grad, weights=w, **more))


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "padded": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_edge_heads_layouts(device, layout):
    given = operands(device, torch.float16, 2, 3, 5, 4, 7, 16, randint)
    expected = run(*given)
    for i in range(3):
        args = [LAYOUTS[layout](t) if i == j else t for j, t in enumerate(given)]
        assert identical(run(*args), expected)
    out = torch.zeros(7, 5, 2, device=device).permute(2, 1, 0)[:1]
    assert identical(run(*given, out=out), expected)


def test_edge_heads_of_expanded_operands(device):
    dz, w_o, grad = operands(device, torch.float32, 2, 3, 5, 4, 7, 16, randint)
    for thin in (dz[:1], dz[:, :1], dz[:, :, :1], dz[..., :1]):
        wide = thin.expand(dz.shape)
        assert identical(run(wide, w_o, grad), run(wide.contiguous(), w_o, grad))
    shared = w_o[:1].expand(w_o.shape)
    assert identical(run(dz, shared, grad), run(dz, shared.contiguous(), grad))


@pytest.mark.parametrize("axis", range(6))
def test_edge_heads_of_nothing(device, axis):
    sizes = [2, 3, 4, 5, 6, 7]
    sizes[axis] = 0
    given = operands(device, torch.float32, *sizes)
    weights = randn(2, sizes[0]).to(device)
    start = randn(2, sizes[2], sizes[4], seed=9).to(device)
    assert identical(run(*given, weights, out=start.clone()), start)
    assert identical(run(*given, out=start[:1].clone()), start[:1])


def test_nan_stays_with_its_pairs(device):
    dz, w_o, grad = operands(device, torch.float32, 2, 3, 5, 4, 7, 9, randint)
    dz[1, 2, 3, 1], grad[0, 1, 3, 0] = NAN, INF
    prefix = torch.tensor([4, 3, 0, 5, 5, 2, 1], device=device)
    check(dz, w_o, grad)
    check(dz, w_o, grad, prefix=prefix)
    found = run(dz, w_o, grad, prefix=prefix)[0]
    assert found[3].isnan().tolist() == [True, False, False, True, True, False, False]


@pytest.mark.parametrize("axis", range(4))
def test_edge_heads_beyond_2_to_the_31_elements(device, axis):
    far, near = far_and_near(device, 3, axis)
    b, p, rows, d = near.shape
    _, w_o, grad = operands(device, torch.float16, b, p, rows, d, 3, 4)
    assert identical(run(far, w_o, grad), run(near, w_o, grad))
    dz, w_o, _ = operands(device, torch.float16, b, p, 3, 4, 1, d)
    assert identical(run(dz, w_o, far), run(dz, w_o, near))


@pytest.mark.parametrize("axis", range(3))
def test_edge_heads_of_weights_beyond_2_to_the_31_elements(device, axis):
    far, near = far_and_near(device, 2, axis)
    heads, width, d = near.shape
    dz, _, grad = operands(device, torch.float16, 1, 2, heads, width, 3, d)
    assert identical(run(dz, far, grad), run(dz, near, grad))


def test_edge_heads_are_deterministic(device):
    given = operands(device, torch.float32, 2, 3, 7, 5, 9, 33)
    first = run(*given)
    for _ in range(1 if _triton.interpreting() else 20):
        assert identical(run(*given), first)
