# SPDX-License-Identifier: Apache-2.0
"""Times predicted before they are measured: bytes, arithmetic and instructions over the rates.

Each function below returns parts, (name, seconds, reason), that run one after another. The floor is
the larger of least traffic and arithmetic at full rate. Rivals are models of what they read and
write, so that the ratios of the targets are predicted too. What a measurement then refutes is as
useful as what it confirms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from .. import load
from ..harness.rates import DEVICES, Rates, decode_cycles, row_cycles, winners_cycles
from ..harness.spec import GPU_SHAPES, Shape
from .predict_attention import attention_cases
from .predict_pairs import pair_cases

Part = tuple[str, float, str]
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# torch.topk is bound by its SMs: seconds an element on 132 of them (a B200-class and an L20 timing,
# scaled by SMs and clock)
TORCH_TOPK = {"bf16": 8e-12, "fp16": 8e-12, "fp32": 13.6e-12}
# gathers of whole rows reach this share of a copy's rate
GATHER = 0.87


def gemm(r: Rates, n: float, m: float, d: float, dtype: str) -> float:
    """cuBLAS: a short inner dimension pays for filling its pipeline and writing its tiles."""
    rate = r.fp32 if dtype == "fp32" else r.bf16
    return 2 * n * m * d / rate / (1 - 80 / (80 + d) if dtype != "fp32" else 1)


def select(r: Rates, n: float, f: int, k: int, dtype: str) -> tuple[float, str]:
    """row_topk in CUDA C++: one read, and the work on what is selected from.

    Two figures of an H200, 0.153 ms in fp32 and 0.110 in bf16 at G1, are what 9 cycles a score of
    those is fitted to, and that a third of the shorter is not hidden by the longer.
    """
    width = 16 // BYTES[dtype]
    group = width
    while group < 32 * width and group * group * k < f:
        group *= 2
    whole = 2 * k * group >= f
    chosen = f if whole else f / group + k * group
    read, work = n * f * BYTES[dtype] / r.copy, n * 9 * chosen / r.issue
    seconds = max(read, work) + min(read, work) / 3 + r.launch
    return seconds, f"one read, and {chosen:.0f} scores a row to select from"


def select_by_triton(r: Rates, n: float, f: int, k: int, dtype: str) -> tuple[float, str]:
    """row_topk in Triton: the longer of one read and the schedulers' work."""
    cycles, source = row_cycles(f, k, dtype)
    read, work = n * f * BYTES[dtype] / r.copy, n * cycles / r.issue
    bound = "one read of the scores" if read > work else f"{cycles:.0f} cycles a row, {source}"
    return max(read, work) + r.launch, bound


def row_topk(r: Rates, s: Shape, dtype: str) -> list[Part]:
    return [("select", *select(r, s.n, s.f, s.k, dtype))]


def by_feature(r: Rates, s: Shape, dtype: str) -> list[Part]:
    """As csrc/cuda/by_feature_body.h goes about it: 9 bits a pass, 128 chunks of tiles."""
    slots, bits = s.n * s.k, max(1, math.ceil(math.log2(s.f)))
    passes = math.ceil(bits / 9)
    tile = 512 * min(8, math.ceil(slots / (512 * 64)))
    deep = math.ceil(slots / tile / 128)
    chunks = math.ceil(slots / tile / deep)
    # first 8 bytes twice, then key and slot; 8 bytes of key and slot out, at last 8 of order
    traffic = slots * (16 + 8 + (passes - 1) * 20)
    rate = r.l2 if slots * 24 <= r.l2_bytes else r.copy
    counts = passes * 4 * chunks * chunks * 2 ** math.ceil(bits / passes)
    return [
        ("launches", 2 * passes * r.launch, f"{passes} passes of two kernels"),
        ("tiles", deep * passes * 4e-6, "a tile's way through a block"),
        ("counts", counts / r.l2, f"those of {chunks} chunks, read by each"),
        ("slots", traffic / rate, "keys and slots in and out"),
        ("offsets", 8 * s.f / r.copy, "written once"),
    ]


