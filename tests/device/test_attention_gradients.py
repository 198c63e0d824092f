# SPDX-License-Identifier: Apache-2.0
"""Attention's gradients in Triton; for the CPU: tests/ops/test_attention_gradients.py."""

import matrix_unit
import pytest
import torch
from oracle import assert_accurate, far_and_near, identical, randn, unchanged

from mikernels import _triton, attention_gradients
from mikernels.kernels.attention import attention_gradients as launcher

NAN, INF = float("nan"), float("inf")


def operands(device, dtype, b, h, g, t, s, e, f):
    """grad, q, k, v, out."""
    shapes = (b, h, t, f), (b, h, t, e), (b, g, s, e), (b, g, s, f), (b, h, t, f)
    return [randn(*shape, dtype=dtype, seed=i).to(device) for i, shape in enumerate(shapes)]


def run(given, impl="triton", **options):
    """dq, dk, dv and the four checks."""
    dq, dk, dv, checks = attention_gradients(*given, **options, impl=impl)
    return dq, dk, dv, *checks.unbind(-1)


def written_out(given, keep=None, bias=None, causal=False, window=0, softcap=0.0, scale=None,
                temperature=1.0):  # fmt: skip
    """The first check, P rounded to the operands' dtype as for the matrix unit; and what roundings
    of the last two are relative to: terms without their signs, as often as scores are large."""
    grad, q, k, v, out = (t.float() for t in given)
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    kept = (j > i - window) if window else torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    kept = (kept & (i >= j) if causal else kept).to(q.device)
    kept = kept if keep is None else kept & keep
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    s = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.mT)
    s = softcap * (s / softcap).tanh() if softcap else s
    more = 1 + s.abs()
    s = (s if bias is None else s + bias.float()).masked_fill(~kept, -INF)
    plain, tempered = (torch.softmax(x, -1).nan_to_num(0) for x in (s, s / temperature))
    p = plain.to(given[0].dtype).float()
    far = ((p @ v - out).abs() / v.abs().amax(2, keepdim=True)).amax(-1)
    dp = grad.abs() @ v.abs().mT
    terms = [p * more * (dp + (p * more * dp).sum(-1, keepdim=True)) for p in (plain, tempered)]
    return far, sum(terms).square().sum(-1).max().item()


def check(given, **options):
    with unchanged(*given, options.get("keep"), options.get("bias")):
        found = run(given, **options)
    exact = run([t.double() for t in given], "reference", **options)
    eager = list(run(given, "reference", **options))
    eager[3], size = written_out(given, **options)
    sizes = [None] * 5 + [size] * 2
    for one, oracle, other, scale in zip(found, exact, eager, sizes, strict=True):
        assert_accurate(one, oracle, other, scale=scale)
    return found


# (B, H, G, T, S, e, f): rows whole and in parts, one block and several of either side
CASES = [
    ((1, 1, 1, 1, 1, 1, 1), {}),
    ((1, 2, 1, 70, 40, 16, 32), {"temperature": 2.0}),
    ((1, 1, 1, 150, 40, 16, 16), {"causal": True, "window": 9, "temperature": 2.0}),
    ((1, 1, 1, 9, 40, 144, 16), {"causal": True, "softcap": 0.5, "temperature": 3.0}),
    ((1, 1, 1, 20, 9, 70, 9), {"window": 4, "softcap": 50.0, "temperature": 1.5}),
    ((1, 1, 1, 9, 17, 5, 70), {"scale": 9.0}),
]


@pytest.mark.parametrize("shape, options", CASES, ids=str)
def test_attention_gradients_are_accurate(device, dtype, shape, options):
    check(operands(device, dtype, *shape), **options)


def test_other_tiles(device, monkeypatch):
    """Those of smaller GPUs, where 256 columns are multiplied in parts; and of wide rows."""
    check(operands(device, torch.bfloat16, 1, 1, 1, 5, 9, 272, 16), causal=True)
    monkeypatch.setattr(launcher, "is_deep", lambda device: False)
    check(operands(device, torch.bfloat16, 1, 2, 1, 70, 20, 16, 32), causal=True, temperature=2.0)
    check(operands(device, torch.bfloat16, 1, 1, 1, 5, 9, 144, 16), softcap=1.0)


