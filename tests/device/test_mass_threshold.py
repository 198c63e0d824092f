# SPDX-License-Identifier: Apache-2.0
"""mass_threshold on a GPU: CUDA C++, and what runs where it was not built."""

import pytest
import torch
from mass_cases import FRACTIONS, definition
from oracle import randint, randn

from mikernels import _triton, mass_threshold
from mikernels._dispatch import OPS

pytestmark = pytest.mark.skipif(_triton.interpreting(), reason="no Triton kernel: needs a GPU")


@pytest.fixture(params=["cuda", "reference"])
def impl(request):
    if OPS["mass_threshold"].backends()[request.param] != "ready":
        pytest.skip(OPS["mass_threshold"].backends()[request.param])
    return request.param


@pytest.mark.parametrize("shape", [(1,), (7, 33), (300_001,), (3, 1000, 977)])
def test_mass_threshold_is_exact(device, impl, dtype, shape):
    x = (randn(*shape) * 3).clamp(-7, 7).exp().to(dtype)
    for values in (x, randint(*shape, dtype=dtype).abs()):
        placed = values.to(device)
        for frac in FRACTIONS:
            found = mass_threshold(placed, frac, impl=impl).item()
            # fp64's running sum of the reference may err where millions of entries are added
            assert found == definition(values, frac, False) or (
                impl == "reference" and values.numel() > 10_000
            )
    strided = placed.mT[::2] if placed.dim() > 1 else placed[::3]
    found = mass_threshold(-strided, 0.9, abs=True, impl=impl).item()
    assert found == definition(strided.cpu(), 0.9, False)


def test_mass_threshold_is_deterministic_and_waits_for_nothing(device, impl, dtype):
    x = randn(2_000_003, dtype=dtype).abs().to(device)
    first = mass_threshold(x, 0.7, impl=impl)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [mass_threshold(x, 0.7, impl=impl) for _ in range(20)]
        bad = mass_threshold(torch.where(x == x[5], float("nan"), x), 0.7, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(t, first) for t in again) and bad.isnan()
