# SPDX-License-Identifier: Apache-2.0
"""Do the two runs agree, and the summary of both."""

import math

import pytest
from demo_cases import history

from mikernels.demo.compare import compare, results_table, summarise


@pytest.mark.parametrize(
    ("dense", "fused", "agree"),
    [
        ([2.0, 1.0], [2.0, 1.0, 0.5], True),
        ([2.0] * 6, [2.0 * (1 + 5e-5)] * 5 + [2.0 * (1 - 1e-2)], True),
        ([2.0] * 6, [2.0 * (1 + 2e-4)] + [2.0] * 5, False),
        ([2.0] * 6, [2.0] * 4 + [2.0 * (1 - 2e-4), 2.0], False),
        ([2.0] * 6, [2.0] * 5 + [2.0 * (1 + 3e-2)], False),
        ([2.0] * 6, [2.0] * 5 + [math.nan], False),
        ([math.nan], [math.nan], False),
        ([0.0, 2.0], [0.0, 2.0], True),
        ([0.0, 2.0], [1e-9, 2.0], False),
    ],
)
def test_compare_limits_the_first_steps_and_every_step(dense, fused, agree):
    result = compare(history(dense), history(fused))
    assert result["agree"] is agree
    assert result["steps"] == len(dense)
    assert ("DISAGREE" in result["message"]) is not agree


def test_compare_shows_a_nan_wherever_it_is_and_needs_a_common_step():
    for at in range(8):
        losses = [2.0 * (1 + 1e-6)] * 8
        losses[at] = math.nan
        said = compare(history([2.0] * 8), history(losses))["message"]
        assert said.startswith("losses DISAGREE") and "nan in all" in said
        assert ("most nan in the first 5" in said) is (at < 5)
    with pytest.raises(ValueError, match="demo: the two runs must have steps in common, got none"):
        compare(history([2.0]), [])


def test_summary_compares_the_common_step_and_names_the_last():
    results = {
        "dense": {"rows": history([4.0, 3.0]), "peak_extra_bytes": 300 << 20},
        "fused": {"rows": history([4.0, 3.0, 2.0]), "peak_extra_bytes": 100 << 20},
    }
    rows = {row[0]: row[1:] for row in summarise(results, 100, 0.25)}
    assert rows["peak extra memory"] == ("300 MB", "100 MB", "3.0x")
    assert rows["training FVU after 2 steps"] == ("3.0000", "3.0000", "")
    assert rows["training FVU after 3 steps"] == ("", "2.0000", "")
    assert rows["FVU of held-out activations"] == ("", "0.2500", "")
    results["dense"]["peak_extra_bytes"] = None
    rows = {row[0]: row[1:] for row in summarise(results, 100, 0.25)}
    assert rows["peak extra memory"] == ("not measured", "100 MB", "")
    assert len(results_table(summarise(results, 100, 0.25)).rows) == len(rows)
