# SPDX-License-Identifier: Apache-2.0
"""TransformerLens with heads' results, as edge attribution runs it: its model, ours switched on.

One attention layer of GPT-2's sizes, forward alone or the backward pass, parameters frozen: what
EAP needs of a layer.
"""

from __future__ import annotations

import torch

from mikernels.integrations.transformer_lens import fast_heads

from ..harness.correctness import values_gate
from ..harness.pairs import Operands, operands
from ..harness.spec import (
    CPU,
    Benchmark,
    Outputs,
    PairShape,
    Provider,
    Runner,
    Target,
    Unavailable,
    Verdict,
)


def _make(s: PairShape, randn):
    return {"x": randn(s.batch, s.positions, s.d), "dy": randn(s.batch, s.positions, s.d)}


def _attention(inputs: Operands):
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError as error:
        raise Unavailable(f"transformer-lens is not importable ({error})") from error
    s = inputs.shape
    config = HookedTransformerConfig(
        n_layers=1, d_model=s.d, n_ctx=max(s.positions, 8), d_head=64, n_heads=max(1, s.d // 64),
        attn_only=True, d_vocab=64, seed=0, use_attn_result=True, device="cpu",
    )  # fmt: skip
    model = HookedTransformer(config)
    model.requires_grad_(False)
    return model


def _provider(name: str, fast: bool) -> Provider:
    def build(inputs: Operands, mode: str) -> Runner:
        model = _attention(inputs)
        if fast:
            inputs.held = fast_heads(model)
        attention = model.blocks[0].attn
        x = inputs.x.detach().requires_grad_(mode == "bwd")
        made: list[torch.Tensor] = []

        def forward() -> Outputs:
            made[:] = [attention(x, x, x)]
            return {"out": made[0].detach()}

        def backward() -> Outputs:
            (gradient,) = torch.autograd.grad(made.pop(), x, inputs.dy)
            return {"out": gradient}

        return Runner(forward) if mode == "fwd" else Runner(backward, forward)

    return Provider(name, build, devices=(CPU,))


def _check(inputs: Operands, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    if inputs.truth is None:
        model = _attention(inputs).double()
        model.cfg.dtype = torch.float64
        x = inputs.x.double().requires_grad_()
        y = model.blocks[0].attn(x, x, x)
        inputs.truth = y if mode == "fwd" else torch.autograd.grad(y, x, inputs.dy.double())[0]
    return values_gate(outputs, eager, {"out": inputs.truth.detach()})


BENCHMARK = Benchmark(
    name="head_result",
    summary="an attention layer of TransformerLens with use_attn_result",
    ops=(),
    modes=("bwd", "fwd"),
    shapes={"bwd": ("gpt2",), "fwd": ("gpt2",)},
    inputs=operands(_make),
    providers=(_provider("ours", fast=True), _provider("eager", fast=False)),
    check=_check,
    # the heads' results; the rest of the layer is the same on both sides
    flops=lambda s, mode: 2.0 * s.batch * s.positions * s.d * s.d,
    bytes=lambda s, mode, size: 2.0 * size * s.batch * s.positions * s.d * (s.d // 64),
    targets=(Target("gpt2", "bwd", "eager", 5.0),),
    family="pairs",
)