def panels(
    r: Rates, n: int, rows: int, f: int, features: int, c: int, dtype: str
) -> tuple[float, str]:
    """Selection from panels of features: the first one's winners, then what beats them."""
    total, why, number = 0.0, "", math.ceil(f / features)
    for first, times in ((True, 1), (False, number - 1)):
        cycles, source = winners_cycles(features, c, dtype, first)
        read = n * features * BYTES[dtype] / r.copy
        work = n * cycles / r.issue
        total += times * (max(read, work) + math.ceil(n / rows) * r.launch)
        if first:
            why = "one read of the scores" if read > work else f"{cycles:.0f} cycles a row"
        elif times:
            why += f", then {'one read' if read > work else f'{cycles:.0f}'}; {source}"
    return total, why


def encode_plain(r: Rates, s: Shape, dtype: str) -> list[Part]:
    from mikernels.kernels.sae import encode_plain

    tokens, rows, features = encode_plain.plan(s.n, s.f, s.k)
    number = math.ceil(s.f / features)
    products = math.ceil(s.n / tokens) * math.ceil(tokens / rows)
    chosen, why = panels(r, s.n, rows, s.f, features, s.k, dtype)
    return [
        (
            "product",
            gemm(r, s.n, s.f, s.d, dtype) + products * number * r.launch,
            f"{dtype} cuBLAS, {products} x {number} products of {rows} x {features}",
        ),
        ("select", chosen, why),
        ("copy", s.n * s.k * 30 / r.copy + 3 * r.launch, "values and indices of the winners, ReLU"),
    ]


def encode(r: Rates, s: Shape, dtype: str) -> list[Part]:
    from mikernels.kernels.sae import encode, encode_screen

    if dtype != "fp32":
        return encode_plain(r, s, dtype)
    b, c, width = BYTES[dtype], encode.candidates(s.k, s.d, s.f), encode_screen.packed_width(s.d)
    sizes = encode.plan(s.n, s.f, width, c, s.k, encode.SCRATCH)
    chunks, number = math.ceil(s.n / sizes.tokens), math.ceil(s.f / sizes.features)
    products = math.ceil(sizes.tokens / sizes.rows) * chunks
    chosen, why = panels(r, s.n, sizes.rows, s.f, sizes.features, c, "fp16")
    scored = encode.reaching(s.k, s.d)
    dots = s.n * scored * s.d
    gather, turn = dots * b / r.copy / GATHER, dots / r.convert64
    return [
        (
            "pack",
            (s.f * chunks + s.n) * s.d * (b + 2) / r.copy + (chunks * (number + 2) + 1) * r.launch,
            f"{b} B in, 2 B out a weight, for each of {chunks} chunks of tokens",
        ),
        (
            "product",
            gemm(r, s.n, s.f, s.d, "fp16") + products * number * r.launch,
            f"fp16 cuBLAS, {products} x {number} products of {sizes.rows} x {sizes.features}",
        ),
        ("select", chosen, why),
        (
            "settle",
            max(gather, turn) + chunks * r.launch,
            f"{scored:.0f} of C = {c} rows a token: "
            f"{'gathered bytes' if gather > turn else 'conversions to fp64'}",
        ),
        (
            "again",
            chunks * (3 + 2 * number) * r.launch,
            "the queue and what is done for uncertain tokens, of which there are none",
        ),
    ]


# uncertain tokens, and how many features each has whose bound reaches its k-th score
UNCERTAIN, REACHING = 1000, 300


def encode_uncertain(r: Rates, s: Shape, dtype: str) -> list[Part]:
    """`encode` where tokens tie or nearly do, with more features than are kept, and with zeros."""
    from mikernels.kernels.sae import encode as launcher
    from mikernels.kernels.sae import encode_screen

    b, c, width = BYTES[dtype], launcher.candidates(s.k, s.d, s.f), encode_screen.packed_width(s.d)
    sizes = launcher.plan(s.n, s.f, width, c, s.k, launcher.SCRATCH)
    packed = max(0, 1 - sizes.features / s.f) * s.f * s.d * (b + 2) / r.copy
    return [
        ("call", _total(encode(r, s, dtype)), "as predicted with none"),
        ("pack again", packed, "all panels but the last"),
        (
            "screen again",
            gemm(r, UNCERTAIN, s.f, s.d, "fp16") / 0.6,
            f"{UNCERTAIN} tokens; Triton at 60 % of cuBLAS",
        ),
        ("exact", UNCERTAIN * REACHING * s.d * b / r.copy / GATHER, f"{REACHING} rows a token"),
        ("zeros", s.f * s.d * b / r.copy, "every weight once, for all rows of zeros together"),
    ]


