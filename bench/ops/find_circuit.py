# SPDX-License-Identifier: Apache-2.0
"""Edge scores of a whole model: `find_circuit` beside EAP-IG's `get_scores_eap`.

"eap": a random Llama of SmolLM2-135M's sizes (of two layers for "smoke"), and the HookedTransformer
with its weights, set up as EAP-IG needs it: what every head reads and writes by itself. "ours"
takes the first, as a user's model comes; "lens" is ours on the second, as are "eager", EAP by hand
(hooks, frozen parameters, an einsum for each hook), and the peer. Heads that share keys and values
are apart in the second, so their edges are added up. The peer is no package of an index: a checkout
of hannamw/EAP-IG (2.0.0) whose `src` is on PYTHONPATH; it asks for CUDA by name, which is replaced.
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


def layers_of(s: AttentionShape) -> int:
    return _sizes(s)[0]


@functools.cache
def _llama(s: AttentionShape) -> Any:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise Unavailable(f"transformers is not importable ({error})") from error
    layers, mlp, vocabulary = _sizes(s)
    config = LlamaConfig(
        hidden_size=s.heads * s.width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=s.heads, num_key_value_heads=s.groups, vocab_size=vocabulary,
        rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@functools.cache
def lens_of(s: AttentionShape) -> Any:
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError as error:
        raise Unavailable(f"transformer-lens is not importable ({error})") from error
    layers, mlp, vocabulary = _sizes(s)
    config = HookedTransformerConfig(
        n_layers=layers, d_model=s.heads * s.width, d_head=s.width, n_heads=s.heads, d_mlp=mlp,
        n_key_value_heads=s.groups, n_ctx=s.queries, d_vocab=vocabulary, act_fn="silu",
        normalization_type="RMS", gated_mlp=True, positional_embedding_type="rotary", eps=1e-5,
        rotary_dim=s.width, seed=0, device="cpu", **SPLIT,
    )  # fmt: skip
    model = HookedTransformer(config).eval()
    theirs = _llama(s)
    with torch.no_grad():
        model.embed.W_E.copy_(theirs.model.embed_tokens.weight)
        model.unembed.W_U.copy_(theirs.lm_head.weight.T)
        for block, layer in zip(model.blocks, theirs.model.layers, strict=True):
            attention = layer.self_attn
            for name, n in (("q", s.heads), ("k", s.groups), ("v", s.groups)):
                weight = getattr(attention, f"{name}_proj").weight
                own = f"W_{name.upper()}" if name == "q" else f"_W_{name.upper()}"
                getattr(block.attn, own).copy_(weight.unflatten(0, (n, -1)).transpose(1, 2))
            out = attention.o_proj.weight
            block.attn.W_O.copy_(out.unflatten(1, (s.heads, -1)).permute(1, 2, 0))
            block.mlp.W_gate.copy_(layer.mlp.gate_proj.weight.T)
            block.mlp.W_in.copy_(layer.mlp.up_proj.weight.T)
            block.mlp.W_out.copy_(layer.mlp.down_proj.weight.T)
    return model


def _grouped(scores: torch.Tensor, s: AttentionShape) -> torch.Tensor:
    """`[W, R]` with one reader for the k, and v, of the heads that share them."""
    each = 3 * s.heads + 1
    *layers, logits = scores.split([each] * layers_of(s) + [1], 1)
    found = []
    for layer in layers:
        q, k, v, mlp = layer.split([s.heads, s.heads, s.heads, 1], 1)
        found += [q, *(x.unflatten(1, (s.groups, -1)).sum(-1) for x in (k, v)), mlp]
    return torch.cat([*found, logits], 1)


def prompts_of(shape: AttentionShape, mode: str, seed: int) -> SimpleNamespace:
    size = _sizes(shape)[2]
    ids = torch.randint(0, size - 1, (shape.batch, shape.queries), generator=generator(seed))
    other = ids.clone()
    other[:, shape.queries // 3] += 1
    return SimpleNamespace(shape=shape, ids=ids, other=other, truth=None)


def _ours(model: Any, x: SimpleNamespace) -> torch.Tensor:
    found = find_circuit(model, x.ids, x.other, PAIR, "eap", replicates=0).scores
    return found if found.shape[1] < _readers(x.shape) else _grouped(found, x.shape)


def _readers(s: AttentionShape) -> int:
    """Of the HookedTransformer."""
    return layers_of(s) * (3 * s.heads + 1) + 1


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
    return _grouped(torch.cat(columns, 1), x.shape)


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
    return _grouped(scores * made.real_edge_mask.to(scores), x.shape)


RUN = {"ours": _ours, "lens": _ours, "eager": _eager, "eap-ig": _theirs}


def _provider(name: str, ours: bool = False) -> Provider:
    def build(x: SimpleNamespace, mode: str) -> Runner:
        model = (_llama if name == "ours" else lens_of)(x.shape)
        if name == "eap-ig":
            peers.eap_ig()
        return Runner(lambda: {"scores": RUN[name](model, x)})

    return Provider(name, build, ours=ours, devices=(CPU,))


def _check(x: SimpleNamespace, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    if x.truth is None:
        wide = copy.deepcopy(lens_of(x.shape)).double()
        wide.cfg.dtype = torch.float64
        x.truth = _eager(wide, x)
    return values_gate(outputs, eager, {"scores": x.truth})


def weights_of(s: AttentionShape) -> float:
    layers, mlp, vocabulary = _sizes(s)
    d = s.heads * s.width
    return layers * d * (2 * d + 2 * s.groups * s.width + 3 * mlp)


def _flops(s: AttentionShape, mode: str) -> float:
    layers = layers_of(s)
    tokens, each = s.batch * s.queries, s.heads + 1
    readers = s.heads + 2 * s.groups + 1
    edges = sum((1 + i * each) * readers + s.heads for i in range(layers)) + 1 + layers * each
    # two forward passes and a backward pass for inputs alone, and the edges
    return 2.0 * tokens * (3 * weights_of(s) + edges * s.heads * s.width)


BENCHMARK = Benchmark(
    name="find_circuit",
    summary="edge scores of a whole model",
    ops=(),
    modes=("eap",),
    shapes={"eap": ("prompts",)},
    inputs=prompts_of,
    providers=(
        _provider("ours", ours=True),
        _provider("lens"),
        _provider("eap-ig"),
        _provider("eager"),
    ),
    check=_check,
    flops=_flops,
    bytes=lambda s, mode, size: 3.0 * size * weights_of(s),
    targets=(Target("prompts", "eap", "eap-ig", 5.0),),
    family="attention",
)
