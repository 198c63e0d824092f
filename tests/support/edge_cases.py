# SPDX-License-Identifier: Apache-2.0
"""Edges as plain torch has them, and operands, for the tests of edge_scores and edge_mix."""

from __future__ import annotations

import torch
from oracle import assert_accurate, randn, unchanged

from mikernels import edge_mix, edge_scores
from mikernels._dispatch import accumulate_dtype

SHAPES = [  # B, P, W, R, d
    (1, 1, 1, 1, 1),
    (2, 3, 5, 7, 9),
    (3, 1, 97, 33, 17),
    (1, 70, 13, 40, 64),
    (2, 5, 100, 98, 130),
    (5, 2, 1, 2, 1031),
]


def operands(batch, positions, writers, readers, d, dtype=torch.float32, make=randn):
    """delta, grad, mask and the base of each reader."""
    shapes = (positions, writers, d), (positions, readers, d), (positions, readers, d)
    delta, grad, base = (
        make(batch, *shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)
    )
    return delta, grad, make(writers, readers, dtype=dtype, seed=3), base


def deltas(wide):
    """[2, 3, 10, 9] in many layouts, of [4, 6, 40, 36]."""
    return {
        "a slice of a larger buffer": wide[:2, :3, 3:13, :9],
        "strided": wide[::2, ::2, ::4, ::4],
        "transposed": wide[:2, :3, :9, :10].mT,
        "writers first": wide[:2, :3, :10, :9].movedim(2, 0).contiguous().movedim(0, 2),
        "all reversed": wide[:2, :3, :10, :9].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "expanded examples": wide[:1, :3, :10, :9].expand(2, 3, 10, 9),
        "expanded positions": wide[:2, :1, :10, :9].expand(2, 3, 10, 9),
        "expanded writers": wide[:2, :3, :1, :9].expand(2, 3, 10, 9),
        "expanded width": wide[:2, :3, :10, :1].expand(2, 3, 10, 9),
    }


def allowed(writers, prefix):
    """[W, R], or [W, 1] for an int."""
    return torch.arange(writers)[:, None] < prefix


def plain_scores(delta, grad, prefix=None, weights=None, dtype=torch.float64):
    """[Q, W, R], or [W, R] without weights: examples one by one, then their sums."""
    scores = torch.einsum("bpwd,bprd->bwr", delta.to(dtype), grad.to(dtype))
    if weights is None:
        scores = scores.sum(0)
    else:
        scores = torch.einsum("qb,bwr->qwr", weights.to(dtype), scores)
    return scores if prefix is None else scores.where(allowed(scores.shape[-2], prefix), 0)


def plain_mix(base, delta, mask, dtype=torch.float64):
    y = torch.einsum("wr,bpwd->bprd", mask.to(dtype), delta.to(dtype))
    if base is None:
        return y
    return y + (base[:, :, None] if base.dim() == 3 else base).to(dtype)


def compare(actual, plain, *operands, exact=False):
    """With `plain` in fp64; what one rounding is relative to are the sums of |terms|."""
    acc = accumulate_dtype(actual.dtype)
    oracle = plain(*operands)
    if exact:
        expected = oracle.to(actual.dtype)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        return
    sizes = plain(
        *(t.abs() if torch.is_tensor(t) and t.is_floating_point() else t for t in operands)
    )
    scale = sizes.max().item() if sizes.numel() else 0
    assert_accurate(actual, oracle, plain(*operands, dtype=acc), scale=scale)


def check_scores(impl, delta, grad, prefix=None, weights=None, exact=False):
    with unchanged(delta, grad, prefix if torch.is_tensor(prefix) else None, weights):
        scores = edge_scores(delta, grad, prefix=prefix, weights=weights, impl=impl)
    assert scores.dtype == accumulate_dtype(delta.dtype)
    compare(scores, plain_scores, delta, grad, prefix, weights, exact=exact)
    return scores


def check_mix(impl, base, delta, mask, exact=False):
    with unchanged(base, delta, mask):
        y = edge_mix(base, delta, mask, impl=impl)
    assert y.dtype == delta.dtype
    compare(y, plain_mix, base, delta, mask, exact=exact)
    return y