def gathered(r: Rates, held: float, s: Shape, b: int) -> tuple[float, str]:
    """d numbers of b bytes for every slot, out of what is `held` bytes at a time."""
    cached = held <= r.l2_bytes
    return s.n * s.k * s.d * b / ((r.l2 if cached else r.copy) * GATHER), (
        "rows from L2" if cached else "rows from memory"
    )


def decode(r: Rates, s: Shape, dtype: str) -> list[Part]:
    b = BYTES[dtype]
    seconds, why = gathered(r, s.f * s.d * b, s, b)
    work = s.n * decode_cycles(s.d, s.k, dtype) / r.issue
    return [
        ("gather", max(seconds, work), f"N k d elements, {why if seconds > work else 'issued'}"),
        ("write", s.n * s.d * b / r.copy + r.launch, "N d"),
    ]


def gradients(r: Rates, s: Shape, dtype: str) -> list[Part]:
    from mikernels.kernels.sae.gradients_sum import columns_of

    b, fd, slots = BYTES[dtype], s.f * s.d, s.n * s.k
    columns = columns_of(s.n, s.d, 4)
    blocks = math.ceil(s.d / columns)
    once, why = gathered(r, s.n * columns * 4, s, 4)
    # an index in order; a value or dot out of order takes a sector; the dots are written and added
    walked = blocks * slots * (2 * (8 + 32) + 32 + 4)
    return [
        ("sort", _total(by_feature(r, s, dtype)), "by_feature, as predicted alone"),
        ("gathers", 2 * once, f"dy and x of every slot, fp32, {columns} columns at a time: {why}"),
        ("slots", walked / r.l2 / GATHER, f"in {blocks} blocks of columns, twice"),
        ("rows", fd * (b + 8) / r.copy + 7 * r.launch, "w_dec in, two fp32 gradients out"),
        (
            "b_dec",
            (fd * b + 3 * s.n * s.d * 4) / r.copy + 5 * r.launch,
            "w_enc^T db_enc in two launches; x - b_dec",
        ),
    ]


def adam(r: Rates, s: Shape, dtype: str) -> list[Part]:
    return [
        ("norm", 8 * s.f * s.d / r.copy + 2 * r.launch, "gradient and parameter once"),
        ("update", 28 * s.f * s.d / r.copy / 0.92 + 2 * r.launch, "28 B a parameter in one sweep"),
    ]


def step(r: Rates, s: Shape, dtype: str) -> list[Part]:
    whole = {"encode": encode, "decode": decode, "gradients": gradients}
    parts = [(name, _total(f(r, s, dtype)), "as predicted alone") for name, f in whole.items()]
    rest = 12 * s.n * s.d * 4 / r.copy + 25 * r.launch
    twice = 2 * _total(adam(r, s, dtype))
    return [*parts, ("loss", rest, "12 passes over N d"), ("adam", twice, "both matrices")]


def floor(r: Rates, op: str, s: Shape, dtype: str) -> float:
    """Least traffic or arithmetic, whichever takes longer."""
    b, fd, slots = BYTES[dtype], s.f * s.d, s.n * s.k * s.d
    sizes = {
        "row_topk": s.n * s.f * b / r.copy,
        "by_feature": (16 * s.n * s.k + 8 * s.f) / r.copy,
        "encode": max(2 * s.n * fd / r.bf16, (fd + s.n * s.d) * b / r.copy),
        "decode": slots * b / (r.l2 if fd * b <= r.l2_bytes else r.copy),
        "gradients": max(2 * slots * b / r.l2, (b + 8) * fd / r.copy),
        "adam": 28 * fd / r.copy,
    }
    if op == "step":
        return sum(sizes[o] for o in ("encode", "decode", "gradients")) + 2 * sizes["adam"]
    return sizes[op]


