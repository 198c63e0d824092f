# SPDX-License-Identifier: Apache-2.0
"""Triton kernels that write: autograd is told, and memory is never shared."""

import pytest
import torch
from op_samples import LAYOUTS, SAMPLES

from mikernels._dispatch import OPS

WRITERS = [name for name, op in OPS.items() if op.written]


def samples(name, device):
    for sample in SAMPLES[name](LAYOUTS["dense"], 5, torch.float32):
        yield [a.to(device, copy=True) if isinstance(a, torch.Tensor) else a for a in sample]


@pytest.mark.parametrize("name", WRITERS)
def test_a_stale_backward_raises(device, name):
    for number in range(len(list(samples(name, device)))):
        for place in OPS[name].written:
            args = list(samples(name, device))[number]
            if args[place] is None:
                continue
            factor = torch.ones_like(args[place], requires_grad=True)
            loss = (factor * args[place]).sum()
            OPS[name](*args, impl="triton")
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@pytest.mark.parametrize("name", WRITERS)
def test_memory_that_is_shared_is_refused(device, name):
    for args in samples(name, device):
        for place in OPS[name].written:
            if args[place] is None:
                continue
            one = args[place][(slice(0, 1),) * args[place].dim()].clone()
            bad = [*args]
            bad[place] = one.expand(args[place].shape)
            with pytest.raises(ValueError, match=f"{name}: .* must have a place in memory"):
                OPS[name](*bad, impl="triton")
