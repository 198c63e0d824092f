# SPDX-License-Identifier: Apache-2.0
"""Operands of sae_update_, and what it computes by torch.optim.Adam, for CPU and device tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from oracle import randn, random_indices

from mikernels import by_feature

LR, BETAS, EPS, CLIP = 3e-3, (0.9, 0.999), 1e-8, 0.5
OUTPUTS = "w_dec", "w_enc", "m_dec", "v_dec", "m_enc", "v_enc", "db_enc", "d_input"


@dataclass(frozen=True)
class Operands:
    values: torch.Tensor
    indices: torch.Tensor
    dy: torch.Tensor
    x: torch.Tensor
    w_dec: torch.Tensor
    w_enc: torch.Tensor
    project: bool = True
    unit_norm: bool = True
    eps: float = EPS


def operands(
    n: int, d: int, n_features: int, k: int, dtype: torch.dtype, weights: torch.dtype, data=randn
) -> Operands:
    """The last feature is in every row and feature 1, if there is one, in none."""
    indices = random_indices(n, k, n_features)
    indices[:, 0] = n_features - 1
    w_dec = torch.nn.functional.normalize(randn(n_features, d, seed=3), dim=-1)
    return Operands(
        data(n, k, dtype=dtype).relu(),
        indices.masked_fill(indices == 1, 0),
        data(n, d, dtype=dtype, seed=1),
        data(n, d, dtype=dtype, seed=2),
        w_dec.to(weights),
        randn(n_features, d, seed=4).to(weights),
    )


def run(op, o: Operands, device: str = "cpu", *, shadow=None, steps: int = 2, impl: str = "auto"):
    """The outputs after `steps` updates, and the shadows, on the CPU; OUTPUTS names the former."""
    slots = o.indices, *by_feature(o.indices.reshape(-1), o.w_dec.shape[0])
    tokens = *(t.to(device) for t in (o.values, *slots)), None, *(t.to(device) for t in (o.dy, o.x))
    weights = [t.to(device, copy=True) for t in (o.w_dec, o.w_enc)]
    wide = torch.float64 if o.w_dec.dtype == torch.float64 else torch.float32
    moments = [torch.zeros(o.w_dec.shape, dtype=wide, device=device) for _ in range(4)]
    shadows = [None if shadow is None else torch.empty_like(w, dtype=shadow) for w in weights]
    rate, clip = (torch.tensor(v, device=device, dtype=torch.float64) for v in (LR, CLIP))
    for step in range(1, steps + 1):
        settings = rate, *BETAS, o.eps, torch.tensor(step, device=device), clip
        rows = *weights, *moments, *shadows
        sums = op(*tokens, *rows, *settings, o.project, o.unit_norm, impl=impl)
    outputs = [t.cpu() for t in (*weights, *moments, *sums)]
    return outputs, [None if t is None else t.cpu() for t in shadows]


def plain(o: Operands, dtype: torch.dtype, *, steps: int = 2) -> list[torch.Tensor]:
    """In `dtype`; weights are rounded to their own dtype after every step unless it is float64."""
    store = dtype if dtype == torch.float64 else o.w_dec.dtype
    values, dy, x = (t.to(dtype) for t in (o.values, o.dy, o.x))
    params = [torch.nn.Parameter(w.to(dtype, copy=True)) for w in (o.w_dec, o.w_enc)]
    optimizer = torch.optim.Adam(params, lr=LR, betas=BETAS, eps=o.eps)
    d = dy.shape[1]
    with torch.no_grad():
        for _ in range(steps):
            w_dec, w_enc = params
            dots = (dy[:, None] * w_dec[o.indices]).sum(-1)
            dv = torch.where(values != 0, dots, 0)
            grads = [torch.zeros_like(w) for w in params]
            flat = o.indices.reshape(-1)
            for grad, c, rows in zip(grads, (values, dv), (dy, x), strict=True):
                grad.index_add_(0, flat, (c[..., None] * rows[:, None]).reshape(-1, d))
            db_enc = w_enc.new_zeros(w_enc.shape[0]).index_add_(0, flat, dv.reshape(-1))
            d_input = (db_enc[:, None] * w_enc).sum(0)
            if o.project:
                grads[0] -= (grads[0] * w_dec).sum(-1, keepdim=True) * w_dec
            for w, grad in zip(params, grads, strict=True):
                w.grad = CLIP * grad
            optimizer.step()
            if o.unit_norm:
                w_dec /= w_dec.norm(dim=-1, keepdim=True)
            for w in params:
                w.copy_(w.to(store))
    state = [optimizer.state[w] for w in params]
    moments = [s[name] for s in state for name in ("exp_avg", "exp_avg_sq")]
    return [*(w.detach() for w in params), *moments, db_enc, d_input]


def scale_of_sums(o: Operands) -> tuple[float, float]:
    """What one rounding of db_enc and d_input is relative to: sums of the terms' magnitudes.

    They are few numbers in which large terms cancel, and eager torch may hit them by luck.
    """
    values, dy, w_dec, w_enc = (t.double() for t in (o.values, o.dy, o.w_dec, o.w_enc))
    dots = (dy[:, None] * w_dec[o.indices]).abs().sum(-1).masked_fill_(values == 0, 0)
    db = w_enc.new_zeros(w_enc.shape[0]).index_add_(0, o.indices.reshape(-1), dots.reshape(-1))
    terms = db[:, None] * w_enc.abs()
    return max(db.tolist(), default=0.0), terms.sum(0).max().item()


def changed(o: Operands, **fields) -> Operands:
    return replace(o, **fields)
