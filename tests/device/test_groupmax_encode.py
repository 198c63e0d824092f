# SPDX-License-Identifier: Apache-2.0
"""GroupMax encode by chunks of tokens and features: exact, ties to the first, NaN first."""

import pytest
import torch
from encode_cases import NON_FINITE
from groupmax_cases import check, group_counts
from oracle import randint, randn

from mikernels import groupmax_encode
from mikernels.kernels.sae import groupmax_encode as launcher


# the last cuts every group of more than four features
@pytest.fixture(params=[(4096, 1 << 23), (7, 700), (4, 16)], ids=["one chunk", "chunks", "parts"])
def chunks(request, monkeypatch):
    for name, size in zip(("TOKENS", "SCORES"), request.param, strict=True):
        monkeypatch.setattr(launcher, name, size)


@pytest.mark.parametrize(
    "n, d, f, k", [(0, 3, 8, 2), (1, 1, 1, 1), (33, 17, 523, 1), (9, 3, 256, 16), (5, 33, 70, 70)]
)
def test_it_is_exact(device, chunks, dtype, n, d, f, k) -> None:
    x, w = randn(n, d, dtype=dtype).to(device), randn(f, d, dtype=dtype, seed=1).to(device)
    b_enc, b_dec = (randn(m, dtype=dtype, seed=2).to(device) for m in (f, d))
    scale = randn(f, dtype=dtype, seed=4).to(device)
    check("triton", x, w, k=k)
    check("triton", x, w, b_enc, k=k, b_dec=b_dec, relu=False)
    check("triton", x, w, b_enc, k=k, b_dec=b_dec, scale=scale)


def test_ties_go_to_the_first_of_a_group(device, chunks) -> None:
    x, w = randint(30, 6).to(device), randint(120, 6, seed=1).to(device)
    for k in group_counts(120):
        check("triton", x, w, k=k, exact=True)


@pytest.mark.parametrize("case", NON_FINITE)
def test_what_is_not_finite_ranks_as_it_should(device, chunks, case) -> None:
    operands = [randint(*shape, seed=len(shape)) for shape in ((9, 12), (301, 12), (301,), (12,))]
    NON_FINITE[case](*operands)
    x, w, b_enc, b_dec = (t.to(device) for t in operands)
    for k in (1, 7, 301):
        check("triton", x, w, b_enc, k=k, b_dec=b_dec, exact=True)


def test_any_strides(device, chunks) -> None:
    x, w = randint(8, 20).to(device), randint(20, 120, seed=1).to(device)
    check("triton", x, w.T, k=6, exact=True)
    check("triton", x[::2, ::2], w.T[:, 1::2], k=6, exact=True)
    check("triton", x[:1].expand(3, 20), w.T[::3], k=8, b_dec=x[0], exact=True)


def test_gradients(device) -> None:
    leaves = [
        randn(*s, seed=i).to(device).requires_grad_()
        for i, s in enumerate(((4, 12), (60, 12), (60,), (12,)))
    ]
    x, w, b_enc, b_dec = leaves
    codes = groupmax_encode(x, w, b_enc, k=5, b_dec=b_dec, impl="triton")
    weights = randn(4, 5, seed=9).to(device)
    found = torch.autograd.grad((codes.values * weights).sum(), leaves)
    h = ((x - b_dec) @ w.T + b_enc).relu().unflatten(-1, (5, -1)).max(-1).values
    for a, b in zip(found, torch.autograd.grad((h * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)
