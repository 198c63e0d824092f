# SPDX-License-Identifier: Apache-2.0
"""Edge scores of a whole model: `find_circuit` beside EAP-IG's `get_scores_eap`.

"eap": a random HookedTransformer of SmolLM2-135M's sizes (of two layers for "smoke"), set up as
EAP-IG needs it: what every head reads and writes by itself. `eager` is the same by hand: its hooks,
frozen parameters, an einsum for each hook. The peer is no package of an index: a checkout of
hannamw/EAP-IG (2.0.0) whose `src` is on PYTHONPATH; it asks for CUDA by name, which is replaced.
"""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace
from typing import Any

import torch

from mikernels.circuits import find_circuit

from ..harness import peers
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

PAIR = (7, 8)
SPLIT = {
    "use_split_qkv_input": True,
    "use_attn_result": True,
    "use_hook_mlp_in": True,
    "ungroup_grouped_query_attention": True,
}


def _sizes(s: AttentionShape) -> tuple[int, int, int]:
    """Layers, width of an MLP, tokens that there are."""
    return (2, 64, 64) if s.name == "smoke" else (30, 1536, 49152)


@functools.cache
def _model(s: AttentionShape) -> Any:
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError as error:
        raise Unavailable(f"transformer-lens is not importable ({error})") from error
    layers, mlp, vocabulary = _sizes(s)
    config = HookedTransformerConfig(
        n_layers=layers, d_model=s.heads * s.width, d_head=s.width, n_heads=s.heads, d_mlp=mlp,
        n_key_value_heads=s.groups, n_ctx=s.queries, d_vocab=vocabulary, act_fn="silu",
        normalization_type="RMS", gated_mlp=True, positional_embedding_type="rotary",
        rotary_dim=s.width, seed=0, device="cpu", **SPLIT,
    )  # fmt: skip
    return HookedTransformer(config).eval()


def _inputs(shape: AttentionShape, mode: str, seed: int) -> SimpleNamespace:
    size = _sizes(shape)[2]
    ids = torch.randint(0, size - 1, (shape.batch, shape.queries), generator=generator(seed))
    other = ids.clone()
    other[:, shape.queries // 3] += 1
    return SimpleNamespace(shape=shape, ids=ids, other=other, truth=None)


def _ours(model: Any, x: SimpleNamespace) -> torch.Tensor:
    return find_circuit(model, x.ids, x.other, PAIR, "eap", replicates=0).scores


def _eager(model: Any, x: SimpleNamespace) -> torch.Tensor:
    """By hand. Writers and readers in the order of `mikernels.models.graph`."""
    layers = range(model.cfg.n_layers)
    writers = ["hook_embed"]
    readers = []
    for i in layers:
        writers += [f"blocks.{i}.attn.hook_result", f"blocks.{i}.hook_mlp_out"]
        readers += [f"blocks.{i}.hook_{name}_input" for name in "qkv"] + [f"blocks.{i}.hook_mlp_in"]
    readers.append(f"blocks.{layers[-1]}.hook_resid_post")
    seen: dict[str, torch.Tensor] = {}

    def keep(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        if hook.name == "hook_embed":
            tensor = tensor.detach().requires_grad_()
        seen[hook.name] = tensor
        return tensor

    def by_head(name: str) -> torch.Tensor:
        tensor = seen[name].detach()
        return tensor if tensor.dim() == 4 else tensor[:, :, None]

    model.requires_grad_(False)
    hooks = [(name, keep) for name in dict.fromkeys([*writers, *readers])]
    with model.hooks(fwd_hooks=hooks), torch.no_grad():
        model(x.other)
        other = torch.cat([by_head(name) for name in writers], 2)
    with model.hooks(fwd_hooks=hooks), torch.enable_grad():
        last = model(x.ids)[:, -1]
        inputs = [seen[name] for name in readers]
        grads = torch.autograd.grad((last[:, PAIR[0]] - last[:, PAIR[1]]).sum(), inputs)
        delta = torch.cat([by_head(name) for name in writers], 2) - other
    columns = []
    before, heads = 1, model.cfg.n_heads
    for name, g in zip(readers, grads, strict=True):
        g = g if g.dim() == 4 else g[:, :, None]
        before += heads if name.endswith("mlp_in") else 0
        rows = len(delta[0, 0]) if name == readers[-1] else before
        column = torch.einsum("bpwd,bprd->wr", delta[:, :, :rows], g) / len(x.ids)
        columns.append(torch.nn.functional.pad(column, (0, 0, 0, delta.shape[2] - rows)))
        before += name.endswith("mlp_in")
    return torch.cat(columns, 1)


def _theirs(model: Any, x: SimpleNamespace) -> torch.Tensor:
    attribute, graph = peers.eap_ig()
    model.requires_grad_(True)
    made = graph.Graph.from_model(model)

    def metric(logits: torch.Tensor, *others: Any) -> torch.Tensor:
        # its changes are corrupted less clean
        return -(logits[:, -1, PAIR[0]] - logits[:, -1, PAIR[1]]).sum()

    scores = attribute.get_scores_eap(model, made, [(x.ids, x.other, None)], metric, quiet=True)
    # the gradients that it leaves in the parameters, a model's size, are no part of its result
    model.zero_grad()
    # writers lie as ours do; readers of a layer are q, k, v head by head and the MLP
    allowed = made.real_edge_mask.to(scores)
    return scores * allowed


RUN = {"ours": _ours, "eager": _eager, "eap-ig": _theirs}


def _provider(name: str, ours: bool = False) -> Provider:
    def build(x: SimpleNamespace, mode: str) -> Runner:
        model = _model(x.shape)
        if name == "eap-ig":
            peers.eap_ig()
        return Runner(lambda: {"scores": RUN[name](model, x)})

    return Provider(name, build, ours=ours, devices=(CPU,))


def _check(x: SimpleNamespace, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    if x.truth is None:
        wide = copy.deepcopy(_model(x.shape)).double()
        wide.cfg.dtype = torch.float64
        x.truth = _eager(wide, x)
    return values_gate(outputs, eager, {"scores": x.truth})


def _weights(s: AttentionShape) -> float:
    layers, mlp, vocabulary = _sizes(s)
    d = s.heads * s.width
    # keys and values of every head, as the model is set up
    return layers * d * (4 * d + 3 * mlp)


def _flops(s: AttentionShape, mode: str) -> float:
    layers = _sizes(s)[0]
    tokens, each = s.batch * s.queries, s.heads + 1
    readers = 3 * s.heads + 1
    edges = sum((1 + i * each) * readers + s.heads for i in range(layers)) + 1 + layers * each
    # two forward passes and a backward pass for inputs alone, and the edges
    return 2.0 * tokens * (3 * _weights(s) + edges * s.heads * s.width)


BENCHMARK = Benchmark(
    name="find_circuit",
    summary="edge scores of a whole model",
    ops=("edge_scores",),
    modes=("eap",),
    shapes={"eap": ("prompts",)},
    inputs=_inputs,
    providers=(
        _provider("ours", ours=True),
        _provider("eap-ig"),
        _provider("eager"),
    ),
    check=_check,
    flops=_flops,
    bytes=lambda s, mode, size: 3.0 * size * _weights(s),
    targets=(Target("prompts", "eap", "eap-ig", 5.0),),
    family="attention",
)
