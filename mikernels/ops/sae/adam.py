# SPDX-License-Identifier: Apache-2.0
"""Row-fused Adam: gradient projection, clipping, Adam and renormalisation in one pass over rows.

For every row p of a matrix with gradient g (all in fp32 whatever p's dtype, fp64 for fp64):

    g <- g - <g, p> p                     if project   (p is a unit row: drop the part along it)
    g <- clip g
    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
    p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    p <- p / |p|                          if unit_norm

which is torch.optim.Adam between `remove_gradient_parallel_to_decoder_directions` and
`set_decoder_norm_to_unit_norm` (the order of sparsify and dictionary_learning). 28 bytes a
parameter in one sweep, where the separate passes move about 80.

What changes from step to step (lr, the step count t from 1, clip) are 0-dim tensors on p's device:
a GPU step never synchronises, and one captured in a CUDA graph sees their values of the moment.
lr and clip are float32 or float64, t is int64 or floating; bias corrections are taken in fp64.
"""

from __future__ import annotations

import torch

from mikernels._dispatch import Op, accumulate_dtype


def reference(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    step: torch.Tensor,
    clip: torch.Tensor,
    project: bool,
    unit_norm: bool,
) -> None:
    acc = accumulate_dtype(param.dtype)
    p, g = param.to(acc), grad.to(acc)
    if project:
        g = g - (g * p).sum(-1, keepdim=True) * p
    g = g * clip.to(acc)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    t = step.double()
    denominator = (exp_avg_sq / (1 - beta2**t)).sqrt_().add_(eps)
    p = p - lr / (1 - beta1**t) * exp_avg / denominator
    if unit_norm:
        p = p / p.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(acc).tiny)
    param.copy_(p)


adam_rows_op = Op(
    "adam_rows_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq,"
    " Tensor lr, float beta1, float beta2, float eps, Tensor step, Tensor clip, bool project,"
    " bool unit_norm) -> ()",
    reference,
    lambda *args: None,
    operands={
        "param": "T[R,C]",
        "grad": "float[R,C]",
        "exp_avg": "acc[R,C]",
        "exp_avg_sq": "acc[R,C]",
        "lr": "float[]",
        "step": "number[]",
        "clip": "float[]",
    },
    triton="sae.adam:adam_rows_",
)


def sumsq_reference(grad: torch.Tensor, param: torch.Tensor, project: bool) -> torch.Tensor:
    g, p = grad.double(), param.double()
    if project:
        g = g - (g * p).sum(-1, keepdim=True) * p
    return g.square().sum()


# what gradient clipping needs before adam_rows_: |g|^2 after the projection, in fp64, one read
grad_sumsq_op = Op(
    "grad_sumsq(Tensor grad, Tensor param, bool project) -> Tensor",
    sumsq_reference,
    lambda grad, param, project: grad.new_empty((), dtype=torch.float64),
    operands={"grad": "float[R,C]", "param": "T[R,C]"},
    triton="sae.adam_sumsq:grad_sumsq",
)
