# SPDX-License-Identifier: Apache-2.0
"""Attention's gradients, causal: the true ones ("bwd") and GIM's, at temperature 2 ("gim").

Backward alone: forward passes of the others, which keep what they need, are not timed; ours needs
none. `torch` is scaled_dot_product_attention's own backward, 5 products where ours has a sixth that
checks the output; `two-pass` are two of them, the second at half the scores, which gives GIM's.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import mikernels
from mikernels.ops.attention.attention_gradients import attention_gradients_op

from ..harness.correctness import values_gate
from ..harness.spec import (
    AttentionShape,
    Benchmark,
    Outputs,
    Provider,
    Runner,
    Target,
    Unavailable,
    Verdict,
    generator,
)

NAMES = "dq", "dk", "dv"
TEMPERATURES = {"bwd": 1.0, "gim": 2.0}


def _inputs(shape: AttentionShape, mode: str, seed: int) -> SimpleNamespace:
    draw, s = generator(seed), shape
    grad, q, k, v = (
        torch.randn(s.batch, heads, s.queries, s.width, generator=draw)
        for heads in (s.heads, s.heads, s.groups, s.groups)
    )
    return SimpleNamespace(shape=s, grad=grad, q=q, k=k, v=v, truth=None)


def _attend(x: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: float) -> torch.Tensor:
    if x.shape.softcap:
        raise Unavailable("scaled_dot_product_attention has no softcap")
    scale, grouped = q.shape[-1] ** -0.5 / at, x.shape.heads != x.shape.groups
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)


class _Softmax(torch.autograd.Function):
    """softmax(s) whose gradient is that of softmax(s / temperature) without 1 / temperature."""

    @staticmethod
    def forward(ctx: Any, s: torch.Tensor, temperature: float) -> torch.Tensor:
        p = torch.softmax(s, -1)
        ctx.save_for_backward(p if temperature == 1 else torch.softmax(s / temperature, -1))
        return p

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (p,) = ctx.saved_tensors
        return p * (grads[0] - (p * grads[0]).sum(-1, keepdim=True)), None


def _eager(x: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: float) -> torch.Tensor:
    k, v = (t.repeat_interleave(x.shape.heads // x.shape.groups, 1) for t in (k, v))
    s = q @ k.mT * q.shape[-1] ** -0.5
    if x.shape.softcap:
        s = x.shape.softcap * (s / x.shape.softcap).tanh()
    later = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
    return _Softmax.apply(s.masked_fill(later, -torch.inf), at) @ v


def _differentiated(name: str, forward: Callable[..., torch.Tensor]) -> Provider:
    def build(x: Any, mode: str) -> Runner:
        leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
        made: list[torch.Tensor] = []

        def before() -> None:
            made[:] = [forward(x, *leaves, TEMPERATURES[mode])]

        if name != "eager" and mode != "bwd":
            raise Unavailable("the true gradient alone")
        return Runner(
            lambda: dict(zip(NAMES, torch.autograd.grad(made.pop(), leaves, x.grad), strict=True)),
            before,
        )

    return Provider(name, build)


def _two_pass(x: Any, mode: str) -> Runner:
    if mode != "gim":
        raise Unavailable("GIM's gradients alone")
    q, k, v = (t.detach().requires_grad_() for t in (x.q, x.k, x.v))
    made: list[torch.Tensor] = []

    def before() -> None:
        made[:] = [_attend(x, q.detach(), k.detach(), v, 1), _attend(x, q, k, v.detach(), 2)]

    def run() -> Outputs:
        (dv,) = torch.autograd.grad(made[0], v, x.grad)
        dq, dk = torch.autograd.grad(made[1], (q, k), 2 * x.grad)
        made.clear()
        return {"dq": dq, "dk": dk, "dv": dv}

    before()
    return Runner(run, before)


def _ours(x: Any, mode: str) -> Runner:
    with torch.no_grad():
        out = _eager(x, x.q, x.k, x.v, 1.0)

    def run() -> Outputs:
        found = mikernels.attention_gradients(
            x.grad, x.q, x.k, x.v, out,
            softcap=x.shape.softcap, causal=True, temperature=TEMPERATURES[mode],
        )  # fmt: skip
        return dict(zip(NAMES, found, strict=False))

    return Runner(run)


def _check(x: Any, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    if x.truth is None:
        wide = [t.double() for t in (x.grad, x.q, x.k, x.v, x.grad)]
        # the reference, a head at a time: as matrices of all heads it would take gigabytes
        found = attention_gradients_op(
            *wide, None, None, x.shape.width**-0.5, x.shape.softcap, True, 0, TEMPERATURES[mode],
            impl="reference",
        )  # fmt: skip
        x.truth = dict(zip(NAMES, found, strict=False))
    return values_gate(outputs, eager, x.truth)


def _pairs(s: AttentionShape) -> float:
    return s.batch * s.heads * s.queries * (s.queries + 1) / 2


SHAPES = "smollm2", "gpt2-heads", "gemma2", "llama-heads"
GPU_SHAPES = "gpt2-heads", "gemma2-4k", "llama-4k"
BENCHMARK = Benchmark(
    name="attention_gradients",
    summary="gradients of attention from q, k and v, true ones and GIM's",
    ops=("attention_gradients",),
    modes=("bwd", "gim"),
    shapes={"bwd": SHAPES, "gim": SHAPES},
    gpu_shapes={"bwd": GPU_SHAPES, "gim": GPU_SHAPES},
    gpu_dtypes=("bf16", "fp32"),
    inputs=_inputs,
    providers=(
        Provider("ours", _ours, ours=True),
        _differentiated("eager", _eager),
        _differentiated("torch", _attend),
        Provider("two-pass", _two_pass),
    ),
    check=_check,
    flops=lambda s, mode: 12 * _pairs(s) * s.width,
    bytes=lambda s, mode, size: 4.0 * size * s.batch * (s.heads + s.groups) * s.queries * s.width,
    targets=tuple(Target(shape, "bwd", "torch", 1.0) for shape in SHAPES if shape != "gemma2"),
    family="attention",
)
