# SPDX-License-Identifier: Apache-2.0
"""The decoder's update `[F, d]`: project the gradient, clip by its norm, Adam, renormalise."""

from __future__ import annotations

import torch

from mikernels.ops.sae.adam import adam_rows_op, grad_sumsq_op

from ..harness.correctness import values_gate
from ..harness.spec import Benchmark, Outputs, Provider, Runner, Shape, Verdict, compiled, generator

LR, BETA1, BETA2, EPS = 3e-4, 0.9, 0.999, 1e-8
CLIP = 1.0


class _Inputs:
    def __init__(self, shape: Shape, mode: str, seed: int):
        draw = generator(seed)
        rows = torch.randn(shape.f, shape.d, generator=draw)
        self.param = torch.nn.functional.normalize(rows, dim=-1)
        self.grad = 1e-3 * torch.randn(shape.f, shape.d, generator=draw)
        self.exact: Outputs | None = None


def _ours(inputs: _Inputs, mode: str) -> Runner:
    param = inputs.param.clone()
    exp_avg, exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
    lr, step = torch.tensor(LR, dtype=torch.float64), torch.tensor(0)

    def run() -> Outputs:
        step.add_(1)
        norm = grad_sumsq_op(inputs.grad, param, True).sqrt()
        clip = (CLIP / (norm + 1e-6)).clamp(max=1.0)
        adam_rows_op(
            param, inputs.grad, exp_avg, exp_avg_sq, lr, BETA1, BETA2, EPS, step, clip, True, True
        )
        return {"param": param}

    return Runner(run)


@torch.no_grad()
def _project(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return grad - (grad * param).sum(-1, keepdim=True) * param


def _torch(fused: bool):
    def build(inputs: _Inputs, mode: str) -> Runner:
        param = torch.nn.Parameter(inputs.param.clone())
        optimizer = torch.optim.Adam([param], lr=LR, betas=(BETA1, BETA2), eps=EPS, fused=fused)

        def run() -> Outputs:
            param.grad = _project(param, inputs.grad)
            torch.nn.utils.clip_grad_norm_([param], CLIP)
            optimizer.step()
            with torch.no_grad():
                param.div_(param.norm(dim=-1, keepdim=True))
            return {"param": param.detach()}

        return Runner(run)

    return build


def _formula(param, grad, exp_avg, exp_avg_sq, correction1, correction2):
    """One update out of place; corrections are 0-dim tensors, so that a step never recompiles."""
    g = _project(param, grad)
    g = g * (CLIP / (g.norm() + 1e-6)).clamp(max=1.0)
    m = BETA1 * exp_avg + (1 - BETA1) * g
    v = BETA2 * exp_avg_sq + (1 - BETA2) * g * g
    p = param - LR * (m / correction1) / ((v / correction2).sqrt() + EPS)
    return p / p.norm(dim=-1, keepdim=True), m, v


def _compile(inputs: _Inputs, mode: str) -> Runner:
    update = compiled(_formula)
    param = inputs.param.clone()
    state = [param, torch.zeros_like(param), torch.zeros_like(param)]
    step = 0

    def run() -> Outputs:
        nonlocal step
        step += 1
        corrections = (torch.tensor(1 - beta**step) for beta in (BETA1, BETA2))
        with torch.no_grad():
            state[:] = update(state[0], inputs.grad, *state[1:], *corrections)
        return {"param": state[0]}

    return Runner(run)


def _check(inputs: _Inputs, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    if inputs.exact is None:
        param, grad = inputs.param.double(), inputs.grad.double()
        none = torch.zeros_like(param)
        first = (torch.tensor(1 - beta, dtype=torch.float64) for beta in (BETA1, BETA2))
        inputs.exact = {"param": _formula(param, grad, none, none, *first)[0]}
    return values_gate(outputs, eager, inputs.exact)


BENCHMARK = Benchmark(
    name="adam",
    summary="the decoder's update with its constraint",
    ops=("adam_rows_", "grad_sumsq"),
    modes=("step",),
    shapes={"step": ("S1",)},
    inputs=_Inputs,
    providers=(
        Provider("ours", _ours, ours=True),
        Provider("eager", _torch(False)),
        Provider("fused_adam", _torch(True)),
        Provider("compile", _compile),
    ),
    check=_check,
    # projection 4, norm 2, clip 1, moments 7, update 6, normalisation 3
    flops=lambda s, mode: 23 * s.f * s.d,
    # one sweep: param and both moments in and out, the gradient in; the norm reads two once more
    bytes=lambda s, mode, size: 36 * s.f * s.d,
    gpu_shapes={"step": ("G1", "G2", "G3")},
    gpu_dtypes=("fp32",),
)
