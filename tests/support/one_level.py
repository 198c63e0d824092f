# SPDX-License-Identifier: Apache-2.0
"""Marks for what no instruction-set level can change, such as checks, strides and autograd.

Levels differ only within `MIK_AT_LEVEL(f)(...)`, behind the checks and the allocations. A test so
marked runs at the level in use alone (`impl`: and on the reference), not at all four.
"""

import pytest

import mikernels

IN_USE = mikernels.supported_levels()[-1:]

one_level = pytest.mark.parametrize("level", IN_USE, indirect=True)
one_impl = pytest.mark.parametrize("impl", ("reference", *IN_USE), indirect=True)
