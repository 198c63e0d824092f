# SPDX-License-Identifier: Apache-2.0
"""The correctness gate: nothing is called fast before it is known to be right.

Values: `err <= 2 err_eager + eps max|fp64|`, eager being plain torch in the same dtype.
Selections: tie-aware. With tol the same bound on scores, every selected feature must score at least
(k-th best - tol) in fp64 and every feature above (k-th best + tol) must be selected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch

from .spec import Outputs, Verdict

# fp64 scores that are kept at a time; above it a sample of the tokens is judged
SCORE_BYTES = 2 << 30
# elements that are compared at a time
PIECE = 1 << 27


def _worst(out: torch.Tensor, exact: torch.Tensor) -> float:
    if out.shape != exact.shape:
        raise ValueError(f"expected shape {list(exact.shape)}, got {list(out.shape)}")
    if not exact.numel():
        return 0.0
    pairs = zip(out.reshape(-1).split(PIECE), exact.reshape(-1).split(PIECE), strict=True)
    # torch's max keeps a NaN, Python's would not
    return float(torch.stack([(o.double() - e).abs().max() for o, e in pairs]).max())


def _larger(a: float, b: float) -> float:
    """A NaN is larger than any number; Python's max keeps it only where it comes first."""
    return a if a != a or b <= a else b


def values_gate(outputs: Outputs, eager: Outputs, exact: Outputs) -> Verdict:
    """Every tensor of `exact` (fp64), by the ratio rule; NaN fails."""
    error = eager_error = 0.0
    wrong = []
    for name, truth in exact.items():
        scale = float(truth.abs().max()) or 1.0
        ours, theirs = _worst(outputs[name], truth), _worst(eager[name], truth)
        allowed = 2 * theirs + torch.finfo(outputs[name].dtype).eps * scale
        # written so that NaN is wrong, and what eager overflows in is no allowance
        if not ours <= allowed < math.inf:
            wrong.append(f"{name}: error {ours:.2e}, allowed {allowed:.2e}")
        error, eager_error = _larger(error, ours / scale), _larger(eager_error, theirs / scale)
    return Verdict(not wrong, error, eager_error, "; ".join(wrong))


@dataclass(frozen=True)
class Truth:
    """fp64 scores of a block of rows, and how far eager arithmetic may stray from them.

    Attributes:
        rows: a slice or row numbers. exact: `[rows, F]` fp64. last: `[rows, 1]`, the k-th best.
        slack: `[rows, 1]`, twice eager's error with one rounding; 0 where eager is exact.
    """

    rows: slice | torch.Tensor
    exact: torch.Tensor
    last: torch.Tensor
    slack: torch.Tensor


def truths(
    scores: Callable[[slice | torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    n: int,
    n_features: int,
    k: int,
    rows: int = 512,
) -> list[Truth]:
    """The truth in blocks, from scores of some rows in fp64 and in eager arithmetic.

    Of more tokens than 2 GB of fp64 scores hold, evenly spread ones are judged.
    """
    blocks = []
    for part in _parts(n, SCORE_BYTES // (8 * n_features), rows):
        exact, eager = scores(part)
        if not (exact.isfinite().all() and eager.isfinite().all()):
            raise ValueError("scores to select by must be finite, got NaN or inf")
        off = (eager.double() - exact).abs().amax(1, keepdim=True)
        # two scores are compared, each with eager's error
        rounding = torch.finfo(eager.dtype).eps * exact.abs().amax(1, keepdim=True)
        slack = torch.where(off > 0, 2 * (off + rounding), 0)
        blocks.append(Truth(part, exact, exact.topk(k, dim=1).values[:, -1:], slack))
    return blocks


def _parts(n: int, most: int, rows: int) -> list[slice | torch.Tensor]:
    if n <= most:
        return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
    sample = torch.arange(max(1, most), device="cpu") * n // max(1, most)
    return list(sample.split(rows))


def selection_gate(blocks: list[Truth], outputs: Outputs, eager: Outputs, *, relu: bool) -> Verdict:
    """values `[N, k]` and indices `[N, k]` against the truth.

    relu: values are clamped at 0, and slots at 0 are inactive wherever they point.
    """
    values, indices = outputs["values"], outputs["indices"]
    if bool((indices.sort(dim=1).values.diff(dim=1) == 0).any()):
        return Verdict(False, math.inf, 0.0, "a row selects the same feature twice")
    errors, eager_errors, scales = [], [], []
    missed = below = unlike = judged = 0
    for block in blocks:
        part, exact, last, slack = block.rows, block.exact, block.last, block.slack
        chosen = torch.zeros_like(exact, dtype=torch.bool).scatter_(1, indices[part], True)
        active = (values[part] != 0) | (not relu)
        below += int(((exact.gather(1, indices[part]) < last - slack) & active).sum())
        floor = last.clamp_min(0.0) if relu else last
        missed += int(((exact > floor + slack) & ~chosen).sum())
        judged += last.shape[0]
        unlike += int((~chosen.gather(1, eager["indices"][part])).sum())
        errors.append(_picked_error(block, outputs, relu))
        eager_errors.append(_picked_error(block, eager, relu))
        scales.append(float(exact.abs().max()))
    error, eager_error = reduce(_larger, errors), reduce(_larger, eager_errors)
    scale = max(scales) or 1.0
    allowed = 2 * eager_error
    if eager_error:
        allowed += torch.finfo(values.dtype).eps * scale
    wrong = []
    if missed or below:
        wrong.append(f"{missed} winners missed, {below} slots below the k-th score")
    # a NaN in any block must not hide behind max()
    if not all(e <= allowed < math.inf for e in errors):
        wrong.append(f"values: error {error:.2e}, allowed {allowed:.2e}")
    slots = judged * indices.shape[1]
    detail = f"{unlike} of {slots} slots differ from eager's" if unlike else ""
    if judged < indices.shape[0]:
        detail = f"{judged} of {indices.shape[0]} tokens judged" + ("; " + detail if detail else "")
    return Verdict(not wrong, error / scale, eager_error / scale, "; ".join(wrong) or detail)


def _picked_error(block: Truth, outputs: Outputs, relu: bool) -> float:
    truth = block.exact.gather(1, outputs["indices"][block.rows])
    truth = truth.relu() if relu else truth
    return float((outputs["values"][block.rows].double() - truth).abs().max())
