# SPDX-License-Identifier: Apache-2.0
"""Hugging Face decoders, by their structure.

One is recognised by a ModuleList as long as the configuration says, whose modules hold an attention
that ends in a projection, and an MLP. What names and shapes suggest is checked by arithmetic where
it is used (`mikernels.models.watch`). Whether a norm is before or after a part is never read off
its name: Llama's `post_attention_layernorm` is before the MLP, Gemma 2's after the attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mikernels.models.hooks import eager
from mikernels.models.parts import (
    ATTENTION,
    PROJECTION,
    Block,
    Decoder,
    Heads,
    Product,
    Projection,
    Tap,
    child_named,
    norms_in,
    refusal,
)

# the second is of Mixtral before transformers 5
MLP = ("mlp", "block_sparse_moe")
# of an MLP without a module of its own (OPT): what reads, and what writes
LAYERS = ("fc1", "fc2")
QUERY, KEY, VALUE = ("q_proj",), ("k_proj",), ("v_proj",)
FUSED = ("qkv_proj", "c_attn", "query_key_value", "Wqkv")


class HuggingFace(Decoder):
    """A causal language model of transformers, or of its structure."""

    def w_o(self, block: Block) -> torch.Tensor:
        heads: Any = getattr(self.model.config, "num_attention_heads", None)
        weight = _matrix(block.projection)
        if weight is None:
            raise self.refusal(f"the projection of block {block.index} is {block.projection}")
        known = isinstance(heads, int) and heads > 0
        size = self._head_size(block, heads) if known else None
        if not known or size is None or weight.shape[0] != heads * size:
            raise self.refusal(
                f"the projection of block {block.index} must read {heads} heads "
                f"(config.num_attention_heads) of {size} numbers, got {weight.shape[0]} in "
                f"{block.projection}"
            )
        return weight.unflatten(0, (heads, size))

    def b_o(self, block: Block) -> torch.Tensor | None:
        bias = getattr(block.projection, "bias", None)
        return bias if isinstance(bias, torch.Tensor) else None

    def value_heads(self, block: Block, query: int, size: int) -> float:
        values, fused = (child_named(block.attention, names) for names in (VALUE, FUSED))
        if values is not None and (weight := _matrix(values)) is not None:
            return weight.shape[1] / size
        if fused is not None and (weight := _matrix(fused)) is not None:
            return (weight.shape[1] / size - query) / 2
        return getattr(self.model.config, "num_key_value_heads", None) or query

    def projections(self, block: Block) -> tuple[Projection, Projection, Projection]:
        heads = self.heads(block)
        numbers = heads.query, heads.key_value, heads.key_value
        modules = [child_named(block.attention, names) for names in (QUERY, KEY, VALUE)]
        fused = child_named(block.attention, FUSED)
        columns: list[torch.Tensor | None] = [None] * 3
        if not all(modules) and fused is not None:
            modules, columns = [fused] * 3, _columns(block, fused, heads)  # type: ignore[assignment]
        found = []
        for part, n, module, at in zip("qkv", numbers, modules, columns, strict=True):
            weight = None if module is None else _matrix(module)
            if module is None or weight is None or (at is None and weight.shape[1] % n):
                raise self.refusal(
                    f"attention of block {block.index} has no layer that makes {part} of {n} heads"
                )
            bias = getattr(module, "bias", None)
            bias = None if bias is None else bias.detach()

            def by_heads(x: torch.Tensor, n: int = n, at: torch.Tensor | None = at) -> torch.Tensor:
                return x.unflatten(-1, (n, -1)) if at is None else x[..., at.to(x.device)]

            bias = None if bias is None else by_heads(bias)
            found.append(Projection(part, module, by_heads(weight).movedim(0, 1), bias, at))
        q, k, v = found
        return q, k, v

    def last_products(self, block: Block) -> list[Product]:
        parts = () if block.mlp is None else block.mlp.modules()
        weights = {part: _matrix(part) for part in parts}
        return [
            Product(Tap(part, before=True), weight, getattr(part, "bias", None))
            for part, weight in weights.items()
            if weight is not None and weight.shape[1] == self.d
        ]

    def logits(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        with eager():
            logits = getattr(self.model(**{**inputs, "use_cache": False}), "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
            raise ValueError(
                f"{self.where}: model must return logits [B, P, V], got none from "
                f"{type(self.model).__name__}; load it with AutoModelForCausalLM"
            )
        return logits

    def _head_size(self, block: Block, heads: int) -> int | None:
        """What the model says, of a head's z."""
        for owner, name in (
            (block.attention, "v_head_dim"), (block.attention, "head_dim"),
            (block.attention, "head_size"), (self.model.config, "head_dim"),
        ):  # fmt: skip
            size = getattr(owner, name, None)
            if isinstance(size, int):
                return size
        return self.d // heads


