# SPDX-License-Identifier: Apache-2.0
"""Operands of decode_levels, and what it computes in plain torch, for CPU and device tests."""

from __future__ import annotations

import ragged_cases
import torch
from oracle import assert_accurate, identical, randint, randn, random_indices, unchanged

from mikernels._dispatch import accumulate_dtype
from mikernels.ops.sae.decode_levels import decode_levels_op

# n, d, F, k, L
SHAPES = [
    (0, 5, 9, 2, 3),
    (1, 1, 1, 1, 1),
    (33, 17, 64, 9, 4),
    (9, 600, 99, 20, 5),
    (7, 40, 30, 5, 7),
]


def operands(n, d, f, k, count, dtype, *, bias=True, data=randn):
    """values, indices, w, bias, x, levels, mix; the levels are no rings, and the last is empty
    where there are three or more."""
    acc = accumulate_dtype(dtype)
    values, indices = data(n, k, dtype=dtype).relu(), random_indices(n, k, f)
    levels = torch.randint(max(count - (count > 2), 1), (f,), generator=generator(f))
    return (
        values,
        indices,
        data(f, d, dtype=dtype, seed=1),
        data(d, dtype=dtype, seed=2) if bias else None,
        data(n, d, dtype=acc, seed=3),
        levels,
        data(count, count, seed=4),
    )


def generator(seed):
    return torch.Generator().manual_seed(seed)


def arguments(operands, row_offsets=None):
    """As the operator takes them."""
    values, indices, *rest = operands
    return [values, indices, row_offsets, *rest]


def plain(dtype, values, indices, w, bias, x, levels, mix):
    """mixed, error, squares of padded codes, every step in `dtype`."""
    values, w, x, mix = (t.to(dtype) for t in (values, w, x, mix))
    terms = values[..., None] * w[indices]
    active = (values != 0)[..., None]
    errors = []
    for p in range(len(mix)):
        inside = active & (levels[indices] <= p)[..., None]
        y = torch.where(inside, terms, 0).sum(1)
        errors.append((y if bias is None else y + bias.to(dtype)) - x)
    products = mix[..., None, None] * torch.stack(errors)
    mixed = torch.where(mix[..., None, None] != 0, products, 0).sum(1)
    return mixed, errors[-1], torch.stack([e.square().sum(-1) for e in errors])


def on(device, given):
    return [t if t is None else t.to(device) for t in given]


def run(operands, impl, device="cpu", row_offsets=None):
    given = on(device, arguments(operands, row_offsets))
    with unchanged(*given):
        return [t.cpu() for t in decode_levels_op(*given, impl=impl)]


def check(operands, impl, device="cpu"):
    exact = plain(torch.float64, *operands)
    eager = plain(accumulate_dtype(operands[0].dtype), *operands)
    for found, oracle, in_eager in zip(run(operands, impl, device), exact, eager, strict=True):
        assert found.dtype == operands[4].dtype
        assert_accurate(found, oracle, in_eager)


def check_ragged(name, dtype, impl, device="cpu"):
    """Exact sums: integers."""
    r = ragged_cases.ragged(name, dtype)
    acc = accumulate_dtype(dtype)
    w, bias = randint(r.f, r.d, dtype=dtype, seed=1), randint(r.d, dtype=dtype, seed=2)
    levels = torch.arange(r.f) % 3
    rest = w, bias, randint(r.n, r.d, dtype=acc, seed=3), levels, randint(3, 3, seed=4)
    found = run((r.values, r.indices, *rest), impl, device, r.row_offsets)
    expected = plain(torch.float64, r.padded, r.padded_indices, *rest)
    assert all(identical(a, e.to(acc)) for a, e in zip(found, expected, strict=True))


def check_layouts(dtype, impl, device="cpu"):
    values, indices, w, bias, x, levels, mix = operands(8, 6, 20, 4, 3, dtype, data=randint)
    wide = [torch.stack([t, t + 1], -1)[..., 0] for t in (values, indices, w, x, mix)]
    turned = [t.mT.contiguous().mT for t in (values, indices, w, x, mix)]
    for v, i, rows, target, m in (wide, turned):
        given = v, i, rows, bias[:1].expand(6), target, torch.stack([levels, levels], 1)[:, 0], m
        exact = plain(torch.float64, *given)
        for a, e in zip(run(given, impl, device), exact, strict=True):
            assert identical(a, e.to(a.dtype))
    given = values, indices, w[:, :1].expand(20, 6), bias, x[:1].expand(8, 6), levels, mix
    for a, e in zip(run(given, impl, device), plain(torch.float64, *given), strict=True):
        assert identical(a, e.to(a.dtype))


def check_skips(dtype, impl, device="cpu"):
    """NaN in rows of inactive slots and of prefixes that are not mixed stays out."""
    given = list(operands(8, 6, 20, 4, 3, dtype, data=randint))
    values, indices, w, _, _, levels, mix = given
    values[indices == 5] = 0
    values[0, 0], levels[:] = 2, torch.arange(20) % 3
    mix[1] = torch.tensor([3.0, -1.0, 0.0])
    expected = run(given, impl, device)
    w[5] = float("nan")
    assert all(map(identical, run(given, impl, device), expected))
    # a NaN at the last level is in its prefix alone
    hit = int(indices[0, 0])
    levels[hit] = 2
    expected = run(given, impl, device)
    w[hit] = float("nan")
    mixed, error, _ = run(given, impl, device)
    assert error[0].isnan().all() and identical(mixed[1], expected[0][1])


def check_non_finite(impl, device="cpu"):
    nan, inf = float("nan"), float("inf")
    values = torch.tensor([[1.0, 1.0, 1.0], [1.0, nan, 1.0], [1.0, 1.0, inf]])
    indices, levels = torch.tensor([0, 1, 2]).expand(3, 3), torch.tensor([0, 1, 2])
    given = values, indices, torch.ones(3, 4), None, torch.zeros(3, 4), levels, torch.eye(3)
    mixed, error, squares = run(given, impl, device)
    assert torch.equal(mixed[:, 0, 0], torch.tensor([1.0, 2.0, 3.0]))
    assert mixed[0, 1, 0] == 1 and mixed[1:, 1].isnan().all() and error[1].isnan().all()
    assert torch.equal(mixed[:, 2, 1], torch.tensor([1.0, 2.0, inf])) and squares[2, 2] == inf
