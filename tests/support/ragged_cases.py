# SPDX-License-Identifier: Apache-2.0
"""Every operator that takes codes, on ragged ones: what it gives for the same codes padded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import update_cases
from oracle import assert_accurate, identical, randint, randn, random_indices, unchanged

from mikernels import SparseCodes, by_feature
from mikernels.ops.sae.decode import decode_error_op, decode_op
from mikernels.ops.sae.gradients import feature_sum_op, gather_dot_op, sae_gradients_op
from mikernels.ops.sae.update import sae_update_op

# slots of each token, slots that are not in use, d, F
CASES = {
    "no tokens": ([], 0, 5, 9),
    "no slots": ([0, 0, 0], 0, 5, 9),
    "one slot": ([1], 0, 1, 1),
    "uneven": ([3, 0, 17, 1, 0, 0, 40, 2], 0, 33, 60),
    "unused slots": ([3, 0, 5, 9], 6, 17, 23),
    "unused slots of an empty token": ([3, 5, 0], 4, 17, 23),
    "nothing but unused slots": ([0, 0], 7, 8, 9),
    "one long row": ([0, 300, 1], 0, 40, 301),
    "many tokens": ([n * n % 23 for n in range(150)], 11, 30, 70),
    "wide": ([2, 0, 7], 1, 700, 12),
}


@dataclass
class Ragged:
    """The codes ragged, and padded to the longest row; `places` are the ragged slots in it."""

    values: torch.Tensor
    indices: torch.Tensor
    row_offsets: torch.Tensor
    padded: torch.Tensor
    padded_indices: torch.Tensor
    places: torch.Tensor
    n: int
    d: int
    f: int

    def codes(self) -> SparseCodes:
        return SparseCodes.ragged(self.values, self.indices, self.row_offsets, self.f)

    def tokens(self) -> torch.Tensor:
        tokens = self.codes().tokens
        assert tokens is not None
        return tokens


def ragged(name: str, dtype: torch.dtype, data=randint) -> Ragged:
    counts, unused, d, f = CASES[name]
    n, widths = len(counts), [*counts]
    if n:
        widths[-1] += unused
    k = max([1, *widths])
    padded = data(n, k, dtype=dtype)
    indices = random_indices(n, min(k, f), f)
    indices = torch.cat([indices, indices.new_zeros(n, k - indices.shape[1])], 1)
    for row, (count, width) in enumerate(zip(counts, widths, strict=True)):
        padded[row, count:] = 0
        indices[row, :count] = indices[row, :count].sort().values
        indices[row, width:] = 0
    inside = torch.arange(k) < torch.tensor(widths, dtype=torch.int64).reshape(-1, 1)
    places = inside.reshape(-1).nonzero()[:, 0]
    flat = (t.reshape(-1)[places] for t in (padded, indices))
    bounds = torch.tensor([0, *counts]).cumsum(0)
    return Ragged(*flat, bounds, padded, indices, places, n, d, f)


def on(device, *tensors):
    return [t if t is None else t.to(device) for t in tensors]


def check_decode(name, dtype, impl, device="cpu"):
    """Exact sums: integers. Then the accuracy of others."""
    r = ragged(name, dtype)
    w, bias = randint(r.f, r.d, dtype=dtype, seed=1), randint(r.d, dtype=dtype, seed=2)
    x = randint(r.n, r.d, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    given = on(device, r.values, r.indices, r.row_offsets, w, bias)
    padded = on(device, r.padded, r.padded_indices, None, w, bias)
    with unchanged(*given):
        assert identical(decode_op(*given, impl=impl), decode_op(*padded, impl=impl))
    error = decode_error_op(*given, x.to(device), impl=impl)
    expected = decode_error_op(*padded, x.to(device), impl=impl)
    assert all(map(identical, error, expected))
    r = ragged(name, dtype, randn)
    w = randn(r.f, r.d, dtype=dtype, seed=1)
    y = decode_op(*on(device, r.values, r.indices, r.row_offsets, w, None), impl=impl)
    eager = r.codes().to_dense() @ w
    assert_accurate(y.cpu(), r.codes().to(torch.float64).to_dense() @ w.double(), eager)


def check_decode_skips(dtype, impl, device="cpu"):
    """Rows of slots at 0, in use or not, are not read."""
    r = ragged("unused slots", dtype)
    w = randint(r.f, r.d, dtype=dtype, seed=1)
    idle = r.indices[-6:]
    r.values[torch.isin(r.indices, idle)] = 0
    given = r.values, r.indices, r.row_offsets
    expected = decode_op(*on(device, *given, w, None), impl=impl)
    w[idle] = float("nan")
    assert identical(decode_op(*on(device, *given, w, None), impl=impl), expected)


def check_gather_dot(name, dtype, impl, device="cpu"):
    for data in (randint, randn):
        r = ragged(name, dtype, data)
        rows, w = data(r.n, r.d, dtype=dtype, seed=1), data(r.f, r.d, dtype=dtype, seed=2)
        given = on(device, rows, w, r.indices, r.row_offsets)
        with unchanged(*given):
            dots = gather_dot_op(*given, None, impl=impl).cpu()
        if data is randint:
            padded = gather_dot_op(*on(device, rows, w, r.padded_indices, None, None), impl=impl)
            assert identical(dots, padded.cpu().reshape(-1)[r.places])
        else:
            exact, eager = (
                (rows.to(t)[r.tokens()] * w.to(t)[r.indices]).sum(-1)
                for t in (torch.float64, dtype)
            )
            assert_accurate(dots, exact, eager)


def check_levels(name, dtype, impl, device="cpu"):
    """gather_dot and sae_gradients_ with levels, two widths and given gradients."""
    r = ragged(name, dtype)
    wide = torch.float64 if dtype == torch.float64 and impl == "reference" else torch.float32
    levels = torch.arange(r.f) % 3
    dy, x = randint(3, r.n, r.d, dtype=dtype), randint(r.n, r.d + 2, dtype=dtype, seed=1)
    w = randint(r.f, r.d, dtype=dtype, seed=2)
    given = on(device, dy, w, r.indices, r.row_offsets, levels)
    dots = gather_dot_op(*given, impl=impl).cpu()
    padded_dots = gather_dot_op(*on(device, dy, w, r.padded_indices, None, levels), impl=impl).cpu()
    assert identical(dots, padded_dots.reshape(-1)[r.places])
    padded_pre = torch.zeros_like(padded_dots).reshape(-1)
    padded_pre[r.places] = dots
    (values, *slots), (padded, *padded_slots) = both_ways(r)
    for d_pre, padded_given in ((None, None), (dots, padded_pre.view_as(padded_dots))):
        results = []
        for operands, pre in (
            ((values, r.indices, *slots), d_pre),
            ((padded, r.padded_indices, *padded_slots, None), padded_given),
        ):
            out = [randint(*s, seed=3).to(wide) for s in ((r.f, r.d), (r.f, r.d + 2), (r.f,))]
            out = on(device, *out)
            sae_gradients_op(*on(device, *operands, dy, x, w, levels, pre), *out, True, impl=impl)
            results.append(out)
        assert all(map(identical, *results))


def both_ways(r: Ragged):
    slots = by_feature(r.indices, r.f)
    return (r.values, *slots, r.tokens()), (
        r.padded,
        *by_feature(r.padded_indices.reshape(-1), r.f),
    )


def check_feature_sum(name, dtype, impl, device="cpu"):
    r = ragged(name, dtype)
    rows = randint(r.n, r.d, dtype=dtype, seed=1)
    (values, *slots), (padded, *padded_slots) = both_ways(r)
    given = on(device, values, rows, *slots)
    with unchanged(*given):
        found = feature_sum_op(*given, impl=impl)
    expected = feature_sum_op(*on(device, padded, rows, *padded_slots, None), impl=impl)
    assert all(map(identical, found, expected))


def check_sae_gradients(name, dtype, impl, device="cpu", accumulate=True):
    r = ragged(name, dtype)
    wide = torch.float64 if dtype == torch.float64 and impl == "reference" else torch.float32
    dy, x, w = (
        randint(size, r.d, dtype=dtype, seed=seed) for seed, size in enumerate((r.n, r.n, r.f))
    )
    (values, *slots), (padded, *padded_slots) = both_ways(r)
    results = []
    for operands in ((values, r.indices, *slots), (padded, r.padded_indices, *padded_slots, None)):
        out = [randint(*s, seed=3).to(wide) for s in ((r.f, r.d), (r.f, r.d), (r.f,))]
        out = on(device, *out)
        given = on(device, *operands, dy, x, w)
        with unchanged(*given):
            sae_gradients_op(*given, None, None, *out, accumulate, impl=impl)
        results.append(out)
    assert all(map(identical, *results))


def check_update(name, impl, device="cpu"):
    r = ragged(name, torch.float32)
    dy, x = randint(r.n, r.d, seed=1), randint(r.n, r.d, seed=2)
    (values, *slots), (padded, *padded_slots) = both_ways(r)
    results = []
    for operands in ((values, r.indices, *slots), (padded, r.padded_indices, *padded_slots, None)):
        weights = randint(r.f, r.d, seed=3), randint(r.f, r.d, seed=4)
        moments = [torch.zeros(r.f, r.d) for _ in range(4)]
        settings = torch.tensor(update_cases.LR), *update_cases.BETAS, update_cases.EPS
        rest = torch.tensor(1), torch.tensor(1.0)
        rows = on(device, *operands, dy, x, *weights, *moments)
        lr, *others = settings
        sums = sae_update_op(
            *rows, None, None, lr.to(device), *others, *on(device, *rest), False, False, impl=impl
        )
        results.append([*rows[-6:], *sums])
    for a, b in zip(*results, strict=True):
        assert identical(a, b)
