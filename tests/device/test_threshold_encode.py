# SPDX-License-Identifier: Apache-2.0
"""Threshold encode by chunks of tokens: every pair above its feature's floor, in order, NaN too."""

import pytest
import torch
from oracle import identical, randint, randn
from threshold_cases import check, floors

from mikernels import threshold_encode
from mikernels.kernels.sae import chunk_scores
from mikernels.ops.sae.jump import gather_features


@pytest.fixture(params=[chunk_scores.PAIRS, 700], ids=["one chunk", "chunks"])
def pairs(request, monkeypatch):
    monkeypatch.setattr(chunk_scores, "PAIRS", request.param)


@pytest.mark.parametrize(
    "n, d, f", [(0, 3, 7), (1, 1, 1), (33, 17, 523), (31, 3, 257), (5, 33, 70)]
)
def test_it_is_exact(device, pairs, dtype, n, d, f) -> None:
    x, w = randn(n, d, dtype=dtype).to(device), randn(f, d, dtype=dtype, seed=1).to(device)
    b_enc, b_dec = (randn(m, dtype=dtype, seed=2).to(device) for m in (f, d))
    floor = floors(f).to(device)
    check("triton", x, w, floor=floor)
    check("triton", x, w.T.contiguous().T, b_enc, floor=floor, b_dec=b_dec)


def test_scores_at_the_floor_are_out(device, pairs) -> None:
    x, w = randint(60, 6).to(device), randint(90, 6, seed=1).to(device)
    for floor in (-2.0, 0.0, 3.0):
        check("triton", x, w, floor=torch.full((90,), floor, device=device), exact=True)


def test_what_is_not_finite(device, pairs) -> None:
    x, w = randn(40, 7), randn(90, 7, seed=1)
    x[3, 2], x[17, 0] = torch.nan, torch.inf
    w[5, 1] = -torch.inf
    check("triton", x.to(device), w.to(device), floor=floors(90).to(device))


def test_the_gradient_of_the_threshold(device, pairs) -> None:
    x, w = randint(60, 6).to(device), randint(90, 6, seed=1).to(device)
    theta = (torch.arange(90) % 4.0).to(device).requires_grad_()
    codes = threshold_encode(x, w, threshold=theta, bandwidth=2.5, impl="triton")
    h = x @ w.T
    assert torch.equal(codes.to_dense(), h.where(h > theta, 0))
    (found,) = torch.autograd.grad(codes.values.sum(), theta)
    inside = ((h - theta).abs() < 1.25).sum(0)
    torch.testing.assert_close(found, -theta.detach() / 2.5 * inside)


def test_sums_by_feature_have_the_same_bits_every_time(device) -> None:
    parameter = randn(50).to(device).requires_grad_()
    indices = (torch.arange(4000) ** 2 % 47).to(device)
    g = randn(4000, seed=1).to(device)
    out = gather_features(parameter, indices, impl="triton")
    sums = [torch.autograd.grad(out, parameter, g, retain_graph=True)[0] for _ in range(3)]
    exact = torch.zeros(50, dtype=torch.float64).index_add_(0, indices.cpu(), g.cpu().double())
    torch.testing.assert_close(sums[0].cpu(), exact.float(), rtol=1e-5, atol=1e-5)
    assert all(identical(s, sums[0]) for s in sums)
