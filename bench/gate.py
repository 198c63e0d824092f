# SPDX-License-Identifier: Apache-2.0
"""The correctness gate: nothing is called fast before it is known to be right.

Values: `err <= 2 err_eager + eps max|fp64|`, eager being plain torch in the same dtype.
Selections: tie-aware. With tol the same bound on scores, every selected feature must score at least
(k-th best - tol) in fp64 and every feature above (k-th best + tol) must be selected.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .declare import Outputs, Verdict


def _worst(out: torch.Tensor, exact: torch.Tensor) -> float:
    if out.shape != exact.shape:
        raise ValueError(f"expected shape {list(exact.shape)}, got {list(out.shape)}")
    return float((out.double() - exact).abs().max()) if exact.numel() else 0.0


def values_gate(outputs: Outputs, eager: Outputs, exact: Outputs) -> Verdict:
    """Every tensor of `exact` (fp64), by the ratio rule; NaN fails."""
    error = eager_error = 0.0
    wrong = []
    for name, truth in exact.items():
        scale = float(truth.abs().max()) or 1.0
        ours, theirs = _worst(outputs[name], truth), _worst(eager[name], truth)
        allowed = 2 * theirs + torch.finfo(outputs[name].dtype).eps * scale
        # written so that NaN is wrong
        if not ours <= allowed:
            wrong.append(f"{name}: error {ours:.2e}, allowed {allowed:.2e}")
        error, eager_error = max(error, ours / scale), max(eager_error, theirs / scale)
    return Verdict(not wrong, error, eager_error, "; ".join(wrong))


def selection_gate(
    scores: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]],
    outputs: Outputs,
    eager: Outputs,
    *,
    relu: bool,
    rows: int = 512,
) -> Verdict:
    """values `[N, k]` and indices `[N, k]` against fp64 scores.

    Args:
        scores: (first row, last row) -> scores `[rows, F]` in fp64 and in eager arithmetic; asked
            for in blocks, so that the N x F matrix never stands in fp64.
        relu: values are clamped at 0, and slots at 0 are inactive wherever they point.
    """
    values, indices = outputs["values"], outputs["indices"]
    n, k = indices.shape
    if bool((indices.sort(dim=1).values.diff(dim=1) == 0).any()):
        return Verdict(False, math.inf, 0.0, "a row selects the same feature twice")
    eps = torch.finfo(values.dtype).eps
    errors, eager_errors, scales = [], [], []
    missed = below = unlike = 0
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        exact, approximate = scores(part.start, part.stop)
        top = exact.abs().amax(1, keepdim=True)
        off = (approximate.double() - exact).abs().amax(1, keepdim=True)
        # two scores are compared, each with eager's error; no slack where eager is exact
        slack = torch.where(off > 0, 2 * (off + eps * top), 0)
        last = exact.topk(k, dim=1).values[:, -1:]
        chosen = torch.zeros_like(exact, dtype=torch.bool).scatter_(1, indices[part], True)
        active = (values[part] != 0) | (not relu)
        below += int(((exact.gather(1, indices[part]) < last - slack) & active).sum())
        floor = last.clamp_min(0.0) if relu else last
        missed += int(((exact > floor + slack) & ~chosen).sum())
        unlike += int((~chosen.gather(1, eager["indices"][part])).sum())
        errors.append(_picked_error(exact, values[part], indices[part], relu))
        eager_errors.append(
            _picked_error(exact, eager["values"][part], eager["indices"][part], relu)
        )
        scales.append(float(top.max()))
    error, eager_error, scale = max(errors), max(eager_errors), max(scales) or 1.0
    allowed = 2 * eager_error + (eps * scale if eager_error else 0.0)
    wrong = []
    if missed or below:
        wrong.append(f"{missed} winners missed, {below} slots below the k-th score")
    # a NaN in any block must not hide behind max()
    if not all(e <= allowed for e in errors):
        wrong.append(f"values: error {error:.2e}, allowed {allowed:.2e}")
    detail = f"{unlike} of {n * k} slots differ from eager's" if unlike else ""
    return Verdict(not wrong, error / scale, eager_error / scale, "; ".join(wrong) or detail)


def _picked_error(
    exact: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, relu: bool
) -> float:
    truth = exact.gather(1, indices)
    return float((values.double() - (truth.relu() if relu else truth)).abs().max())
