# SPDX-License-Identifier: Apache-2.0
"""bf16 in the interpreter as tests/support/interpreter_bf16.py makes it; on a GPU, as it is."""

import re

import pytest
import torch
import triton
import triton.language as tl
from oracle import identical, randint
from triton.runtime.errors import InterpreterError

from mikernels import _triton

interpreted = pytest.mark.skipif(not _triton.interpreting(), reason="needs TRITON_INTERPRET=1")
# every sign, exponent and upper fraction, below which lie a tie and its neighbours
UPPER = torch.arange(2**16, dtype=torch.int32) << 16
LOWER = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
NUMBERS = (UPPER[:, None] | LOWER).view(torch.float32)


@triton.jit
def _copy_kernel(source, target, n, CAST: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source + at, at < n, other=0.0)
    if CAST:
        x = x.to(target.dtype.element_ty)
    tl.store(target + at, x, at < n)


def copied(numbers: torch.Tensor, dtype: torch.dtype, cast: bool) -> torch.Tensor:
    target = torch.empty_like(numbers, dtype=dtype)
    grid = (triton.cdiv(numbers.numel(), 2**14),)
    _copy_kernel[grid](numbers, target, numbers.numel(), CAST=cast, BLOCK=2**14)
    return target


@pytest.mark.parametrize("cast", [False, True], ids=["by the store", "cast"])
def test_rounding_is_to_nearest_and_to_even_at_ties(device, cast) -> None:
    # torch has the same rule: 0x3F808000 lies between 1 and 1 + 2^-7
    assert NUMBERS[0x3F80, 3].bfloat16() == 1 and NUMBERS[0x3F81, 3].bfloat16() == 1 + 2**-6
    found = copied(NUMBERS.to(device), torch.bfloat16, cast).cpu()
    expected = NUMBERS.bfloat16()
    assert torch.equal(found.isnan(), NUMBERS.isnan())
    number = ~NUMBERS.isnan()
    assert torch.equal(found.view(torch.int16)[number], expected.view(torch.int16)[number])


@pytest.mark.parametrize("to", [torch.float32, torch.float64, torch.float16])
def test_what_is_loaded_is_the_number(device, to) -> None:
    numbers = NUMBERS[:, 0].bfloat16()
    found = copied(numbers.to(device), to, True).cpu()
    # by way of fp32, which every bf16 number is
    number = ~numbers.isnan()
    assert torch.equal(found.isnan(), ~number)
    assert identical(found[number], numbers.float().to(to)[number])


@triton.jit
def _product_kernel(a, b, out, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None] * N, tl.arange(0, N)[None, :]
    x, y = tl.load(a + rows + columns), tl.load(b + rows + columns)
    total = tl.dot(x, y, tl.full([N, N], 0.5, tl.float32))
    tl.store(out + rows + columns, total)


def test_products_are_those_of_the_numbers(device) -> None:
    # products of 2 x 8 bits whose sum of 32 has at most 24: exact in fp32, in any order
    a = (randint(32, 32) * 60 + randint(32, 32, seed=2) / 2).bfloat16()
    b = (randint(32, 32, seed=1) * 61 - 0.5).bfloat16()
    a[3, 4], b[5, 6], b[7, 8] = torch.inf, torch.nan, -torch.inf
    out = torch.empty(32, 32, device=device)
    _product_kernel[(1,)](a.to(device), b.to(device), out, N=32)
    expected = (a.double() @ b.double() + 0.5).float()
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def _arithmetic_kernel(x, y, out, KIND: tl.constexpr):
    at = tl.arange(0, 4)
    a, b = tl.load(x + at), tl.load(y + at)
    if KIND == "sum":
        a = a + b
    elif KIND == "comparison":
        a = tl.where(a < b, 1.0, 0.0)
    elif KIND == "maximum":
        a = tl.maximum(a, b)
    elif KIND == "negation":
        a = -a
    elif KIND == "fma":
        a = tl.fma(a, b, b)
    elif KIND == "clamp":
        a = tl.clamp(a, b, b)
    elif KIND == "reduction":
        a = tl.sum(a, 0)
    elif KIND == "scan":
        a = tl.cumsum(a, 0)
    elif KIND == "rounding mode":
        a = a.to(tl.float32).to(tl.bfloat16, fp_downcast_rounding="rtz")
    elif KIND == "two roundings":
        a = (a.to(tl.float64) / 3).to(tl.bfloat16)
    tl.store(out + at, a)


# of a and b in fp32
ARITHMETIC = {
    "sum": lambda a, b: a + b,
    "negation": lambda a, b: -a,
    "comparison": lambda a, b: (a < b).float(),
    "maximum": torch.maximum,
    "fma": lambda a, b: a * b + b,
    "clamp": lambda a, b: b,
    "reduction": lambda a, b: a.sum().expand(4),
    "scan": lambda a, b: a.cumsum(0),
    "rounding mode": lambda a, b: a,
    "two roundings": lambda a, b: (a / 3).bfloat16().float(),
}


@interpreted
@pytest.mark.parametrize("kind", ARITHMETIC)
def test_what_would_be_wrong_raises(kind) -> None:
    a, b = torch.tensor([-1.0, 2, -3, 4]), torch.tensor([-2.0, 1.5, -1, 5])
    out = torch.empty(4)
    try:
        _arithmetic_kernel[(1,)](a.bfloat16(), b.bfloat16(), out, KIND=kind)
    except InterpreterError as error:
        assert re.search("NotImplementedError.*(bf16|fp32)", str(error))
    else:
        # some releases of Triton upcast for some operations
        assert torch.equal(out, ARITHMETIC[kind](a, b))


@interpreted
def test_another_interpreter_is_refused() -> None:
    import interpreter_bf16
    from interpreter_patches import replace

    class Builder:
        def load(self, pointers): ...

    for name in ("load", "store"):
        with pytest.raises(RuntimeError, match=rf"Builder\.{name} of Triton .* must take \['self'"):
            replace(Builder, name, "ptrs mask", interpreter_bf16._cast)
