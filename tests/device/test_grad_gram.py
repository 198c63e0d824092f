# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from oracle import assert_accurate, far_apart, identical, randint, randn, unchanged

from mikernels import _triton
from mikernels.kernels.pairs import grad_gram as launcher
from mikernels.ops.pairs.grad_gram import grad_gram, gram_op, reference

NAN = float("nan")


def oracle(acts, grads, acts2, grads2):
    products = torch.einsum("itd,jsd->ijts", acts, acts2)
    return (products * torch.einsum("ite,jse->ijts", grads, grads2)).sum((2, 3))


def check(acts, grads, acts2=None, grads2=None):
    """On top of what is there, also into a transposed result."""
    symmetric = acts2 is None
    operands = (acts, grads, acts, grads) if symmetric else (acts, grads, acts2, grads2)
    n, m = operands[0].shape[0], operands[2].shape[0]
    exact = oracle(*(x.cpu().double() for x in operands))
    for transposed in (False, True):
        before = randn(m, n, seed=9).T if transposed else randn(n, m, seed=9)
        out, eager = before.to(acts.device, copy=True), before.to(acts.device, copy=True)
        with unchanged(*operands):
            gram_op(*operands, symmetric, out, impl="triton")
        reference(*operands, symmetric, eager)
        assert_accurate(out.cpu(), exact + before.double(), eager.cpu())
        if symmetric:
            zero = torch.zeros_like(out)
            gram_op(*operands, True, zero, impl="triton")
            assert identical(zero, zero.T.contiguous())


SIZES = [(1, 1, 1, 1), (3, 2, 7, 5), (70, 1, 40, 33), (5, 3, 33, 20)]


@pytest.mark.parametrize("n, positions, d_in, d_out", SIZES)
def test_gram_products_are_accurate(device, dtype, n, positions, d_in, d_out):
    side = randn(n, positions, d_in, dtype=dtype), randn(n, positions, d_out, dtype=dtype, seed=1)
    other = randn(9, 3, d_in, dtype=dtype, seed=2), randn(9, 3, d_out, dtype=dtype, seed=3)
    side, other = (tuple(x.to(device) for x in both) for both in (side, other))
    check(*side)
    check(*side, *other)


def test_gram_products_of_nothing(device):
    for n, positions, m, positions2, d in ((0, 2, 3, 2, 4), (2, 0, 3, 2, 4), (2, 2, 3, 2, 0)):
        sides = (n, positions, d), (n, positions, 5), (m, positions2, d), (m, positions2, 5)
        out = torch.ones(n, m, device=device)
        gram_op(*(torch.empty(s, device=device) for s in sides), False, out, impl="triton")
        assert (out == 1).all()


def test_gram_products_layouts(device):
    acts, grads = randn(8, 4, 20).to(device), randn(8, 4, 12, seed=1).to(device)
    check(acts[::2, 1::2, ::3], grads[::2, 1::2, 1:])
    check(acts.transpose(0, 1)[:, :3], grads[:4, :3], acts[:3, :2], grads[:3, :2])
    check(acts[:1, :2].expand(5, 2, 20), grads.movedim(0, 2).contiguous().movedim(2, 0)[:5, 2:])


def test_gram_products_of_integers_are_exact(device):
    acts, grads = randint(6, 3, 9).to(device), randint(6, 3, 8, seed=1).to(device)
    out = torch.zeros(6, 6, device=device)
    gram_op(acts, grads, acts, grads, True, out, impl="triton")
    exact = oracle(*(x.cpu().double() for x in (acts, grads, acts, grads)))
    assert identical(out.cpu(), exact.float())


def test_one_part(device, monkeypatch):
    """Positions are not shared out where tiles are many, or where parts would take much memory."""
    acts, grads = randn(90, 2, 9).to(device), randn(90, 2, 5, seed=1).to(device)
    monkeypatch.setattr(launcher, "PROGRAMS", 1)
    check(acts, grads)
    monkeypatch.undo()
    monkeypatch.setattr(launcher, "SCRATCH", 0)
    check(acts, grads)
    check(acts, grads, acts[:20], grads[:20])


def test_gram_products_non_finite(device):
    """NaN stays where it belongs, also below the diagonal."""
    acts, grads = randn(5, 2, 7).to(device), randn(5, 2, 3, seed=1).to(device)
    acts[3, 1, 2] = NAN
    check(acts, grads)
    check(acts, grads, acts[2:], grads[2:])


def test_gram_products_beyond_2_to_the_31_elements(device):
    acts, grads = randn(2, 6).half().to(device), randn(2, 6, seed=1).half().to(device)
    # samples, positions and columns that far apart
    for view in (lambda x: x[:, None], lambda x: x[None], lambda x: x.T[None]):
        results = []
        for place in (lambda x: x, far_apart):
            a, g = view(place(acts)), view(place(grads))
            results.append(torch.zeros(len(a), len(a), device=device))
            gram_op(a, g, a, g, True, results[-1], impl="triton")
        assert identical(*results)


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"k": 4}])
def test_grad_gram(device, options):
    acts = [randn(9, 3, 20).to(device), randn(9, 12, seed=1).to(device)]
    grads = [randn(9, 3, 5, seed=2).to(device), randn(9, 7, seed=3).to(device)]
    found, expected = (
        grad_gram(acts, grads, **options, impl=impl) for impl in ("triton", "reference")
    )
    if "k" in options:
        assert torch.equal(found.rows, expected.rows) and torch.equal(found.cols, expected.cols)
        found, expected = found.values, expected.values
    torch.testing.assert_close(found, expected)


def test_gram_products_are_deterministic(device):
    acts, grads = randn(70, 2, 40).to(device), randn(70, 2, 20, seed=1).to(device)
    first = grad_gram(acts, grads, impl="triton")
    for _ in range(1 if _triton.interpreting() else 20):
        assert identical(grad_gram(acts, grads, impl="triton"), first)
