# SPDX-License-Identifier: Apache-2.0
"""What adam_rows_ computes by torch.optim.Adam, for CPU and device tests."""

import torch
from oracle import randn

LR, BETAS, EPS = 3e-3, (0.9, 0.999), 1e-8


def unit_rows(rows, d, dtype):
    return torch.nn.functional.normalize(randn(rows, d).double(), dim=-1).to(dtype)


def plain(param, gradients, clip, project, unit_norm, dtype, store):
    """torch.optim.Adam in `dtype` between the projection and the renormalisation that SAE trainers
    do; the parameter is rounded to `store` after every step."""
    p = torch.nn.Parameter(param.to(dtype, copy=True))
    optimizer = torch.optim.Adam([p], lr=LR, betas=BETAS, eps=EPS)
    for g in gradients:
        g = g.to(dtype)
        with torch.no_grad():
            if project:
                g = g - (g * p).sum(-1, keepdim=True) * p
            p.grad = g * clip
            optimizer.step()
            if unit_norm:
                p /= p.norm(dim=-1, keepdim=True)
            p.copy_(p.to(store))
    state = optimizer.state[p]
    return p.detach(), state["exp_avg"], state["exp_avg_sq"]