def rivals(r: Rates, op: str, s: Shape, dtype: str) -> dict[str, float]:
    """Seconds of other ways, by provider."""
    b, nf, fd, slots = BYTES[dtype], s.n * s.f, s.f * s.d, s.n * s.k * s.d
    product, passes = gemm(r, s.n, s.f, s.d, dtype), nf * b / r.copy
    topk = nf * TORCH_TOPK[dtype]
    eager = product + 2 * passes + topk
    if op == "row_topk":
        return {"eager": topk, "ours:triton": select_by_triton(r, s.n, s.f, s.k, dtype)[0]}
    if op == "by_feature":
        # torch sorts 64-bit keys in twice as many passes; ours by Triton's launcher narrows them
        sort = s.n * s.k / r.sort
        return {"eager": 2 * sort + 4 * r.launch, "ours:triton": sort + 5 * r.launch}
    if op == "encode":
        one, _ = select(r, s.n, s.f, s.k, dtype)
        return {"eager": eager, "mm_row_topk": product + one}
    if op == "decode":
        rows, _ = gathered(r, s.f * s.d * b, s, b)
        # zeros, a scatter that touches a sector each, and the product's read
        return {"eager": rows / 0.6, "dense": passes + s.n * s.k * 64 / r.copy + product}
    # zeroed gradients, the decoder's two gathers, and N k d contributions written, read and added
    peer = 4 * 2 * fd / r.copy + 2 * slots * b / r.copy + 4 * slots * 4 / r.copy
    peer += 2 * s.n * s.k / r.sort
    if op == "gradients":
        dense = 3 * product + 8 * passes
        return {"sparsify": peer, "dense": dense}
    if op == "adam":
        return {"eager": (28 + 12 + 20 + 70) * fd / r.copy, "fused_adam": (60 + 28) * fd / r.copy}
    update = 2 * (60 + 14) * fd / r.copy
    low = gemm(r, s.n, s.f, s.d, "bf16")
    ours = {name: seconds for name, seconds, _ in step(r, s, dtype)}
    apart = ours.pop("gradients") + ours.pop("adam")
    gathers = {name: seconds for name, seconds, _ in gradients(r, s, dtype)}
    # one pass: rows in and out once, gradients never in memory, no norm; whole rows of dy and x
    once, _ = gathered(r, 2 * s.n * s.d * 4, s, 4)
    at_once = gathers["sort"] + 2 * once + 2 * 24 * fd / r.copy / 0.92
    assert at_once < apart
    return {
        "ours:unclipped": sum(ours.values()) + at_once,
        "eager": 5 * product + 15 * passes + topk + update,
        "eager_bf16": 5 * low + 30 * nf / r.copy + nf * TORCH_TOPK["bf16"] + update,
        "sparsify": eager + slots * b / r.copy / GATHER + peer + update,
    }


OPS: dict[str, Callable[[Rates, Shape, str], list[Part]]] = {
    "row_topk": row_topk,
    "by_feature": by_feature,
    "encode": encode,
    "decode": decode,
    "gradients": gradients,
    "adam": adam,
    "step": step,
}
MODES = {"gradients": "bwd", "adam": "step", "step": "step"}


def _total(parts: Iterable[Part]) -> float:
    return sum(seconds for _, seconds, _ in parts)


def predictions(device: str) -> dict[str, Any]:
    """Everything for one device of DEVICES, as the file that is committed."""
    r = DEVICES[device]
    cases = []
    for op, parts_of in OPS.items():
        for s in GPU_SHAPES.values():
            for dtype in ("bf16", "fp32"):
                if dtype not in load(op).gpu_dtypes:
                    continue
                parts = parts_of(r, s, dtype)
                total = _total(parts)
                others = rivals(r, op, s, dtype)
                cases.append(
                    {
                        "op": op,
                        "mode": MODES.get(op, "fwd"),
                        "shape": s.name,
                        "dtype": dtype,
                        "ms": _ms(total),
                        "floor_ms": _ms(floor(r, op, s, dtype)),
                        "parts": [{"name": n, "ms": _ms(t), "why": w} for n, t, w in parts],
                        "rivals_ms": {name: _ms(t) for name, t in others.items()},
                        "ratios": {name: round(t / total, 2) for name, t in others.items()},
                    }
                )
    for s in (GPU_SHAPES[name] for name in ("G1", "G2", "G3")):
        parts = encode_uncertain(r, s, "fp32")
        cases.append(
            {
                "op": "encode",
                "mode": "uncertain",
                "shape": s.name,
                "dtype": "fp32",
                "ms": _ms(_total(parts)),
                "floor_ms": _ms(floor(r, "encode", s, "fp32")),
                "parts": [{"name": n, "ms": _ms(t), "why": w} for n, t, w in parts],
                "rivals_ms": {},
                "ratios": {"certain": round(parts[0][1] / _total(parts), 2)},
            }
        )
    cases += [*pair_cases(r), *attention_cases(r)]
    return {"schema": 1, "device": r.name, "rates": vars(r), "cases": cases}


def _ms(seconds: float) -> float:
    return float(f"{seconds * 1e3:.4g}")
