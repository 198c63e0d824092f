# SPDX-License-Identifier: Apache-2.0
"""Accuracy and range of products on the matrix unit, which truncates what it sums."""

import matrix_unit
import pytest
import torch
from oracle import assert_accurate, randn

from mikernels import (
    _triton,
    block_norms,
    edge_mix,
    edge_scores_heads,
    grad_gram,
    pairwise_products,
    positional_dot,
)
from mikernels.kernels.pairs import pair_products

INF, NAN, MOST = float("inf"), float("nan"), torch.finfo(torch.float32).max
FP32, BF16 = torch.float32, torch.bfloat16
# columns of a sum
K = 4096


@pytest.fixture(autouse=True)
def truncating(monkeypatch):
    """The matrix unit's sums, and as where tiles are many: none shared out among programs."""
    monkeypatch.setattr(pair_products, "PROGRAMS", 1)
    if _triton.interpreting():
        matrix_unit.install(monkeypatch)


def _scaled(a, weight, **impl):
    return pairwise_products(a, weight=weight, **impl)


def _mixed(delta, mask, **impl):
    return edge_mix(None, delta, mask, **impl)


def _at_positions(grads, vectors, **impl):
    return positional_dot(grads, vectors, torch.arange(4, device=grads.device) % 2, **impl)


# every use of `multiply`: dtype, function, shapes of operands
LONG = {
    "bf16": (BF16, pairwise_products, (1, 5, K), (1, 3, K)),
    "bf16 scaled": (BF16, _scaled, (1, 5, K), (K,)),
    "rows of heads": (BF16, edge_scores_heads, (1, 1, 3, 4), (3, 4, K), (1, 1, 5, K)),
    "heads": (BF16, edge_scores_heads, (1, 1, 2, K), (2, K, 8), (1, 1, 3, 8)),
    "gram": (BF16, grad_gram, (3, K), (3, K)),
    "norms": (BF16, block_norms, (2, 3, K), (3, K, 2)),
    "norms of fp32": (FP32, block_norms, (2, 3, K), (3, K, 2)),
    # the result is rounded to the dtype of the operands
    "mix": (FP32, _mixed, (1, 1, K, 3), (K, 2)),
    "positions": (BF16, _at_positions, (3, 2, K), (4, K)),
}


@pytest.mark.parametrize("case", LONG)
def test_long_sums_of_positive_numbers_are_accurate(device, case):
    """Every truncation errs to the same side. Sums are in fp32 whatever the operands are."""
    dtype, function, *shapes = LONG[case]
    given = [randn(*s, dtype=dtype, seed=i).abs().to(device) for i, s in enumerate(shapes)]
    found = function(*given, impl="triton")
    exact, eager = (
        function(*(t.to(wide) for t in given), impl="reference") for wide in (torch.float64, FP32)
    )
    assert_accurate(found, exact, eager)


def test_fp32_products_of_any_size_are_accurate(device):
    """Each by itself, to what `multiply` leaves out; where eager has inf or NaN, so do we."""
    powers = 2.0 ** torch.tensor([-149, -140, -133, -126, -119, -60, 0, 60, 119, 127])
    sizes = torch.cat([powers, powers * (1 + 2.0**-23), powers * (2 - 2.0**-23)])
    special = torch.tensor([0.0, MOST, MOST * (1 - 2.0**-9), INF, -INF, NAN])
    x = torch.cat([sizes, sizes * (1 + randn(len(sizes)).abs() / 4), -sizes, special]).to(device)
    found, eager = pairwise_products(x[None, :, None], impl="triton"), x[:, None] * x
    exact, size = x.double()[:, None] * x.double(), x.double().abs()
    most = exact.abs() * 2.0**-22 + torch.maximum(size[:, None], size) * 2.0**-147 + 2.0**-148
    finite = eager.isfinite()
    assert ((found.double() - exact).abs() <= most)[finite].all()
    tiny = (x != 0) & (size < 2.0**-134)
    unknown = tiny[:, None] & x.isinf() | tiny & x.isinf()[:, None]
    unknown |= (exact.abs() - 2.0**128).abs() <= 2.0**106
    both = (t[~finite & ~unknown] for t in (found, eager))
    torch.testing.assert_close(*both, rtol=0, atol=0, equal_nan=True)
