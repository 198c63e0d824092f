# SPDX-License-Identifier: Apache-2.0
"""What the design assumed about a GPU, as statements that a measurement can refute.

Each item: what was predicted, what was measured, and the verdict. A refuted item is a result: it
says which plan to change. An item that raises is recorded with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

import mikernels
from mikernels._dispatch import OPS

from ..harness.spec import GPU_SHAPES
from . import gpu
from .device import Cpu, Cuda


@dataclass(frozen=True)
class Item:
    """A statement: measured, in `unit`, lies within low..high.

    If it is required, results may be wrong where it is refuted; else plans are.
    """

    statement: str
    predicted: float
    low: float
    high: float
    unit: str
    consequence: str
    required: bool = False


class Ground:
    """Measures one statement after another; scale < 1 shrinks the shapes, for tests."""

    def __init__(self, device: Cpu, scale: float = 1.0):
        self.device = device
        self.scale = scale
        self.found: list[dict[str, Any]] = []

    def size(self, n: int) -> int:
        return max(64, int(n * self.scale))

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=self.device.target, dtype=torch.float32).to(dtype)

    def judge(self, item: Item, measure: Callable[[], float]) -> None:
        record = asdict(item)
        try:
            value = measure()
        except Exception as error:
            # an item that cannot run must not end the list
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.found.append(
                {**record, "measured": None, "verdict": "not measured", "why": reason}
            )
            return
        holds = item.low <= value <= item.high
        verdict = "holds" if holds else "refuted"
        self.found.append({**record, "measured": float(f"{value:.4g}"), "verdict": verdict})
        self.device.release()

    def findings(self) -> dict[str, Any]:
        """The items; wrong are those that could not be measured, and the required ones refuted."""
        wrong, right = {}, []
        for item in self.found:
            print(
                f"{item['verdict']}: {item['statement']}: predicted {item['predicted']:g} "
                f"{item['unit']}, measured {item['measured']}"
            )
            if item["verdict"] == "not measured":
                wrong[item["statement"]] = item["why"]
            elif item["required"] and item["verdict"] == "refuted":
                wrong[item["statement"]] = f"{item['measured']}: {item['consequence']}"
            else:
                right.append(item["statement"])
        return {"items": self.found, "wrong": wrong, "right": right}


def _torch_topk(ground: Ground) -> None:
    for dtype, expected in ((torch.bfloat16, 8.0), (torch.float32, 13.6)):
        for f in (16384, 131072):
            n, f = ground.size(8192), ground.size(f)

            def measure(n: int = n, f: int = f, dtype: torch.dtype = dtype) -> float:
                scores = ground.normal(n, f, dtype=dtype)
                seconds = ground.device.median(lambda: torch.topk(scores, 64, sorted=False))
                return seconds / scores.numel() * 1e12

            name = str(dtype).removeprefix("torch.")
            item = Item(
                f"torch.topk of [{n}, {f}] {name}, k = 64",
                expected,
                expected / 1.5,
                expected * 1.5,
                "ps an element",
                "below 3 ps a selection of our own has little to win",
            )
            ground.judge(item, measure)


def _product(ground: Ground, peak: float) -> None:
    n, f = ground.size(8192), ground.size(131072)
    for d, least in ((768, 0.85), (2304, 0.92)):

        def measure(d: int = d) -> float:
            x, w, b = ground.normal(n, d), ground.normal(f, d), ground.normal(f)
            out = torch.empty(n, f, device=x.device, dtype=x.dtype)
            seconds = ground.device.median(lambda: torch.addmm(b, x, w.T, out=out))
            return 2 * n * f * d / seconds / 1e9 / peak

        item = Item(
            f"addmm [{n}, {d}] x [{d}, {f}] bf16, of a square product's rate",
            least,
            least,
            1.2,
            "fraction",
            "below it the write of N x F is not hidden, and fusing pays more",
        )
        ground.judge(item, measure)


def _decode(ground: Ground, copy: float) -> None:
    s = GPU_SHAPES["G2"]
    n, f = ground.size(s.n), ground.size(s.f)
    for kind in ("uniform", "zipf"):

        def measure(kind: str = kind) -> float:
            w, values = ground.normal(f, s.d), ground.normal(n, s.k)
            codes = mikernels.SparseCodes(values, draw(ground, kind, n, f, s.k), f)
            seconds = ground.device.median(lambda: mikernels.sparse_decode(codes, w))
            return 2 * n * s.k * s.d / seconds / 1e9 / copy

        item = Item(
            f"sparse_decode at G2, {kind} indices: gathered bytes, of a copy's rate",
            0.87,
            0.85,
            # Zipf's hot rows come from L2
            1.2 if kind == "uniform" else 4.0,
            "fraction",
            "below it too few rows are in flight",
        )
        ground.judge(item, measure)


def draw(ground: Ground, kind: str, n: int, f: int, k: int) -> torch.Tensor:
    """Feature indices `[n, k]`: one of each of k bands, or Zipf (exponent 1)."""
    if kind == "uniform":
        band = f // k
        spread = torch.randint(band, (n, k), device=ground.device.target)
        return spread + band * torch.arange(k, device=ground.device.target)
    u = torch.rand(n, k, device=ground.device.target)
    return (float(f) ** u).long().sub_(1).clamp_(0, f - 1)


def _uncertain(ground: Ground) -> None:
    s = GPU_SHAPES["G2"]
    n, f = ground.size(s.n), ground.size(s.f)

    def rows_of_zeros(x: torch.Tensor, w: torch.Tensor) -> None:
        x[: n // 8] = 0

    def equal_weights(x: torch.Tensor, w: torch.Tensor) -> None:
        w[: min(f // 2, 4 * s.k)] = w[0]
        x[: n // 8] += w[0]

    for name, expected, change in (
        ("rows of zeros", 1.05, rows_of_zeros),
        ("rows for which 256 equal features win", 1.35, equal_weights),
    ):

        def measure(change: Callable[[torch.Tensor, torch.Tensor], None] = change) -> float:
            x, w = (ground.normal(size, s.d, dtype=torch.float32) for size in (n, f))
            usual = ground.device.median(lambda: mikernels.topk_encode(x, w, k=s.k))
            change(x, w)
            return ground.device.median(lambda: mikernels.topk_encode(x, w, k=s.k)) / usual

        item = Item(
            f"encode at G2, fp32, one token in eight of {name}: of the time without",
            expected,
            0.8,
            1.5,
            "times",
            "beyond it the exact pass is a cliff again",
        )
        ground.judge(item, measure)


def _gradients(ground: Ground) -> None:
    s = GPU_SHAPES["G1"]
    n, f = ground.size(s.n), ground.size(s.f)

    def measure() -> float:
        fp32 = torch.float32
        indices = draw(ground, "uniform", n, f, s.k)
        slots = mikernels.by_feature(indices.reshape(-1), f)
        dy, x = (ground.normal(n, s.d, dtype=fp32) for _ in range(2))
        w, dw, de = (ground.normal(f, s.d, dtype=fp32) for _ in range(3))
        values, db = ground.normal(n, s.k, dtype=fp32), ground.normal(f, dtype=fp32)
        op = OPS["sae_gradients_"].default
        seconds = ground.device.median(
            lambda: op(values, indices, *slots, None, dy, x, w, None, None, dw, de, db, False)
        )
        return 2 * 4 * n * s.k * s.d / seconds / 1e12

    item = Item(
        "rows of dy and x from L2 in the gradients' kernel at G1",
        5.0,
        5.0,
        20.0,
        "TB/s",
        "below it the gathers do not hide under the weights' stream",
    )
    ground.judge(item, measure)


def _sort(ground: Ground) -> None:
    f, m = 131072, ground.size(8192) * 64
    indices = torch.randint(f, (m,), device=ground.device.target)
    keys = indices.int()

    def sort() -> float:
        return ground.device.median(lambda: torch.sort(keys, stable=True)) * 1e6

    def by_feature() -> float:
        return ground.device.median(lambda: mikernels.by_feature(indices, f)) * 1e6

    for name, measure, most in (("torch.sort", sort, 80.0), ("by_feature", by_feature, 120.0)):
        item = Item(f"{name} of {m} keys", most, 0.0, most, "us", "a counting sort of our own")
        ground.judge(item, measure)


def _crossover(ground: Ground) -> None:
    from . import tune

    def measure() -> float:
        points = tune.decode_points(ground.device, "bf16", 2304, 64, scale=ground.scale)
        return tune.threshold(points)

    item = Item(
        "F / k from which sparse decode beats the dense product, d = 2304, bf16",
        140.0,
        100.0,
        190.0,
        "features a slot",
        "the crossover table's default",
    )
    ground.judge(item, measure)


def run(device: Cpu, scale: float = 1.0) -> dict[str, Any]:
    """Every item, on a device of that kind."""
    ground = Ground(device, scale)
    peaks = gpu.peaks(device, min(1.0, scale)) if isinstance(device, Cuda) else {}
    _torch_topk(ground)
    _product(ground, peaks.get("bf16_gflops") or 1.0)
    _decode(ground, peaks.get("copy_gbs") or 1.0)
    _uncertain(ground)
    _gradients(ground)
    _sort(ground)
    _crossover(ground)
    return {**ground.findings(), "peaks": peaks}
