# SPDX-License-Identifier: Apache-2.0
"""mass_threshold in CUDA C++ without a GPU: its kernels run on the CPU, and what nvcc made of
them."""

import ctypes
import math
from fractions import Fraction

import pytest
import torch
from emulated import DTYPES, ORDERS, bits, check_built, library, struct
from hypothesis import given
from hypothesis import strategies as st
from mass_cases import FRACTIONS, definition
from oracle import randint, randn

import mikernels
from mikernels import _ext
from mikernels.ops.select.mass_threshold import mass_threshold_op, reference

NAN, INF = float("nan"), float("inf")

Call = struct(
    x=ctypes.c_void_p,
    n=ctypes.c_int64,
    fraction=ctypes.c_double,
    absolute=ctypes.c_int32,
    blocks=ctypes.c_int32,
    out=ctypes.c_void_p,
    order=ctypes.c_uint64,
)


def threshold(x, frac, absolute=False, *, offset=0, blocks=2, order=0):
    """Of a copy of x, `offset` elements behind a 16-byte boundary, in memory that is NaN."""
    memory = torch.full((16 + offset + x.numel() + 16,), NAN, dtype=x.dtype)
    assert memory.data_ptr() % 16 == 0
    placed = memory[16 + offset :][: x.numel()]
    # as integers: a copy of floats may give a NaN other bits
    bits(placed).copy_(bits(x).reshape(-1))
    out = torch.full((3,), 77.0, dtype=x.dtype)
    call = Call(placed.data_ptr(), x.numel(), frac, absolute, blocks, out[1:].data_ptr(), order)
    message = library("mass_threshold").mass_threshold(DTYPES.index(x.dtype), ctypes.byref(call))
    assert message == b"", message
    assert out[0] == out[2] == 77, "written beside the threshold"
    return out[1]


def check(x, frac, absolute=False, **how):
    found = threshold(x, frac, absolute, **how).item()
    assert found == definition(x, frac, absolute), (x.shape, frac, how)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_fraction_of_spread_masses(dtype):
    # over 20 powers of two, as scores of edges are; blocks of 1024 vectors, and a part of one
    x = (randn(9001) * 3).clamp(-7, 7).exp().to(dtype)
    for number, frac in enumerate(FRACTIONS):
        order = ORDERS[number % len(ORDERS)]
        check(x, frac, offset=number % 8, blocks=1 + number % 3, order=order)
        check(-x[: number + 1], frac, True, order=order)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_extremes(dtype):
    limits = torch.finfo(dtype)
    cases = [
        torch.zeros(5),
        -torch.zeros(5),
        torch.tensor([3.0]),
        torch.tensor([0, 0, 2, 0]),
        torch.ones(10),
        torch.tensor([4, 3, 2, 1]),
        randint(501).abs(),
        # denormals, the values around a power of two, and all exponents at once
        torch.arange(9, dtype=torch.float64) * (limits.tiny / 8),
        torch.tensor([1, 1 - 2**-8, 1 + 2**-7, 2, 2 - 2**-7]),
        torch.tensor([limits.max, limits.max, 1, limits.tiny, limits.tiny / 4]),
        2.0 ** torch.arange(math.log2(limits.tiny), math.log2(limits.max)),
    ]
    for number, case in enumerate(cases):
        for frac in (0.0, 0.3, 0.7, 0.75, 1.0):
            check(case.to(dtype), frac, order=number)
            check(-case.to(dtype), frac, True, order=number)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_carry_and_do_not_depend_on_the_grid(dtype):
    # 40,000 equal significands: the 32-bit sums of a bin overflow in every block
    x = torch.full((40_000,), torch.finfo(dtype).max / 2**9, dtype=dtype)
    x[7::1000] = x[0] * 1.25
    x[11::5000] = x[0] * 2
    for frac in (1e-3, 2e-3, 0.5):
        for blocks, order in ((1, 0), (3, 1), (8, 7)):
            check(x, frac, blocks=blocks, order=order)


def test_sums_are_exact():
    """What fp64 sums would get wrong in any order: the masses that decide lie 2^-80 below."""
    big, small = 2.0**60, 2.0**-40
    x = torch.cat([torch.tensor([big]), torch.full((7,), small)])
    # sums rounded once: the large one alone is the total
    check(x, 1.0)
    assert threshold(x, 1.0) == big
    # 2^53 + 1 + 2^-20: the last entry lifts the sum over the middle between two fp64 numbers
    for last, expected in ((2.0**-20, 2.0**-20), (0.0, 2.0**53)):
        x = torch.tensor([2.0**53, 1.0, last])
        assert threshold(x, 1.0) == definition(x, 1.0, False) == expected
    x = torch.tensor([2.0**100, 2.0**47, 2.0**-149])
    assert threshold(x, 1.0) == definition(x, 1.0, False) == 2.0**-149
    total = sum(Fraction(v) for v in x.double().tolist())
    assert Fraction(math.fsum(x.double().tolist())) > total, "it was rounded up"


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_it_does_not_take_gives_nan(dtype):
    x = randn(300, dtype=dtype).abs()
    for value, absolute in ((NAN, False), (NAN, True), (INF, False), (-INF, True), (-1.0, False)):
        bad = x.clone()
        bad[-1] = value
        found, expected = threshold(bad, 0.5, absolute), reference(bad, 0.5, absolute)
        assert found.isnan() and expected.isnan(), (value, absolute)
    bad[-1] = -0.0
    check(bad, 0.5)


@given(
    seed=st.integers(0, 2**16),
    frac=st.one_of(st.sampled_from(FRACTIONS), st.floats(0, 1)),
    n=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 1.0, 9.0, 60.0]),
)
def test_property(seed, frac, n, dtype, spread):
    exponents = randn(n, seed=seed) * spread
    limit = math.log2(torch.finfo(dtype).max) - 2
    x = randint(n, seed=seed) * exponents.clamp(-limit, limit).exp2().double()
    check(x.to(dtype), frac, True, offset=seed % 8, order=seed)


def test_nvcc_made_no_spills():
    # four blocks of 256 threads on a multiprocessor
    check_built("mass_threshold", 10, 64)


def test_operator_is_there_or_says_why_not():
    if _ext.C is None or _ext.build_facts()["cuda"]["reason"]:
        pytest.skip(mass_threshold_op.backends()["cuda"])
    assert mass_threshold_op.backends()["cuda"] == "ready"
    x = torch.empty(5, 300, device="meta", dtype=torch.bfloat16)
    # of the raw operator: by name it takes cuda tensors alone
    out = torch.ops.mikernels.mass_threshold_cuda(x, 0.5, False)
    assert (out.shape, out.dtype) == ((), torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"impl='cuda' .*runs on cuda tensors, got cpu"):
        mikernels.mass_threshold(torch.ones(3), 0.5, impl="cuda")
