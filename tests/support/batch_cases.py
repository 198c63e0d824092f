# SPDX-License-Identifier: Apache-2.0
"""How batch_topk_encode is judged, on the CPU and on a device."""

from __future__ import annotations

import torch
from oracle import (
    assert_accurate,
    assert_selected,
    eager_scores,
    encode_scores,
    identical,
    rounding_slack,
    unchanged,
)

from mikernels import SparseCodes, batch_topk_encode


def check(impl, x, w_enc, b_enc=None, *, k, b_dec=None, scale=None, relu=True, exact=False):
    """Codes against the oracle over the whole batch, as encode_cases.check is for each token."""
    arguments = {"b_dec": b_dec, "scale": scale}
    with unchanged(x, w_enc, b_enc, b_dec, scale):
        codes, threshold = batch_topk_encode(
            x, w_enc, b_enc, k=k, relu=relu, impl=impl, **arguments
        )
    x = x.reshape(-1, x.shape[-1])
    n, f = len(x), len(w_enc)
    total = int(k * n)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert codes.values.dtype == x.dtype and codes.shape == (n, f)
    assert codes.values.shape == codes.indices.shape == (total,)
    assert threshold.shape == () and threshold.dtype == wide
    # rows that ascend, and within them indices that do
    SparseCodes.ragged(codes.values, codes.indices, codes.row_offsets, f)
    assert codes.row_offsets[-1] == total
    flat = codes.tokens * f + codes.indices
    h, scores = (t.reshape(1, -1) for t in encode_scores(x, w_enc, b_enc, **arguments))
    eager_h, eager = (t.reshape(1, -1) for t in eager_scores(x, w_enc, b_enc, **arguments))
    exact = exact or impl == "cpp"
    if total:
        slack = None if exact else rounding_slack(scores, eager)
        assert_selected(flat[None].cpu(), scores.cpu(), slack)
        # the total-th from above; a NaN is the largest
        last = scores[0].cpu().kthvalue(n * f - total + 1).values.to(x.device)
        last = last.relu() if relu else last
    else:
        last = torch.tensor(float("inf"), dtype=wide, device=x.device)
    h, eager_h = h[0, flat], eager_h[0, flat]
    if relu:
        h, eager_h = h.relu(), eager_h.relu()
    if exact:
        for actual, expected in ((codes.values, h.to(x.dtype)), (threshold, last)):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert_accurate(codes.values, h.double(), eager_h)
        distance = (threshold - last).abs()
        assert identical(threshold, last) or distance <= rounding_slack(scores, eager)
    return codes
