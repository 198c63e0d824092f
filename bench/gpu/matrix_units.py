# SPDX-License-Identifier: Apache-2.0
"""What proofs and bounds of this project take for granted about matrix units, asked of one.

Vendors do not write down how a matrix unit adds. What experiments have shown (Fasi, Higham,
Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021): products are exact; those
of one instruction and the accumulator are shifted to the largest exponent among them and cut there,
some guard bits below fp32's last bit; their sum is cut to fp32, towards zero. So each unit is asked
for inexact products, for guard bits, whether it rounds, and for the error of long sums, in units of
the K 2^-23 |x| |w| that the screens of `encode` and `pairwise_topk` add to scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from mikernels.kernels.common.full_sums import full_sums
from mikernels.kernels.common.products import WIDEN, multiply

from .assumptions import Ground, Item
from .device import Cpu

# a b for [M, K] and [K, N], in fp32
Unit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
DTYPES = torch.bfloat16, torch.float16
# more than any unit is known to have
MOST_GUARD_BITS = 8
LONG = 4096


@triton.jit
def _product_kernel(
    a, b, out, k, N: tl.constexpr, M: tl.constexpr, K: tl.constexpr, WIDEN: tl.constexpr
):
    rows, columns, inner = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for first in range(0, k, K):
        x = tl.load(a + rows * k + (first + inner)[None, :])
        y = tl.load(b + (first + inner)[:, None] * N + columns)
        total = multiply(x, y, total, WIDEN)
    tl.store(out + rows * N + columns, total)


def by_triton(a: torch.Tensor, b: torch.Tensor, warps: int) -> torch.Tensor:
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty(m, n, device=a.device)
    _product_kernel[(1,)](
        a.contiguous(), b.contiguous(), out, k, N=n, M=m, K=64, WIDEN=WIDEN, num_warps=warps
    )
    return out


def by_torch(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(a, b, out_dtype=torch.float32)


class Probe:
    """Asks one unit by products of [size, k] and [k, size]."""

    def __init__(self, unit: Unit, dtype: torch.dtype, size: int, device: torch.device):
        self.unit, self.dtype, self.size, self.device = unit, dtype, size, device

    def run(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = (t.to(self.device, self.dtype) for t in (a, b))
        return self.unit(a, b).cpu()

    def sum_of(self, *terms: tuple[float, float]) -> float:
        """x y + ... in entry (0, 0) of a product; the terms lie side by side."""
        a, b = torch.zeros(self.size, 64), torch.zeros(64, self.size)
        for place, (x, y) in enumerate(terms):
            a[0, place], b[place, 0] = x, y
        return float(self.run(a, b)[0, 0])

    def inexact_products(self) -> float:
        """Of random mantissas, each in a sum by itself."""
        draw = torch.Generator().manual_seed(0)
        a, b = torch.zeros(self.size, 64), torch.zeros(64, self.size)
        a[:, 1] = (1 + torch.rand(self.size, generator=draw)).to(self.dtype)
        b[1] = (1 + torch.rand(self.size, generator=draw)).to(self.dtype)
        return float((self.run(a, b).double() != a.double() @ b.double()).sum())

    def guard_bits(self) -> float:
        """How far below the last bit of 2^6 a term survives 2^6 - 2^6 + it."""
        for bits in range(MOST_GUARD_BITS + 1):
            # 2^(6 - 23 - bits) of factors that are normal numbers of fp16 as well
            term = 2.0 ** -(8 + bits // 2), 2.0 ** -(9 + bits - bits // 2)
            if self.sum_of((8, 8), (-8, 8), term) == 0:
                return bits - 1.0
        return float(MOST_GUARD_BITS)

    def rounds(self) -> float:
        """1 if 3/4 of the last bit is rounded up, 0 if it is cut, of a number with that bit set."""
        odd, part = ((1, 1), (2.0**-12, 2.0**-11)), (1.5 * 2.0**-12, 2.0**-12)
        return float(self.sum_of(*odd, part) > 1 + 2.0**-23)

    def of_bound(self) -> float:
        """The largest error of sums of LONG products, of LONG 2^-23 |a| |b|.

        Of random numbers, positive ones, and 1 plus terms just below its last bit, of which a unit
        without guard bits would lose all.
        """
        draw = torch.Generator().manual_seed(1)
        a, b = (torch.randn(s, generator=draw) for s in ((self.size, LONG), (LONG, self.size)))
        a[1:8], b[:, 1:8] = a[1:8].abs() + 0.5, b[:, 1:8].abs() + 0.5
        a[0], b[:, 0] = 2.0**-12, 2.0**-11 * (1 - 2.0**-8)
        a[0, 0] = b[0, 0] = 1.0
        a, b = a.to(self.dtype), b.to(self.dtype)
        wide = a.double(), b.double()
        bound = LONG * 2.0**-23 * wide[0].norm(dim=1)[:, None] * wide[1].norm(dim=0)
        return float(((self.run(a, b).double() - wide[0] @ wide[1]).abs() / bound).max())

    def items(self, name: str) -> list[tuple[Item, Callable[[], float]]]:
        kind = f"{name}, {str(self.dtype).removeprefix('torch.')}"
        bound = f"of {LONG} 2^-23 |x| |w|"
        unsound = "K 2^-23 |x| |w| is no bound: encode and pairwise_topk may miss what they select"
        return [
            (
                Item(f"{kind}: inexact products", 0, 0, 0, f"of {self.size**2}", unsound, True),
                self.inexact_products,
            ),
            (
                Item(f"{kind}: guard bits", 2, 1, MOST_GUARD_BITS, "bits", unsound, True),
                self.guard_bits,
            ),
            (
                Item(f"{kind}: error of long sums", 0.25, 0, 1, bound, unsound, True),
                self.of_bound,
            ),
            (
                Item(
                    f"{kind}: a sum is rounded",
                    0,
                    0,
                    0,
                    "1 yes, 0 no",
                    "long accumulations need no promotion to fp32 registers",
                ),
                self.rounds,
            ),
        ]


def once_rounded(dtype: torch.dtype, device: torch.device) -> float:
    """Error of a product whose result is 16 bits, in its last bits, with K large and M small."""
    draw = torch.Generator().manual_seed(2)
    a, b = (torch.rand(s, generator=draw).to(dtype) for s in ((16, 16384), (16384, 64)))
    exact = a.double() @ b.double()
    with full_sums():
        found = torch.mm(a.to(device), b.to(device)).cpu().double()
    last = 2.0 ** exact.log2().floor() * torch.finfo(dtype).eps
    return float(((found - exact).abs() / last).max())


def run(device: Cpu) -> dict[str, Any]:
    """Every unit in both dtypes: one warp's instruction, a warp group's, and cuBLAS's choice."""
    ground = Ground(device)
    units: dict[str, tuple[Unit, int]] = {
        "tl.dot of a warp": (lambda a, b: by_triton(a, b, 1), 16),
        "tl.dot of four warps": (lambda a, b: by_triton(a, b, 4), 64),
        "torch.mm": (by_torch, 64),
    }
    for dtype in DTYPES:
        for name, (unit, size) in units.items():
            for item, measure in Probe(unit, dtype, size, device.target).items(name):
                ground.judge(item, measure)
        kind = str(dtype).removeprefix("torch.")
        item = Item(
            f"error of a {kind} product with full sums",
            0.5,
            0,
            # fp32's own error in front of a tie
            0.51,
            "last bits",
            "the library sums in 16 bits, whatever full_sums asks: bounds of the screen are wrong",
            True,
        )
        ground.judge(item, lambda dtype=dtype: once_rounded(dtype, device.target))
    return ground.findings()
