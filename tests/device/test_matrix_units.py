# SPDX-License-Identifier: Apache-2.0
"""What bounds take for granted about products by `tl.dot`, on this machine's matrix unit."""

import pytest
import torch

from mikernels.bench.gpu import matrix_units


@pytest.mark.parametrize("low", matrix_units.DTYPES)
@pytest.mark.parametrize("warps, size", [(1, 16), (4, 64)])
def test_products_are_exact_and_their_sums_are_bounded(device, low, warps, size) -> None:
    probe = matrix_units.Probe(
        lambda a, b: matrix_units.by_triton(a, b, warps), low, size, torch.device(device)
    )
    assert probe.inexact_products() == 0
    # the interpreter sums in fp32, in an order of its own
    assert probe.guard_bits() >= 1 or device == "cpu"
    assert probe.of_bound() <= 1
