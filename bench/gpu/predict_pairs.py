# SPDX-License-Identifier: Apache-2.0
"""Times expected of the pairwise operators on a GPU, from bytes and arithmetic."""

from __future__ import annotations

import math
from typing import Any

from .. import load, names
from ..harness.rates import Rates
from ..harness.spec import FAMILIES

Part = tuple[str, float, str]
BYTES = {"bf16": 2, "fp32": 4}
# shares of the rates that a first Triton product is expected to reach: of bf16 numbers, and of the
# pieces of fp32 numbers, whose making takes as many instructions as the matrix unit takes cycles
TILES, PIECES, LIBRARY = 0.7, 0.55, 0.85
# bf16 products in place of one of fp32 numbers, and of one of fp32 with bf16
SIX, THREE = 6, 3
# picoseconds a number of torch.topk in fp32, as for row_topk
TOPK = 13.6e-12
# kernels of one call: ours, zeros and ordered sums included, and eager's, copies included
LAUNCHES = {
    "edge_scores": (3, 3),
    "edge_mix": (1, 3),
    "pairwise_products": (2, 3),
    "grad_gram": (2, 2),
    "block_norms": (1, 3),
    "second_moment": (2, 1),
    # a sort by position, and where the tiles of each begin
    "positional_dot": (15, 2),
    # of one panel, its syncs with the host as one launch each
    "pairwise_topk": (40, 8),
}


def _rate(r: Rates, dtype: str, products: int = SIX) -> tuple[float, str]:
    """FLOP of our kernels, and what they are of the matrix unit's rate."""
    if dtype == "bf16":
        return TILES * r.bf16, f"{TILES:.0%} of the matrix unit"
    return PIECES * r.bf16 / products, f"{PIECES:.0%} of the matrix unit, {products} products"


def _library(r: Rates, dtype: str) -> float:
    return LIBRARY * (r.bf16 if dtype == "bf16" else r.fp32)


def _padded(n: int, m: int, full: bool) -> int:
    """Pairs in tiles of pair_products, with those that do not exist."""
    columns = 32 if m <= 32 and full else math.ceil(m / 64) * 64
    side = 128 if n > 64 and (full or m > 64) else 64
    return math.ceil(n / side) * side * columns