@pytest.mark.parametrize("dt, keys", [(torch.bfloat16, 48), (torch.float16, 37)])
def test_masks(device, dt, keys):
    """In place, and where rows of masks begin at odd places or have strides of 0."""
    given = operands(device, dt, 2, 2, 1, 19, keys, 16, 16)
    keep = (randn(2, 1, 19, keys, seed=8) > -0.5).to(device)
    keep[:, :, 7] = False
    bias = randn(1, 2, 1, keys, dtype=torch.bfloat16, seed=9).to(device)
    bias[..., 3] = torch.finfo(torch.bfloat16).min
    found = check(given, keep=keep, bias=bias, causal=True, temperature=2.0)
    # nothing attended to: all that is left is what was claimed to be its output
    assert not any(found[i][:, :, 7].any() for i in (0, 4, 5, 6))
    bias = bias.float().transpose(2, 3).expand(1, 2, keys, 19).transpose(2, 3)
    check(given, bias=bias, keep=keep[:1, :, :1].expand(2, 2, 19, keys), softcap=3.0)
    # what is copied is not what was expanded
    wide = keep[:1, :, :1].expand(2, 2, 19, keys)
    assert launcher._in_rows(wide).numel() == (wide.numel() if keys == 48 else 48)
    found = run(given, bias=torch.full_like(bias, -INF))
    assert not any(t.any() for i, t in enumerate(found) if i != 3)


def test_layouts(device):
    given = operands(device, torch.float16, 2, 2, 1, 5, 9, 16, 16)
    expected = run(given, temperature=2.0)
    found = run([t.transpose(1, 2).contiguous().transpose(1, 2) for t in given], temperature=2.0)
    assert all(identical(x, y) for x, y in zip(found, expected, strict=True))
    check([torch.stack([t, t + 1], -1)[..., 0] for t in given], temperature=2.0)
    for axis in range(4):
        check([t.narrow(axis, 0, 1).expand(t.shape) for t in given], causal=True)


@pytest.mark.parametrize("axis", range(4))
def test_rows_beyond_2_to_the_31_elements(device, axis):
    results = []
    for t in far_and_near(device, 3, axis):
        bias = t[..., : t.shape[2]] if axis < 3 else None
        keep = None if bias is None else bias > -1
        results.append(run([t] * 5, bias=bias, keep=keep))
    assert all(identical(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("zero", [0, 1, 3, 4, 5, 6])
def test_a_size_of_zero(device, zero):
    shape = [2, 2, 1, 5, 6, 7, 8]
    shape[zero] = 0
    given = operands(device, torch.float32, *shape)
    for one, other in zip(run(given), run(given, "reference"), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("place", range(5))
def test_what_is_not_finite(device, place):
    for value, dt in ((NAN, torch.float32), (INF, torch.bfloat16)):
        given = operands(device, dt, 1, 2, 1, 9, 18, 16, 16)
        given[place][0, 0, 7, 3] = value
        for one, other in zip(run(given), run(given, "reference"), strict=True):
            assert torch.equal(one.isnan(), other.isnan())
            assert torch.equal(one.isinf(), other.isinf())


@pytest.mark.parametrize("t, s", [(300, 3), (3, 300)])
def test_long_sums_of_positive_numbers_are_accurate(device, monkeypatch, t, s):
    """dv of many queries, and P v of many keys, on a unit that truncates each time."""
    if _triton.interpreting():
        matrix_unit.install(monkeypatch)
    given = operands(device, torch.float32, 1, 1, 1, t, s, 4, 4)
    check([given[0].abs(), *given[1:3], given[3].abs(), given[4]])


def test_attention_gradients_are_deterministic(device):
    given = operands(device, torch.bfloat16, 1, 4, 2, 70, 70, 32, 16)
    first = run(given, causal=True)
    for _ in range(1 if _triton.interpreting() else 20):
        assert all(identical(x, y) for x, y in zip(run(given, causal=True), first, strict=True))
