# SPDX-License-Identifier: Apache-2.0
"""Times expected of the pairwise operators on a GPU, from bytes and arithmetic."""

from __future__ import annotations

from typing import Any

from .. import load, names
from ..harness.rates import Rates
from ..harness.spec import FAMILIES

# shares of the rates that a first Triton product is expected to reach
TILES, PLAIN, LIBRARY = 0.7, 0.6, 0.85
# picoseconds a number of torch.topk in fp32, as for row_topk
TOPK = 13.6e-12


def _mass_threshold(r: Rates, s: Any, dtype: str) -> list[tuple[str, float, str]]:
    """As csrc/cuda/mass_threshold_body.h reads x: two or three times, with a launch each and one
    more, and the zeroing of its sums."""
    reads, size = (3, 4) if dtype == "fp32" else (2, 2)
    # 32 lanes over scores that lie in some 136 of 2048 bins collide about twice
    atomics = 4 * s.m / 32 / (r.sms * r.hertz)
    return [
        ("reads", reads * s.m * size / r.copy, f"{reads} reads of x"),
        ("atomics", max(0.0, atomics - s.m * size / r.copy), "what the first read does not hide"),
        ("launches", (reads + 2) * r.launch, "one a read, the last choice, and the zeroing"),
    ]


def _parts(r: Rates, op: str, s: Any, dtype: str) -> list[tuple[str, float, str]]:
    if op == "mass_threshold":
        return _mass_threshold(r, s, dtype)
    benchmark, size = load(op), 2 if dtype == "bf16" else 4
    flops, traffic = benchmark.flops(s, "fwd"), benchmark.bytes(s, "fwd", size)
    # pairwise_topk screens fp32 rows in 16 bits; the others' fp32 products have no matrix unit
    tiles = dtype == "bf16" or op == "pairwise_topk"
    rate = TILES * r.bf16 if tiles else PLAIN * r.fp32
    unit = f"{TILES:.0%} of the matrix unit" if tiles else f"{PLAIN:.0%} of fp32"
    parts = [
        ("product", max(flops / rate, traffic / r.copy), f"{unit}, or its traffic"),
        ("launches", 4 * r.launch, "product, ordered sum, and what surrounds them"),
    ]
    if op == "pairwise_topk":
        groups = s.n * s.m / 64
        parts.append(("groups", 3 * 4 * groups / r.copy, "their bounds written and read twice"))
    return parts


def _eager(r: Rates, op: str, s: Any, dtype: str) -> float:
    benchmark, size = load(op), 2 if dtype == "bf16" else 4
    rate = LIBRARY * (r.bf16 if dtype == "bf16" else r.fp32)
    product = benchmark.flops(s, "fwd") / rate
    if op == "mass_threshold":
        # a radix pass a byte of the key, in and out with 64-bit indices; sum, cumsum and division
        key = size * s.m
        return (2 * size * (key + 8 * s.m) + 5 * key) / r.copy + 10 * r.launch
    if op == "pairwise_topk":
        return product + s.n * s.m * (2 * size / r.copy + TOPK)
    # einsum clones both operands
    return max(product, 3 * benchmark.bytes(s, "fwd", size) / r.copy)


def pair_cases(r: Rates) -> list[dict[str, Any]]:
    """The predictions of one device, as predict.predictions writes them."""

    def ms(seconds: float) -> float:
        return float(f"{seconds * 1e3:.4g}")

    cases = []
    for op in names("pairs"):
        benchmark = load(op)
        for name in benchmark.gpu_shapes.get("fwd", ()):
            s = FAMILIES["pairs"][name]
            for dtype in ("bf16", "fp32"):
                parts = _parts(r, op, s, dtype)
                total, eager = sum(t for _, t, _ in parts), _eager(r, op, s, dtype)
                tiles = dtype == "bf16" or op == "pairwise_topk"
                least = max(
                    benchmark.flops(s, "fwd") / (r.bf16 if tiles else r.fp32),
                    benchmark.bytes(s, "fwd", 2 if dtype == "bf16" else 4) / r.copy,
                )
                cases.append(
                    {
                        "op": op,
                        "mode": "fwd",
                        "shape": name,
                        "dtype": dtype,
                        "ms": ms(total),
                        "floor_ms": ms(least),
                        "parts": [{"name": n, "ms": ms(t), "why": w} for n, t, w in parts],
                        "rivals_ms": {"eager": ms(eager)},
                        "ratios": {"eager": round(eager / total, 2)},
                    }
                )
    return cases