def _heads(s: Any) -> tuple[int, int]:
    """Heads and their width, as bench/ops/edge_heads.py has them."""
    return max(1, s.n // 4), 64 if s.d < 2048 else 128


def _held(r: Rates, size: float) -> float:
    """Bytes per second of what was just written."""
    return r.l2 if size <= r.l2_bytes else r.copy


def _heads_parts(r: Rates, s: Any, dtype: str) -> list[Part]:
    from mikernels.kernels.pairs.edge_heads import blocks

    (heads, width), size, full = _heads(s), BYTES[dtype], dtype == "fp32"
    n, examples, _ = blocks(s.batch, s.positions, heads, s.d, full)
    of_heads, of_examples = math.ceil(heads / n), math.ceil(s.batch / examples)
    items = s.batch * s.positions
    rows = items * heads * s.d
    held = 4 * n * examples * s.positions * s.d <= r.l2_bytes
    forming, why = _rate(r, dtype)
    product, of_pieces = _rate(r, "fp32", SIX if full else THREE)
    given = size * (items * heads * width + of_examples * heads * width * s.d) / r.copy
    grad = size * of_heads * items * s.m * s.d / r.copy
    # from the cache beside what comes from memory, or all from memory
    moved = [max(4 * rows / r.l2, t) if held else 4 * rows / r.copy + t for t in (given, grad)]
    padded = 2.0 * items * of_heads * _padded(n, s.m, True) * s.d
    launches = 1 + 3 * of_heads * of_examples
    return [
        ("rows", max(2 * rows * width / forming, moved[0]), f"{why}, or their traffic"),
        ("product", max(padded / product, moved[1]), f"{of_pieces}, or its traffic"),
        ("launches", launches * r.launch, "zeros; rows, product and ordered sum of every block"),
    ]


def _mass_threshold(r: Rates, s: Any, dtype: str) -> list[Part]:
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


def _parts(r: Rates, op: str, s: Any, dtype: str) -> list[Part]:
    if op == "mass_threshold":
        return _mass_threshold(r, s, dtype)
    if op == "edge_heads":
        return _heads_parts(r, s, dtype)
    benchmark = load(op)
    flops, traffic = benchmark.flops(s, "fwd"), benchmark.bytes(s, "fwd", BYTES[dtype])
    if op == "edge_scores":
        flops *= _padded(s.n, s.m, dtype == "fp32") / (s.n * s.m)
    # pairwise_topk screens fp32 rows in 16 bits
    rate, unit = _rate(r, "bf16" if op == "pairwise_topk" else dtype)
    parts = [
        ("product", max(flops / rate, traffic / r.copy), f"{unit}, or its traffic"),
        ("launches", LAUNCHES[op][0] * r.launch, "product, ordered sum, and what surrounds them"),
    ]
    if op == "pairwise_topk":
        groups = s.n * s.m / 64
        parts.append(("groups", 3 * 4 * groups / r.copy, "their bounds written and read twice"))
    return parts


def _rivals(r: Rates, op: str, s: Any, dtype: str) -> dict[str, float]:
    if op == "mass_threshold":
        # a radix pass a byte of the key, in and out with 64-bit indices; sum, cumsum and division
        key, size = BYTES[dtype] * s.m, BYTES[dtype]
        return {"eager": (2 * size * (key + 8 * s.m) + 5 * key) / r.copy + 10 * r.launch}
    benchmark, size, rate = load(op), BYTES[dtype], _library(r, dtype)
    flops, traffic = benchmark.flops(s, "fwd"), benchmark.bytes(s, "fwd", size)
    if op == "edge_heads":
        (heads, width), items = _heads(s), s.batch * s.positions
        rows = size * items * heads * s.d
        # written, copied for the second product, and read there, as the gradients are
        moved = 4 * rows / _held(r, rows)
        moved += size * (heads * width * s.d + 3 * items * s.m * s.d) / r.copy
        return {"eager": max(flops / rate, moved) + 4 * r.launch}
    eager = LAUNCHES[op][1] * r.launch
    if op == "pairwise_topk":
        return {"eager": eager + flops / rate + s.n * s.m * (2 * size / r.copy + TOPK)}
    if op == "grad_gram":
        # the gradients formed; or both products in full, written, and multiplied
        formed = 2.0 * s.n * s.n * s.d * s.d / rate + 3.0 * size * s.n * s.d * s.d / r.copy
        squares = 5 * size * s.n * s.n / _held(r, 3.0 * size * s.n * s.n)
        return {"eager": eager + formed, "two products": 2 * flops / rate + squares + 3 * r.launch}
    if op == "positional_dot":
        # gradients gathered for every vector, and read
        traffic += 2.0 * size * s.m * s.n * s.d
        return {"eager": eager + max(flops / rate, traffic / r.copy)}
    if op == "block_norms":
        eager += 2 * size * s.n * s.m * s.positions**2 / r.copy
    # einsum copies both operands; second_moment's are one, in place
    passes = 1 if op == "second_moment" else 3
    if op in ("pairwise_products", "second_moment"):
        # torch computes both triangles
        flops *= 2
    return {"eager": eager + max(flops / rate, passes * traffic / r.copy)}


def _floor(r: Rates, op: str, s: Any, dtype: str) -> float:
    benchmark = load(op)
    products = 1 if dtype == "bf16" or op in ("pairwise_topk", "mass_threshold") else SIX
    return max(
        benchmark.flops(s, "fwd") * products / r.bf16,
        benchmark.bytes(s, "fwd", BYTES[dtype]) / r.copy,
    )


def pair_cases(r: Rates) -> list[dict[str, Any]]:
    """The predictions of one device, as predict.predictions writes them."""

    def ms(seconds: float) -> float:
        return float(f"{seconds * 1e3:.4g}")

    cases = []
    for op in names("pairs"):
        for name in load(op).gpu_shapes.get("fwd", ()):
            s = FAMILIES["pairs"][name]
            for dtype in BYTES:
                parts, rivals = _parts(r, op, s, dtype), _rivals(r, op, s, dtype)
                total = sum(t for _, t, _ in parts)
                cases.append(
                    {
                        "op": op,
                        "mode": "fwd",
                        "shape": name,
                        "dtype": dtype,
                        "ms": ms(total),
                        "floor_ms": ms(_floor(r, op, s, dtype)),
                        "parts": [{"name": n, "ms": ms(t), "why": w} for n, t, w in parts],
                        "rivals_ms": {rival: ms(t) for rival, t in rivals.items()},
                        "ratios": {rival: round(t / total, 2) for rival, t in rivals.items()},
                    }
                )
    return cases
