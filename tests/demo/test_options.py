# SPDX-License-Identifier: Apache-2.0
"""Options: checked, and their defaults by data."""

import pytest

from mikernels.demo.options import DemoOptions


@pytest.mark.parametrize(
    "options", [{"data": "cifar"}, {"k": 0}, {"tokens": 10}, {"steps": 30, "baseline_steps": 25}]
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match="^demo: "):
        DemoOptions(**options)


def test_options_for_data_keep_what_is_given():
    options = DemoOptions.for_data("mnist", k=7, steps=None)
    assert (options.k, options.steps) == (7, DemoOptions.for_data("mnist").steps)
    assert DemoOptions.for_data("smollm2", quick=True).steps < DemoOptions().steps
