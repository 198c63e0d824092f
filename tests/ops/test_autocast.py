# SPDX-License-Identifier: Apache-2.0
"""Under autocast operators compute in the dtype of their inputs, forward and backward."""

import pytest
import torch
from op_samples import LAYOUTS, SAMPLES, copies
from oracle import randn
from public_samples import PUBLIC

import mikernels as mk
from mikernels import _crossover
from mikernels._dispatch import OPS
from mikernels.ops.sae.decode import decode_error
from mikernels.ops.sae.gradients import weighted_row_sum


@pytest.fixture(params=[True, False], ids=["sparse", "dense"])
def side(monkeypatch, request):
    """Both sides of the crossover."""
    monkeypatch.setattr(_crossover, "sparse_wins", lambda *sizes: request.param)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def results(call, tensors, differentiable):
    """The output and, if there are any, first and second gradients."""
    leaves = [t.detach().requires_grad_(differentiable) for t in tensors]
    y = call(*leaves)
    if not differentiable:
        return [y]
    # no pow, which autocast would widen
    first = torch.autograd.grad((y * y * y).sum(), leaves, create_graph=True, allow_unused=True)
    first = [g for g in first if g is not None]
    second = torch.autograd.grad(sum((g * g).sum() for g in first), leaves, allow_unused=True)
    return [t for t in (y, *first, *second) if t is not None]


@pytest.mark.parametrize("chosen", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.usefixtures("side")
def test_autocast_changes_no_bit(name, dtype, chosen):
    public = PUBLIC[name]
    tensors = public.tensors(dtype, F=400, d=33, D=33, i=33)

    def call(*leaves):
        return public.call(chosen, *leaves)

    expected = results(call, tensors, public.differentiable)
    with autocast():
        actual = results(call, tensors, public.differentiable)
        assert torch.is_autocast_enabled("cpu"), "autocast is on again"
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        # second derivatives in fp16 overflow
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", SAMPLES)
def test_autocast_changes_no_raw_operator(name):
    for arguments in SAMPLES[name](LAYOUTS["dense"], 5, torch.float32):
        for run in (OPS[name].default, lambda *a: OPS[name](*a, impl="reference")):
            plain, rounded = copies(arguments), copies(arguments)
            expected = run(*plain)
            with autocast():
                actual = run(*rounded)
            results = [r if isinstance(r, tuple) else (r,) for r in (actual, expected)]
            pairs = [*zip(*results, strict=True), *zip(rounded, plain, strict=True)]
            for a, b in pairs:
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.usefixtures("side")
def test_autocast_changes_neither_residual_nor_sums():
    w, x = randn(400, 33), randn(6, 33, seed=1)
    codes = mk.topk_encode(x, w, k=3)
    expected = *decode_error(codes, w, None, x), weighted_row_sum(w[:, 0], w)
    with autocast():
        actual = *decode_error(codes, w, None, x), weighted_row_sum(w[:, 0], w)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_precision_rounds_with_and_without_autocast():
    x, w = randn(6, 33), randn(400, 33, seed=1)
    expected = mk.topk_encode(x, w, k=3, precision=torch.bfloat16)
    assert not torch.equal(expected.values, mk.topk_encode(x, w, k=3).values)
    with autocast():
        actual = mk.topk_encode(x, w, k=3, precision=torch.bfloat16)
    assert torch.equal(actual.values, expected.values)


def test_autocast_under_compile():
    x, w = randn(6, 33), randn(4, 33, seed=1)

    def function(x, w):
        with autocast():
            return mk.topk_encode(x, w, k=2).values * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w), function(x, w))
    assert torch.equal(function(x, w), mk.topk_encode(x, w, k=2).values * 2)