def _matrix(module: torch.nn.Module) -> torch.Tensor | None:
    """The weight of a linear layer as `[in, out]`, a view; None where there is none to read."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return None
    if weight.dim() != 2 or weight.is_meta:
        return None
    # transformers' Conv1D, of GPT-2, stores [in, out]; what else there is, arithmetic decides
    transposed = any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
    return weight.detach() if transposed else weight.detach().T


def _columns(block: Block, fused: torch.nn.Module, heads: Heads) -> list[torch.Tensor | None]:
    """Of a fused layer: all q, all k, all v; or, by the classes that do so, group by group the q of
    its heads, k and v."""
    each = heads.query // heads.key_value
    at = torch.arange((heads.query + 2 * heads.key_value) * heads.size).view(-1, heads.size)
    if "query_key_value" in block.attention._modules:
        groups = at.view(heads.key_value, each + 2, heads.size)
        return [groups[:, :each].flatten(0, 1), groups[:, each], groups[:, each + 1]]
    return list(at.split([heads.query, heads.key_value, heads.key_value]))


def lists_in(model: torch.nn.Module) -> list[torch.nn.ModuleList]:
    return [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]


def n_layers(model: torch.nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "num_hidden_layers", None)


def layers_of(model: torch.nn.Module) -> torch.nn.ModuleList | None:
    """The decoder blocks: the outermost ModuleList of `config.num_hidden_layers` modules, of which
    each has an attention where there is such a list (and not in a state-space model, say)."""
    n = n_layers(model)
    found = [modules for modules in lists_in(model) if n and len(modules) == n]
    # other things may be as many as the blocks, such as norms that a model lists beside them
    attend = [modules for modules in found if all(child_named(m, ATTENTION) for m in modules)]
    return next(iter(attend or found), None)


def _block(index: int, module: torch.nn.Module, d: int) -> Block | None:
    attention, mlp = child_named(module, ATTENTION), child_named(module, MLP)
    projection = None if attention is None else child_named(attention, PROJECTION)
    reader = mlp
    if mlp is None:
        reader, mlp = (child_named(module, (name,)) for name in LAYERS)
    if attention is None or projection is None or mlp is None or reader is None:
        return None
    z = Tap(projection, before=True)
    return Block(index, module, attention, z, projection, mlp, reader, norms_in(module, d))


def find(model: torch.nn.Module, where: str, fix: str) -> HuggingFace:
    """The model's parts.

    Raises:
        ValueError: for another model, with what is missing.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise refusal(model, where, "it has an encoder beside its decoder", fix)
    layers, d = layers_of(model), getattr(getattr(model, "config", None), "hidden_size", None)
    if layers is None:
        n = n_layers(model)
        reason = f"no ModuleList of config.num_hidden_layers ({n}) blocks"
        raise refusal(model, where, reason, fix)
    inside = set(layers.modules())
    for other in lists_in(model):
        attend = all(child_named(block, ATTENTION) for block in other)
        if len(other) == len(layers) and attend and not inside & set(other):
            reason = f"it has several lists of {len(layers)} blocks with attention"
            raise refusal(model, where, reason, f"give the part with one of them, or {fix}")
    if not isinstance(d, int):
        raise refusal(model, where, f"config.hidden_size is {d}", fix)
    blocks = []
    for index, module in enumerate(layers):
        block = _block(index, module, d)
        if block is None:
            children = [name for name, _ in module.named_children()]
            reason = f"block {index} ({type(module).__name__}) has {children}"
            raise refusal(model, where, reason, fix)
        blocks.append(block)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    unembedding = getattr(model, "get_output_embeddings", lambda: None)()
    return HuggingFace.of(model, where, fix, d, layers, blocks, (embedding, unembedding))
