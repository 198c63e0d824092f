# SPDX-License-Identifier: Apache-2.0
"""Times expected of attention_gradients on a GPU, from products, instructions and bytes."""

from __future__ import annotations

import math
from typing import Any

from .. import load, names
from ..harness.rates import Rates
from ..harness.spec import FAMILIES

Part = tuple[str, float, str]
BYTES = {"bf16": 2, "fp32": 4}
# warp instructions a pair of query and key, outside products, by the width of rows that are whole:
# the loops' machine code for sm_90 at temperature 2, causal; those of 256 with a cap
ISSUED = {
    "sums": {64: 0.93, 128: 1.36, 256: 4.03},
    "queries": {64: 0.78, 128: 0.89, 256: 2.54},
    "dk dv": {64: 0.82, 128: 1.17},
    "dk": {256: 3.29},
    "dv": {256: 2.54},
}
# of fp32 numbers six products, as those of pairs
SIX, PIECES = 6, 0.55
# what SDPA's backward, 5 products of the pairs that causality leaves, is assumed to reach: of the
# matrix unit in bf16, of fp32 FMA by torch's memory-efficient one; and keys of one of its programs
FLASH, EFFICIENT, FLASH_KEYS = 0.42, 0.5, 128
# passes over the T x S matrices in eager's backward: 7 element-wise ones, in and out
PASSES = 14


def _pairs(r: Rates, s: Any, of_keys: bool, tile: dict[str, int]) -> float:
    """Those in the tiles that causality leaves, masked ones included; or, where programs are few,
    as many as all SMs could while the longest program runs."""
    t, k = tile["BLOCK_T"], tile["BLOCK_S"]
    own, met = (k, t) if of_keys else (t, k)
    total = 0
    for first in range(0, s.queries, own):
        rest = s.queries - first // met * met if of_keys else min(first + own, s.queries)
        total += own * math.ceil(rest / met) * met
    # a block of keys meets all queries of the heads that share it
    longest = own * s.queries * (s.heads // s.groups if of_keys else 1)
    return max(s.batch * s.heads * total, r.sms * longest)


def _parts(r: Rates, s: Any, dtype: str) -> list[Part]:
    from mikernels.kernels.attention.attention_gradients import Form, at_once, columns_of, tile_of

    full, size = dtype == "fp32", 1 << (s.width - 1).bit_length()
    form = Form(size, not full, large=True, masked=False, capped=s.softcap > 0)
    # products of rows and of results, in units of width
    kernels = {"sums": (2, 1), "queries": (2, 1)}
    kernels |= {"dk dv": (2, 2)} if at_once(form) else {"dk": (2, 1), "dv": (1, 1)}
    found = []
    for kind, (rows, results) in kernels.items():
        name = kind if kind in ("sums", "queries") else "keys"
        pairs = _pairs(r, s, name == "keys", tile_of(name, form))
        again = math.ceil(s.width / columns_of(name, size, not full))
        flops = 2 * pairs * s.width * (again * rows + results)
        nearest = min(ISSUED[kind], key=lambda width: abs(width - size))
        other = pairs * ISSUED[kind][nearest] / r.issue
        if full:
            seconds = flops * SIX / (PIECES * r.bf16)
            why = f"{PIECES:.0%} of the matrix unit, six products, rows {again} times"
        else:
            # a step waits for its products, and registers hold one block an SM
            seconds = flops / r.bf16 + other
            why = f"products {flops / r.bf16 * 1e3:.3g} ms, and then what is issued"
        found.append((kind, seconds + r.launch, why))
    size_v = s.batch * s.groups * s.queries * s.width * BYTES[dtype]
    return [("largest", size_v / r.copy + r.launch, "of each column of v"), *found]


def _rivals(r: Rates, s: Any, mode: str, dtype: str) -> dict[str, float]:
    pairs = s.batch * s.heads * s.queries**2
    size = BYTES[dtype]
    rate = 0.85 * (r.bf16 if dtype == "bf16" else r.fp32)
    # all pairs, the later ones masked; grouped heads in copies
    found = {"eager": 8 * pairs * s.width / rate + PASSES * size * pairs / r.copy + 15 * r.launch}
    if s.softcap:
        return found
    flash = FLASH * r.bf16 if dtype == "bf16" else EFFICIENT * r.fp32
    pairs = max(pairs / 2, r.sms * FLASH_KEYS * s.queries)
    one = 10 * pairs * s.width / flash + 4 * r.launch
    return found | ({"torch": one} if mode == "bwd" else {"two-pass": 2 * one})


def attention_cases(r: Rates) -> list[dict[str, Any]]:
    """The predictions of one device, as predict.predictions writes them."""

    def ms(seconds: float) -> float:
        return float(f"{seconds * 1e3:.4g}")

    cases = []
    for op in names("attention", gpu=True):
        benchmark = load(op)
        for mode, shapes in benchmark.gpu_shapes.items():
            for name in shapes:
                s = FAMILIES["attention"][name]
                for dtype in BYTES:
                    parts, rivals = _parts(r, s, dtype), _rivals(r, s, mode, dtype)
                    total = sum(t for _, t, _ in parts)
                    products = 1 if dtype == "bf16" else SIX
                    floor = max(
                        benchmark.flops(s, mode) * products / r.bf16,
                        benchmark.bytes(s, mode, BYTES[dtype]) / r.copy,
                    )
                    cases.append(
                        {
                            "op": op,
                            "mode": mode,
                            "shape": name,
                            "dtype": dtype,
                            "ms": ms(total),
                            "floor_ms": ms(floor),
                            "parts": [{"name": n, "ms": ms(t), "why": w} for n, t, w in parts],
                            "rivals_ms": {rival: ms(t) for rival, t in rivals.items()},
                            "ratios": {rival: round(t / total, 2) for rival, t in rivals.items()},
                        }
                    )
    return cases
