# SPDX-License-Identifier: Apache-2.0
"""How threshold_encode is judged, on the CPU and on a device, and floors hard to decide at."""

from __future__ import annotations

import torch
from encode_cases import ADVERSARIAL
from oracle import (
    assert_accurate,
    eager_scores,
    encode_scores,
    identical,
    rounding_slack,
    unchanged,
)

from mikernels import SparseCodes
from mikernels.ops.sae.threshold_encode import slots_above


def check(impl, x, w_enc, b_enc=None, *, floor, b_dec=None, exact=False):
    """Slots against the oracle: the set (cpp: exactly), then the values of the pairs kept."""
    n_features = w_enc.shape[0]
    with unchanged(x, w_enc, b_enc, b_dec, floor):
        codes = slots_above(x, w_enc, b_enc, b_dec, floor, wide=True, impl=impl)
        rounded = slots_above(x, w_enc, b_enc, b_dec, floor, impl=impl)
    x = x.flatten(0, -2) if x.dim() > 1 else x[None]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert codes.values.dtype == acc and codes.shape == (len(x), n_features)
    # rows that ascend, and within them indices that do; every slot is in use
    SparseCodes.ragged(codes.values, codes.indices, codes.row_offsets, n_features)
    assert codes.row_offsets[-1] == len(codes.values)
    assert rounded.values.dtype == x.dtype and identical(rounded.values, codes.values.to(x.dtype))
    assert torch.equal(rounded.indices, codes.indices)
    h, _ = encode_scores(x, w_enc, b_enc, b_dec=b_dec)
    chosen = torch.zeros(h.shape, dtype=torch.bool, device=h.device)
    chosen[codes.tokens, codes.indices] = True
    wanted = ~(h <= floor)
    eager, _ = eager_scores(
        *(None if t is None else t.to(acc) for t in (x, w_enc, b_enc)),
        b_dec=None if b_dec is None else b_dec.to(acc),
    )
    exact = exact or impl == "cpp"
    if exact:
        assert torch.equal(chosen, wanted)
        expected = h[codes.tokens, codes.indices]
        torch.testing.assert_close(codes.values, expected, rtol=0, atol=0, equal_nan=True)
        return codes
    if h.numel():
        slack = rounding_slack(h, eager)
        assert not ((chosen != wanted) & ~((h - floor).abs() <= slack)).any()
    assert_accurate(
        codes.values,
        h[codes.tokens, codes.indices].double(),
        eager[codes.tokens, codes.indices],
    )
    return codes


def at_scores(case: str) -> dict:
    """An adversarial case whose floors are scores themselves, of one token for each feature: those
    are out, and their nearest neighbours are decided by one rounding."""
    arguments = ADVERSARIAL[case]()
    arguments.pop("k"), arguments.pop("scale", None)
    arguments.pop("fp32_sums_overflow", None)
    if case == "cancelling":  # on a grid, where the order of fp64 sums does not decide either
        arguments["x"] = (arguments["x"] * 2**10).round() / 2**10
        arguments["w_enc"] = (arguments["w_enc"] * 2**20).round() / 2**20
    h, _ = encode_scores(
        arguments["x"], arguments["w_enc"], arguments.get("b_enc"), b_dec=arguments.get("b_dec")
    )
    tokens = torch.arange(h.shape[1]) % h.shape[0]
    # the tokens in the upper half of a feature's scores, and some of the lower one
    order = h.nan_to_num().sort(0, descending=True).indices
    floor = h.gather(0, order.gather(0, tokens[None]))[0]
    floor = floor.masked_fill(floor.isnan(), 0)
    steps = torch.arange(h.shape[1]) % 3
    below, above = (floor.nextafter(torch.full_like(floor, e)) for e in (-torch.inf, torch.inf))
    return {
        **arguments,
        "floor": torch.stack([floor, below, above])[steps, torch.arange(len(steps))],
    }


def floors(n_features: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of every kind: low, high, zero, none, all."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = torch.tensor(
        [-3.0, 2.0, 0.0, -0.0, torch.inf, -torch.inf, 8.0, -8.0, 1.0, -1.0, 1e-40], dtype=acc
    )
    return kinds.repeat(n_features // len(kinds) + 1)[:n_features]
