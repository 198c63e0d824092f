# SPDX-License-Identifier: Apache-2.0
"""Every public operator with every size at 0, by its Triton kernels."""

import pytest
import zero_cases
from public_samples import PUBLIC

CASES = [case for case in zero_cases.CASES if case[0] != "mass_threshold"]


@pytest.mark.parametrize("name, letter", CASES)
def test_a_size_of_zero(device, name, letter):
    zero_cases.check(name, "triton", device, **{letter: 0})


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - {"mass_threshold"}))
def test_all_sizes(device, name):
    zero_cases.check(name, "triton", device)
