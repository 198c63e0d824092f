# SPDX-License-Identifier: Apache-2.0
"""Every public operator with every size at 0, by its Triton kernels."""

import pytest
import test_zero_sizes
from public_samples import PUBLIC

CASES = [case for case in test_zero_sizes.CASES if case[0] != "mass_threshold"]


@pytest.mark.parametrize("name, letter", CASES)
def test_a_size_of_zero(device, name, letter):
    test_zero_sizes.check(name, "triton", device, **{letter: 0})


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - {"mass_threshold"}))
def test_all_sizes(device, name):
    test_zero_sizes.check(name, "triton", device)
