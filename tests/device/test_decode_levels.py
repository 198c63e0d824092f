# SPDX-License-Identifier: Apache-2.0
"""decode_levels in Triton; for the CPU: tests/ops/test_decode_levels.py."""

import level_cases
import pytest
import ragged_cases
import torch
from oracle import far_apart, identical

from mikernels.kernels.sae import decode_levels as kernel
from mikernels.ops.sae.decode_levels import decode_levels_op

CASES = [c for c in ragged_cases.CASES if c not in ("many tokens", "one long row")]


@pytest.mark.parametrize("n, d, f, k, count", level_cases.SHAPES)
def test_accuracy(device, dtype, n, d, f, k, count):
    level_cases.check(level_cases.operands(n, d, f, k, count, dtype), "triton", device)
    level_cases.check(level_cases.operands(n, d, f, k, count, dtype, bias=False), "triton", device)


@pytest.mark.parametrize("case", CASES)
def test_ragged(device, dtype, case):
    level_cases.check_ragged(case, dtype, "triton", device)


@pytest.mark.parametrize("scan", [2])
def test_slots_that_are_not_in_use(device, monkeypatch, scan):
    monkeypatch.setattr(kernel, "SCAN", scan)
    for case in ("unused slots", "nothing but unused slots"):
        level_cases.check_ragged(case, torch.float32, "triton", device)


def test_layouts(device):
    level_cases.check_layouts(torch.float32, "triton", device)


def test_inactive_slots_and_shares_of_zero_add_nothing(device, dtype):
    level_cases.check_skips(dtype, "triton", device)


def test_non_finite_numbers_stay_with_their_prefixes(device):
    level_cases.check_non_finite("triton", device)


def test_rows_beyond_2_to_the_31_elements(device):
    operands = level_cases.operands(3, 20, 2, 2, 2, torch.float16)
    given = level_cases.on(device, level_cases.arguments(operands))
    near = decode_levels_op(*given, impl="triton")
    given[3] = far_apart(given[3])
    assert all(map(identical, decode_levels_op(*given, impl="triton"), near))


def test_levels_outside_count_as_the_nearest(device):
    operands = level_cases.operands(4, 5, 9, 2, 3, torch.float32)
    given = level_cases.on(device, level_cases.arguments(operands))
    expected = decode_levels_op(*given, impl="triton")
    given[6] = torch.where(given[6] == 0, -(2**40), given[6])
    assert all(map(identical, decode_levels_op(*given, impl="triton"), expected))
