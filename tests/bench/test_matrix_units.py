# SPDX-License-Identifier: Apache-2.0
"""The questions to a matrix unit, asked of simulated ones whose answers are known."""

import pytest
import torch

pytest.importorskip("triton")

from fake_cuda import FakeCuda  # noqa: E402

from mikernels.bench.gpu import gpu_parts, matrix_units  # noqa: E402
from mikernels.bench.gpu.device import Cuda  # noqa: E402
from mikernels.bench.gpu.matrix_units import Probe  # noqa: E402


def quantum(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The last of so many bits."""
    return 2.0 ** (torch.frexp(x.abs()).exponent - bits).double()


def simulated(guard: int, *, rounds: bool = False, product_bits: int = 24):
    """16 products and the sum so far, cut below the largest's 24 + guard bits; the sum to 24."""

    def unit(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
        for first in range(0, a.shape[1], 16):
            x, y = a[:, first : first + 16].double(), b[first : first + 16].double()
            terms = x.T[:, :, None] * y[:, None, :]
            last = quantum(terms, product_bits)
            terms = torch.cat([total[None], (terms / last).trunc() * last])
            last = quantum(terms.abs().amax(0), 24 + guard)
            total = ((terms / last).trunc() * last).sum(0)
            last = quantum(total, 24)
            total = ((total / last).round() if rounds else (total / last).trunc()) * last
        return total.float()

    return unit


@pytest.mark.parametrize("dtype", matrix_units.DTYPES)
@pytest.mark.parametrize("guard, of_bound", [(0, 1.0), (1, 0.5), (2, 0.25)])
def test_answers_of_units_that_cut(dtype, guard, of_bound) -> None:
    probe = Probe(simulated(guard), dtype, 16, torch.device("cpu"))
    assert probe.inexact_products() == 0
    assert probe.guard_bits() == guard
    assert probe.rounds() == 0
    # random rows on top of the one that was made for it lose little
    assert abs(probe.of_bound() - of_bound) < 0.02


def test_answers_of_other_units() -> None:
    cpu = torch.device("cpu")
    assert Probe(simulated(3, rounds=True), torch.float16, 16, cpu).rounds() == 1
    assert Probe(simulated(2, product_bits=14), torch.bfloat16, 16, cpu).inexact_products() > 0
    # 14 bits, as some accumulate products of 8 bits in
    assert Probe(simulated(-10), torch.float16, 16, cpu).of_bound() > 100
    exact = Probe(lambda a, b: a.float() @ b.float(), torch.bfloat16, 16, cpu)
    assert exact.guard_bits() >= 2 and exact.of_bound() < 0.1


@pytest.mark.parametrize("guard", [0, 2])
def test_only_what_bounds_need_is_wrong(monkeypatch, guard) -> None:
    monkeypatch.setattr(matrix_units, "by_triton", lambda a, b, warps: simulated(guard)(a, b))
    monkeypatch.setattr(matrix_units, "by_torch", simulated(1, rounds=True))
    monkeypatch.setattr(matrix_units, "LONG", 256)
    found = gpu_parts.PARTS["matrix_units"](Cuda(FakeCuda(), "cpu"))
    assert len(found["items"]) == len(found["wrong"]) + len(found["right"]) == 26
    refuted = {item["statement"] for item in found["items"] if item["verdict"] == "refuted"}
    assert "torch.mm, float16: a sum is rounded" in refuted
    assert found["wrong"].keys() == {
        name for name in refuted if "guard bits" in name or "long sums" in name
    }
    assert any("tl.dot of a warp, bfloat16" in name for name in found["wrong"]) == (guard == 0)
