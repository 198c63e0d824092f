# SPDX-License-Identifier: Apache-2.0
"""Where sparse and dense cross, measured on the device at hand; writes the dispatchers' table.

A point is one (d, k, F): the time of the sparse path, of the dense one, and of what `auto` chooses.
The threshold is the F / k at which sparse and dense take the same time, between two points of the
grid by interpolation in logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import mikernels
from mikernels import _crossover
from mikernels.files import explained, write_json
from mikernels.ops.sae import encode as encode_module
from mikernels.ops.sae.decode import decode_op
from mikernels.ops.sae.encode import encode_op
from mikernels.owning import owned

from ..harness.spec import DTYPES
from .device import Cpu

# tokens: enough to fill the device; and what is tried of F / k
SIZES = {"cpu": 256, "cuda": 4096}
DECODE_RATIOS = (8, 16, 32, 64, 128, 256, 512)
ENCODE_RATIOS = (2, 4, 8, 16, 32, 64)
WIDTHS = {"cpu": (768,), "cuda": (768, 2304)}
SLOTS = {"encode": 64, "decode": 64}
KINDS = {"cpu": ("fp32",), "cuda": ("bf16", "fp32")}
# how much slower than the better path `auto` may be
SLACK = 1.05


@dataclass(frozen=True)
class Point:
    """Seconds at F = ratio k; auto is None where it was not asked for."""

    ratio: int
    sparse: float
    dense: float
    auto: float | None = None


def _normal(device: Cpu, dtype: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device.target).to(DTYPES[dtype])


def dense_decode(values: torch.Tensor, indices: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Codes scattered into tokens x F, times the weights."""
    codes = values.new_zeros(values.shape[0], w.shape[0]).scatter_add_(1, indices, values)
    return codes @ w


def decode_points(
    device: Cpu,
    dtype: str,
    d: int,
    k: int,
    *,
    auto: bool = False,
    scale: float = 1.0,
    ratios: Sequence[int] = DECODE_RATIOS,
) -> list[Point]:
    """Gathered rows against the product with scattered codes."""
    n, d, found = max(8, int(SIZES[device.kind] * scale)), max(8, int(d * scale)), []
    for ratio in ratios:
        f = ratio * k
        w, values = _normal(device, dtype, f, d), _normal(device, dtype, n, k)
        indices = torch.randint(ratio, (n, k), device=device.target)
        indices += ratio * torch.arange(k, device=device.target)
        codes = mikernels.SparseCodes(values, indices, f)
        paths: list[Callable[[], object]] = [
            partial(decode_op.default, values, indices, None, w, None),
            partial(dense_decode, values, indices, w),
            partial(mikernels.sparse_decode, codes, w),
        ]
        found.append(_point(device, ratio, paths if auto else paths[:2]))
    return found


def encode_points(
    device: Cpu,
    dtype: str,
    d: int,
    k: int,
    *,
    auto: bool = False,
    scale: float = 1.0,
    ratios: Sequence[int] = ENCODE_RATIOS,
) -> list[Point]:
    """The screened path against the product and row_topk."""
    n, d, found = max(8, int(SIZES[device.kind] * scale)), max(8, int(d * scale)), []
    for ratio in ratios:
        x, w = _normal(device, dtype, n, d), _normal(device, dtype, ratio * k, d)
        operands = x, w, None, None, None, k, True
        paths: list[Callable[[], object]] = [
            partial(encode_op.default, *operands),
            partial(encode_module.by_product, *operands),
            partial(mikernels.topk_encode, x, w, k=k),
        ]
        found.append(_point(device, ratio, paths if auto else paths[:2]))
    return found


POINTS = {"encode": encode_points, "decode": decode_points}


def _point(device: Cpu, ratio: int, paths: list[Callable[[], object]]) -> Point:
    # interleaved twice, the better median of each: what disturbs one round spares the other
    times = [[device.median(path, times=5, warm=2) for path in paths] for _ in range(2)]
    device.release()
    return Point(ratio, *(min(pair) for pair in zip(*times, strict=True)))


def threshold(points: Sequence[Point]) -> float:
    """F / k from which the sparse path wins for good; 0 if always, beyond the grid if never."""
    ordered = sorted(points, key=lambda p: p.ratio)
    losing = [i for i, p in enumerate(ordered) if p.sparse > p.dense]
    if not losing:
        return 0.0
    last = losing[-1]
    if last == len(ordered) - 1:
        return 2.0 * ordered[-1].ratio
    a, b = ordered[last], ordered[last + 1]
    # log(sparse / dense) is positive at a and not at b
    high, low = math.log(a.sparse / a.dense), math.log(b.sparse / b.dense)
    share = high / (high - low)
    return round(a.ratio * (b.ratio / a.ratio) ** share, 1)


def run(
    device: Cpu, say: Callable[[str], None] = print, *, scale: float = 1.0
) -> list[_crossover.Entry]:
    """Entries of the table for this device."""
    entries = []
    for op, points_of in POINTS.items():
        for dtype in KINDS[device.kind]:
            for d in WIDTHS[device.kind]:
                points = points_of(device, dtype, d, SLOTS[op], scale=scale)
                found = threshold(points)
                name = str(DTYPES[dtype]).removeprefix("torch.")
                say(f"{op} {dtype} d={d}: sparse wins from F / k = {found:g}")
                for p in points:
                    both = f"sparse {p.sparse * 1e3:.3g}, dense {p.dense * 1e3:.3g} ms"
                    say(f"  F/k {p.ratio}: {both}")
                entries.append(
                    {"op": op, "dtype": name, "d": d, "threshold": found, "source": "measured"}
                )
    return entries


def write(path: Path, device: str, entries: list[_crossover.Entry]) -> None:
    """Puts a device's entries into the table, in place of its earlier ones.

    Raises:
        ValueError: the file is there and no table. OSError: it cannot be written.
    """
    with explained("tune", "the table", path, "free space or choose another --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
    # another tuning may end at the same time: what it added stays
    with owned(path.parent, "tune", f".{path.name}.lock"):
        table = {
            "schema": _crossover.SCHEMA,
            "devices": {**_crossover.load(path), device: entries},
        }
        with explained("tune", "the table", path, "free space or choose another --out"):
            write_json(path, table)
    _crossover.reload()


def slow_choices(
    device: Cpu, say: Callable[[str], None] = print, *, scale: float = 1.0
) -> list[str]:
    """Where `auto` is more than 5 % slower than the better path."""
    found = []
    for op, points_of in POINTS.items():
        for dtype in KINDS[device.kind]:
            for d in WIDTHS[device.kind]:
                for p in points_of(device, dtype, d, SLOTS[op], auto=True, scale=scale):
                    assert p.auto is not None
                    over = p.auto / min(p.sparse, p.dense)
                    line = f"{op} {dtype} d={d} F/k={p.ratio}: auto {over:.2f}x the better path"
                    say(line)
                    if over > SLACK:
                        found.append(line)
    return found
