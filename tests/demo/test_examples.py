# SPDX-License-Identifier: Apache-2.0
"""Where features fire, and which of them are shown."""

import math

import pytest
import torch
from demo_cases import token_data

from mikernels.demo.examples import choose_features
from mikernels.evaluate import variance_unexplained
from mikernels.evaluate.firing import encode_all


def test_encode_all_finds_where_each_feature_fires():
    sae, rows, _ = token_data()
    firing = encode_all(sae, rows["activations"], batch=128)
    for feature in range(12):
        where, values = firing.of(feature)
        mine = (rows["token_ids"] == feature).nonzero().squeeze(-1)
        assert torch.equal(where.sort().values, mine)
        assert torch.equal(values, values.sort(descending=True).values)
        assert torch.equal(rows["activations"][where].amax(-1), values.detach())
        assert firing.counts[feature] == mine.numel()
        assert firing.maxima[feature] == values[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_refused(value):
    sae, rows, _ = token_data()
    x = rows["activations"].clone()
    x[[3, 500], 4] = value
    with pytest.raises(ValueError, match="NaN or inf in 2 of the 600 rows"):
        encode_all(sae, x)
    with pytest.raises(ValueError, match="variance_unexplained: x must be finite"):
        variance_unexplained(sae, x)
    with torch.no_grad():
        sae.b_dec[2] = value
    with pytest.raises(ValueError, match="the reconstructions of sae must be finite"):
        variance_unexplained(sae, rows["activations"])


def test_choose_features_keeps_to_the_shares_and_one_label_each():
    sae, rows, _ = token_data()
    firing = encode_all(sae, rows["activations"])
    everything = choose_features(firing, rows["token_ids"], shares=(0.01, 0.5))
    assert sorted(everything) == list(range(12))
    assert len(choose_features(firing, rows["token_ids"], shares=(0.01, 0.5), n=5)) == 5
    assert choose_features(firing, rows["token_ids"], shares=(0.3, 0.5)) == []
    one = torch.zeros_like(rows["token_ids"])
    assert len(choose_features(firing, one, shares=(0.01, 0.5))) == 1
    start = torch.zeros_like(one)
    assert choose_features(firing, one, start, shares=(0.01, 0.5)) == []
