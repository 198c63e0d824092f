# SPDX-License-Identifier: Apache-2.0
"""Attention's gradients written out, as T x S matrices: in torch, or in numpy's long doubles."""

from __future__ import annotations

import numpy as np
import torch
from oracle import assert_accurate, randn, unchanged

from mikernels import attention_gradients
from mikernels._dispatch import accumulate_dtype

NAMES = "dq", "dk", "dv"


def operands(b, h, g, t, s, e, f, dtype=torch.float32):
    """grad, q, k, v, out."""
    shapes = (b, h, t, f), (b, h, t, e), (b, g, s, e), (b, g, s, f), (b, h, t, f)
    return [randn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def may_attend(shape, keep=None, bias=None, causal=False, window=0):
    """`[B, H, T, S]`."""
    i, j = torch.arange(shape[2])[:, None], torch.arange(shape[3])
    kept = torch.ones(shape, dtype=torch.bool)
    if keep is not None:
        kept = kept & keep
    if bias is not None:
        kept = kept & (bias > -torch.inf)
    if causal:
        kept = kept & (i >= j)
    return kept & (i - j < window) if window else kept


def written_out(lib, grad, q, k, v, out, kept, bias, scale, softcap, temperature):
    """Of heads that share no keys, in `lib`, torch or numpy: dq, dk, dv and four checks; and of
    each what roundings are relative to: its terms without their signs, and times 1 + |score|
    where they have an exponential of a score."""

    def turned(x):
        return lib.swapaxes(x, -1, -2)

    def total(x):
        return x.sum(-1)[..., None]

    def softmax(s):
        largest = lib.amax(s, axis=-1, keepdims=True)
        p = lib.exp(s - lib.where(largest > -np.inf, largest, lib.zeros_like(largest)))
        return p / lib.where(total(p) > 0, total(p), total(p) + 1)

    raw = scale * (q @ turned(k))
    capped = softcap * lib.tanh(raw / softcap) if softcap else raw
    s = lib.where(kept, capped + bias, lib.full_like(raw, -np.inf))
    p, tempered, dp = softmax(s), softmax(s / temperature), grad @ turned(v)
    ds = tempered * (dp - total(tempered * dp))
    plain = p * (dp - total(p * dp))
    through = ds * (1 - (capped / softcap) ** 2) if softcap else ds
    columns = lib.amax(lib.abs(v), axis=-2, keepdims=True)
    distance = lib.abs(p @ v - out) / columns
    raw = lib.where(kept, lib.abs(raw), lib.zeros_like(raw))
    change = ds - plain
    checks = (
        lib.amax(distance, axis=-1),
        lib.amax(raw, axis=-1),
        (change**2).sum(-1),
        (plain**2).sum(-1),
    )
    found = scale * (through @ k), scale * (turned(through) @ q), turned(p) @ grad, *checks
    q, k, v, grad, out, bias = (lib.abs(x) for x in (q, k, v, grad, out, bias))
    score = scale * (q @ turned(k))
    # beside the least number of a dtype a score vanishes: no rounding of it is left
    more = 1 + score + lib.where(bias < 1e30, bias, lib.zeros_like(bias))
    dp = grad @ turned(v)
    tempered_size = tempered * more * (dp + total(tempered * more * dp))
    plain_size = p * more * (dp + total(p * more * dp))
    sizes = (
        scale * (tempered_size @ k),
        scale * (turned(tempered_size) @ q),
        turned(p * more) @ grad,
        (((p * more) @ v + out) / columns).max(),
        score,
        (lib.abs(change) * (tempered_size + plain_size)).sum(-1),
        (lib.abs(plain) * plain_size).sum(-1),
    )
    return found, [float(x.max()) for x in sizes]


def expected(wide, grad, q, k, v, out, *, keep=None, bias=None, scale=None, softcap=0.0,
             causal=False, window=0, temperature=1.0):  # fmt: skip
    """What is written out in long doubles, rounded to fp64, or in the accumulator type."""
    acc, group = accumulate_dtype(q.dtype), q.shape[1] // k.shape[1]
    shape = (*q.shape[:3], k.shape[2])
    bias = torch.zeros(1, dtype=acc) if bias is None else bias.to(acc)
    kept = may_attend(shape, keep, bias, causal, window)
    each = [grad, q, *(t.repeat_interleave(group, 1) for t in (k, v)), out]
    numbers = [t.to(acc) for t in (*each, bias.expand(shape))]
    if wide:
        numbers = [t.numpy().astype(np.longdouble) for t in numbers]
        kept = kept.numpy()
    options = q.shape[-1] ** -0.5 if scale is None else scale, softcap, temperature
    found, sizes = written_out(np if wide else torch, *numbers[:5], kept, numbers[5], *options)
    dq, dk, dv, *checks = (torch.as_tensor(np.asarray(x, float) if wide else x) for x in found)
    dk, dv = (x.reshape(*k.shape[:2], group, *x.shape[2:]).sum(2) for x in (dk, dv))
    return [dq, dk, dv, *checks], sizes


KNOWN = {}


def known(*arguments, **options):
    """`expected`, once for all implementations: long doubles take most of the tests' time."""

    def bits(x):
        if not isinstance(x, torch.Tensor):
            return x
        return (
            x.shape,
            x.dtype,
            hash(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()),
        )

    key = tuple(map(bits, (*arguments, *options, *options.values())))
    if key not in KNOWN:
        KNOWN[key] = expected(*arguments, **options)
    return KNOWN[key]


def check_gradients(impl, *tensors, **options):
    masks = [options[name] for name in ("keep", "bias") if options.get(name) is not None]
    with unchanged(*tensors, *masks):
        found = attention_gradients(*tensors, **options, impl=impl)
    dtype = tensors[0].dtype
    assert [t.dtype for t in found] == [dtype] * 3 + [accumulate_dtype(dtype)]
    everything = (*found[:3], *found[3].unbind(-1))
    exact, sizes = known(True, *tensors, **options)
    eager, _ = known(False, *tensors, **options)
    for one, oracle, other, size in zip(everything, exact, eager, sizes, strict=True):
        assert_accurate(one, oracle, other.to(one.dtype), scale=size)
    return found
