# SPDX-License-Identifier: Apache-2.0
"""sae_update_ on the CPU: the reference, and the same composition of the extension's operators."""

import pytest
import torch
from oracle import assert_accurate, identical
from update_cases import changed, operands, plain, run, scale_of_sums

from mikernels.ops.sae.update import sae_update_op

SHAPES = [(0, 3, 5, 2), (1, 1, 1, 1), (33, 17, 101, 7), (97, 130, 40, 9), (5, 768, 300, 16)]


@pytest.mark.parametrize("project, unit_norm", [(0, 0), (1, 1)])
@pytest.mark.parametrize(
    "dtype, weights",
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_update_equals_gradients_and_torch_adam(impl, shape, dtype, weights, project, unit_norm):
    o = operands(*shape, dtype, weights)
    o = changed(o, project=bool(project), unit_norm=bool(unit_norm))
    outputs, shadows = run(sae_update_op, o, shadow=torch.bfloat16, impl=impl)
    scales = [None] * 6 + list(scale_of_sums(o))
    oracle, eager = plain(o, torch.float64), plain(o, torch.float32)
    for result, exact, in_eager, scale in zip(outputs, oracle, eager, scales, strict=True):
        assert_accurate(result, exact, in_eager, scale=scale)
    for shadow, weight in zip(shadows, outputs, strict=False):
        assert identical(shadow, weight.bfloat16())


def test_update_in_fp64(impl):
    o = operands(33, 17, 101, 7, torch.float64, torch.float64)
    outputs, _ = run(sae_update_op, o, impl=impl)
    for result, exact in zip(outputs, plain(o, torch.float64), strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-9, atol=1e-12)
