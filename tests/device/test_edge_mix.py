# SPDX-License-Identifier: Apache-2.0
"""Mixing writers into readers in Triton; for the CPU: tests/ops/test_edge_mix.py."""

import pytest
import torch
from oracle import assert_accurate, far_and_near, identical, randint, randn, unchanged

from mikernels import _triton, edge_mix, edge_scores
from mikernels.ops.pairs.edges import edge_mix_op

NAN, INF = float("nan"), float("inf")


def oracle(base, delta, mask):
    y = torch.einsum("wr,bpwd->bprd", mask, delta)
    return y if base is None else y + (base if base.dim() == 4 else base[:, :, None])


def run(base, delta, mask):
    with unchanged(base, delta, mask):
        y = edge_mix(base, delta, mask, impl="triton")
    assert y.dtype == delta.dtype
    return y


def check(base, delta, mask):
    wide = [None if t is None else t.double() for t in (base, delta, mask)]
    assert_accurate(run(base, delta, mask), oracle(*wide), oracle(base, delta, mask))


def operands(device, dtype, b, p, w, r, d, data=randn):
    shapes = (b, p, r, d), (b, p, w, d), (w, r)
    return [data(*s, dtype=dtype, seed=i).to(device) for i, s in enumerate(shapes)]


# (B, P, W, R, d): one of each, odd, and readers and columns of more than one large tile
SIZES = [(1, 1, 1, 1, 1), (2, 3, 5, 7, 9), (1, 2, 35, 70, 33), (1, 1, 70, 130, 144)]


@pytest.mark.parametrize("sizes", SIZES)
def test_edge_mix_is_accurate(device, dtype, sizes):
    base, delta, mask = operands(device, dtype, *sizes)
    check(None, delta, mask)
    check(base, delta, mask)
    check(base[:, :, 0], delta, mask)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "padded": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_edge_mix_layouts(device, layout):
    given = operands(device, torch.float16, 2, 3, 5, 7, 16, randint)
    expected = run(*given)
    for i in range(3):
        args = [LAYOUTS[layout](t) if i == j else t for j, t in enumerate(given)]
        assert identical(run(*args), expected)


def test_edge_mix_of_expanded_operands(device):
    base, delta, mask = operands(device, torch.float32, 2, 3, 5, 7, 16, randint)
    for thin in (delta[:1], delta[:, :1], delta[:, :, :1], delta[..., :1]):
        wide = thin.expand(delta.shape)
        assert identical(run(base, wide, mask), run(base, wide.contiguous(), mask))
    for thin in (base[:1], base[:, :1], base[:, :, :1], base[..., :1]):
        wide = thin.expand(base.shape)
        assert identical(run(wide, delta, mask), run(wide.contiguous(), delta, mask))
    one = mask[:1, :1].expand(mask.shape)
    assert identical(run(base, delta, one), run(base, delta, one.contiguous()))


@pytest.mark.parametrize("axis", range(5))
def test_edge_mix_of_nothing(device, axis):
    sizes = [2, 3, 4, 5, 6]
    sizes[axis] = 0
    base, delta, mask = operands(device, torch.float32, *sizes)
    y = run(base, delta, mask)
    # without writers, what is left is the base
    assert identical(y, base)
    assert identical(run(None, delta, mask), torch.zeros_like(base))


def test_nan_stays_at_its_position(device):
    base, delta, mask = operands(device, torch.float32, 2, 3, 5, 70, 20, randint)
    delta[0, 1, 2, 3], delta[1, 0, 4, 7], base[1, 2, 69, 5] = NAN, INF, NAN
    check(base, delta, mask)
    bad = run(base, delta, mask).isfinite().logical_not()
    assert bad[0, 1, :, 3].all()
    assert bad.sum() == 70 + 70 + 1


@pytest.mark.parametrize("axis", range(4))
def test_edge_mix_beyond_2_to_the_31_elements(device, axis):
    far, near = far_and_near(device, 3, axis)
    b, p, rows, d = near.shape
    _, delta, mask = operands(device, torch.float16, b, p, 4, rows, d)
    assert identical(run(far, delta, mask), run(near, delta, mask))
    mask = randn(rows, 4, dtype=torch.float16, seed=3).to(device)
    assert identical(run(None, far, mask), run(None, near, mask))


@pytest.mark.parametrize("axis", range(2))
def test_edge_mix_of_a_mask_beyond_2_to_the_31_elements(device, axis):
    far, near = far_and_near(device, 1, axis)
    _, delta, _ = operands(device, torch.float16, 1, 1, *near.shape, 5)
    assert identical(run(None, delta, far), run(None, delta, near))


@pytest.mark.parametrize("whole", [False, True])
def test_edge_mix_gradients(device, whole):
    """Integers are exact; the mask's gradient is `edge_scores` of delta and dy."""
    base, delta, mask = operands(device, torch.float32, 2, 3, 5, 7, 6, randint)
    base = base if whole else base[:, :, 0]
    leaves = [t.clone().requires_grad_() for t in (base, delta, mask)]
    dy = randint(2, 3, 7, 6, seed=8).to(device)
    found = torch.autograd.grad(edge_mix(*leaves, impl="triton"), leaves, dy)
    expected = torch.autograd.grad(oracle(*leaves), leaves, dy)
    for a, e in zip(found, expected, strict=True):
        assert identical(a, e)
    assert identical(found[2], edge_scores(delta, dy, impl="triton"))


def test_edge_scores_gradients(device):
    """They are mixes, of masks with weights and without."""
    _, delta, _ = operands(device, torch.float32, 2, 3, 5, 7, 6, randint)
    grad, counts = randint(2, 3, 4, 6, seed=3).to(device), randint(3, 2, seed=4).to(device)
    leaves = [t.clone().requires_grad_() for t in (delta, grad)]
    for weights in (None, counts):
        scores = edge_scores(*leaves, prefix=3, weights=weights, impl="triton")
        ds = randint(*scores.shape, seed=5).to(device)
        found = torch.autograd.grad(scores, leaves, ds)
        reference = edge_scores(*leaves, prefix=3, weights=weights, impl="reference")
        expected = torch.autograd.grad(reference, leaves, ds)
        assert all(map(identical, found, expected))


def test_edge_mix_is_deterministic(device):
    given = operands(device, torch.float32, 2, 2, 37, 20, 70)
    first = edge_mix_op(*given, impl="triton")
    for _ in range(1 if _triton.interpreting() else 20):
        assert identical(edge_mix_op(*given, impl="triton"), first)
