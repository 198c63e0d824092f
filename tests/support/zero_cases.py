# SPDX-License-Identifier: Apache-2.0
"""Public operators with sizes at 0: the value of the equation, or an error by name."""

import pytest
import torch
from public_samples import PUBLIC

CASES = [(name, letter) for name, p in PUBLIC.items() for letter in sorted(set("".join(p.shapes)))]


def check(name, impl, device="cpu", **zero):
    with torch.device(device):
        check_there(name, impl, device, zero)


def check_there(name, impl, device, zero):
    public = PUBLIC[name]
    tensors = [t.to(device) for t in public.tensors(**zero)]
    refused = next((public.refused[letter] for letter in zero if letter in public.refused), None)
    if refused is not None:
        with pytest.raises((ValueError, RuntimeError, IndexError), match=refused):
            public.call(impl, *tensors)
        return
    actual = public.call(impl, *tensors)
    wide = [t.double() for t in tensors]
    expected = public.plain(*wide)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-4, atol=1e-5)
    if not public.differentiable:
        return
    for t in (*tensors, *wide):
        t.requires_grad_()
    ours = torch.autograd.grad(public.call(impl, *tensors).sum(), tensors, allow_unused=True)
    theirs = torch.autograd.grad(public.plain(*wide).sum(), wide, allow_unused=True)
    for t, a, b in zip(tensors, ours, theirs, strict=True):
        a, b = (t.new_zeros(t.shape) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-4)
