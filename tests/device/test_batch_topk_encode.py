# SPDX-License-Identifier: Apache-2.0
"""BatchTopK encode by chunks of tokens: exact over the batch, ties by flat position, NaN first."""

import pytest
import torch
from batch_cases import check
from oracle import randint, randn

from mikernels import batch_topk_encode
from mikernels.kernels.sae import chunk_scores


@pytest.fixture(params=[chunk_scores.PAIRS, 700], ids=["one chunk", "chunks"])
def pairs(request, monkeypatch):
    monkeypatch.setattr(chunk_scores, "PAIRS", request.param)


@pytest.mark.parametrize(
    "n, d, f, k", [(1, 1, 1, 1), (33, 17, 523, 0.01), (31, 3, 257, 5.3), (5, 33, 70, 69.9)]
)
def test_it_is_exact(device, pairs, dtype, n, d, f, k) -> None:
    x, w = randn(n, d, dtype=dtype).to(device), randn(f, d, dtype=dtype, seed=1).to(device)
    b_enc, b_dec = (randn(m, dtype=dtype, seed=2).to(device) for m in (f, d))
    scale = randn(f, dtype=dtype, seed=4).to(device)
    check("triton", x, w, k=k)
    check("triton", x, w, b_enc, k=k, b_dec=b_dec, relu=False)
    check("triton", x, w, b_enc, k=k, b_dec=b_dec, scale=scale)


def test_ties_go_by_flat_position(device, pairs) -> None:
    x = randint(60, 6).to(device)
    w = randint(90, 6, seed=1).to(device)
    flat = (x @ w.T).flatten()
    for total in (1, 61, 777, 60 * 90):
        codes, threshold = batch_topk_encode(x, w, k=total / 60, relu=False, impl="triton")
        expected = flat.argsort(descending=True, stable=True)[:total].sort().values
        assert torch.equal(codes.tokens * 90 + codes.indices, expected)
        assert threshold == flat[expected].min()


@pytest.mark.parametrize("k", [0.1, 2.5, 40])
def test_what_is_not_finite_ranks_as_it_should(device, pairs, k) -> None:
    x, w = randn(40, 7), randn(90, 7, seed=1)
    x[3, 2], x[17, 0] = torch.nan, torch.inf
    w[5, 1] = -torch.inf
    check("triton", x.to(device), w.to(device), k=k)
