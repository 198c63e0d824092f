# SPDX-License-Identifier: Apache-2.0
"""How groupmax_encode is judged, on the CPU and on a device."""

from __future__ import annotations

import torch
from oracle import (
    assert_accurate,
    assert_selected,
    eager_scores,
    encode_scores,
    rounding_slack,
    unchanged,
)

from mikernels import groupmax_encode


def group_counts(n_features: int) -> list[int]:
    """One group, groups of one feature, and a count between where F is no prime."""
    few = max(k for k in range(1, 10) if n_features % k == 0)
    return sorted({1, few, n_features // few, n_features})


def check(impl, x, w_enc, b_enc=None, *, k, b_dec=None, scale=None, relu=True, exact=False):
    """Codes against the oracle, as encode_cases.check; each group of a token is a row."""
    arguments = {"b_dec": b_dec, "scale": scale}
    with unchanged(x, w_enc, b_enc, b_dec, scale):
        codes = groupmax_encode(x, w_enc, b_enc, k=k, relu=relu, impl=impl, **arguments)
    assert codes.values.dtype == x.dtype
    assert codes.values.shape == codes.indices.shape == (*x.shape[:-1], k)
    assert codes.n_features == w_enc.shape[0]
    x, f = x.reshape(-1, x.shape[-1]), len(w_enc)
    rows = len(x) * k, f // k
    starts = torch.arange(0, f, f // k, device=x.device)
    within = (codes.indices.reshape(-1, k) - starts).reshape(-1, 1)
    h, scores = (t.reshape(rows) for t in encode_scores(x, w_enc, b_enc, **arguments))
    eager_h, eager = (t.reshape(rows) for t in eager_scores(x, w_enc, b_enc, **arguments))
    exact = exact or impl == "cpp"
    assert_selected(within, scores, None if exact else rounding_slack(scores, eager))
    h, eager_h = h.gather(1, within), eager_h.gather(1, within)
    if relu:
        h, eager_h = h.relu(), eager_h.relu()
    values = codes.values.reshape(-1, 1)
    if exact:
        torch.testing.assert_close(values, h.to(x.dtype), rtol=0, atol=0, equal_nan=True)
    else:
        assert_accurate(values, h.double(), eager_h)
    return codes
