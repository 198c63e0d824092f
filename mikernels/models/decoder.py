# SPDX-License-Identifier: Apache-2.0
"""What a language model is made of: blocks, attention and its heads, MLPs, norms, both embeddings.

A decoder is recognised by structure: a ModuleList as long as the configuration says, whose modules
hold an attention that ends in a projection, and an MLP. What names and shapes suggest is checked by
arithmetic where it is used (`mikernels.models.watch`). Whether a norm is before or after a part is
never read off its name: Llama's `post_attention_layernorm` is before the MLP, Gemma 2's after the
attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mikernels.models.hooks import check_fires

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
PROJECTION = ("o_proj", "c_proj", "out_proj", "dense")
# the second is of Mixtral before transformers 5
MLP = ("mlp", "block_sparse_moe")
# of an MLP without a module of its own (OPT): what reads, and what writes
LAYERS = ("fc1", "fc2")
VALUE = ("v_proj",)
FUSED = ("qkv_proj", "c_attn", "query_key_value", "Wqkv")


class Heads(NamedTuple):
    """Of one attention.

    Attributes:
        query: their number. key_value: of the key and value heads, which groups of query heads
            share. size: of a head's z, what the projection reads of it.
    """

    query: int
    key_value: int
    size: int


@dataclass(frozen=True, eq=False)
class Block:
    """One layer.

    Attributes:
        index: 0..n-1.
        module: the block. attention: that in it. projection: the attention's last layer, `z W_O`.
        mlp: the module that returns the MLP's or the experts' output. mlp_reader: the module that
            gets its input, the same one unless the block holds the MLP's layers itself.
        norms: name -> module; `Watch.flows` tells what each of them is for.
    """

    index: int
    module: torch.nn.Module
    attention: torch.nn.Module
    projection: torch.nn.Module
    mlp: torch.nn.Module
    mlp_reader: torch.nn.Module
    norms: dict[str, torch.nn.Module]


@dataclass(frozen=True, eq=False)
class Decoder:
    """A recognised model.

    Attributes:
        model: as given. where, fix: the public function that asked, and what its users may do about
            a model that is another, for messages.
        d: width of the residual stream.
        blocks: in order. beside: modules beside the list of blocks, in the order of definition.
        embedding: with weight `[V, d]`, None for models that name none.
        unembedding: with weight `[V, d]`, None without (AutoModel).
        final_norm: after the last block, None without.
    """

    model: torch.nn.Module
    where: str
    fix: str
    d: int
    blocks: tuple[Block, ...]
    beside: tuple[torch.nn.Module, ...]
    embedding: torch.nn.Module | None
    unembedding: torch.nn.Module | None
    final_norm: torch.nn.Module | None

    def refusal(self, reason: str, fix: str = "") -> ValueError:
        """The error of a model that turns out to be another than it looks like.

        Args:
            reason: what it is. fix: what to try before `self.fix`, ending in "or ".
        """
        return _refusal(self.model, self.where, reason, fix + self.fix)

    def w_o(self, block: Block) -> torch.Tensor:
        """The projection's weight by heads, `[H, dh, d]`; a view.

        Raises:
            ValueError: for a projection without such a weight, or of another size.
        """
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

    def heads(self, block: Block) -> Heads:
        """From the shapes of the projection and of what makes the values.

        Raises:
            ValueError: as `w_o`; or when the query heads are no multiple of the others.
        """
        query, size, _ = self.w_o(block).shape
        values, fused = (_child(block.attention, names) for names in (VALUE, FUSED))
        if values is not None and (weight := _matrix(values)) is not None:
            key_value = weight.shape[1] / size
        elif fused is not None and (weight := _matrix(fused)) is not None:
            key_value = (weight.shape[1] / size - query) / 2
        else:
            key_value = getattr(self.model.config, "num_key_value_heads", None) or query
        if key_value < 1 or query % key_value:
            raise self.refusal(
                f"attention of block {block.index} has {query} query heads for {key_value:g} key "
                f"and value heads"
            )
        return Heads(query, int(key_value), size)

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


def _refusal(model: object, where: str, reason: str, fix: str) -> ValueError:
    return ValueError(
        f"{where}: model must be a Hugging Face decoder (Llama, GPT-2, ...) of blocks with "
        f"attention ({', '.join(ATTENTION)}) that ends in a projection ({', '.join(PROJECTION)}) "
        f"and an mlp, both added to the residual stream as they are or normed, got "
        f"{type(model).__name__}: {reason}; {fix}"
    )


def _child(module: torch.nn.Module, names: tuple[str, ...]) -> torch.nn.Module | None:
    found = (getattr(module, name, None) for name in names)
    return next((child for child in found if isinstance(child, torch.nn.Module)), None)


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


def _is_norm(module: torch.nn.Module, d: int) -> bool:
    """Without parts, and with nothing but vectors [d]; or without parameters, by its name."""
    if next(module.children(), None) is not None:
        return False
    shapes = [tuple(p.shape) for p in module.parameters()]
    return set(shapes) == {(d,)} or (not shapes and "norm" in type(module).__name__.lower())


def _lists(model: torch.nn.Module) -> list[torch.nn.ModuleList]:
    return [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]


def _n_layers(model: torch.nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "num_hidden_layers", None)


def _layers(model: torch.nn.Module) -> torch.nn.ModuleList | None:
    n = _n_layers(model)
    found = [modules for modules in _lists(model) if n and len(modules) == n]
    # other things may be as many as the blocks, such as norms that a model lists beside them
    attend = [modules for modules in found if all(_child(m, ATTENTION) for m in modules)]
    return next(iter(attend or found), None)


def decoder_layers(model: torch.nn.Module, where: str, fix: str) -> torch.nn.ModuleList:
    """The decoder blocks: the outermost ModuleList of `config.num_hidden_layers` modules, of which
    each has an attention where there is such a list (and not in a state-space model, say).

    Args:
        model: any.
        where, fix: of the message: the public function that asks, and what its users may do.

    Raises:
        ValueError: when the model has no such list.
    """
    if (layers := _layers(model)) is not None:
        return layers
    raise ValueError(
        f"{where}: model must be a Hugging Face decoder with a ModuleList of {_n_layers(model)} "
        f"layers (config.num_hidden_layers), got {type(model).__name__} with lists of "
        f"{[len(found) for found in _lists(model)]}; {fix}"
    )


def find_layer(model: torch.nn.Module, layer: int | str, where: str) -> torch.nn.Module:
    """A decoder block by its number, or any submodule by its name.

    Raises:
        ValueError, IndexError, AttributeError: a model without decoder layers, or without this one.
    """
    if isinstance(layer, str):
        return model.get_submodule(layer)
    layers = decoder_layers(model, where, "pass the module's name as layer")
    if not 0 <= layer < len(layers):
        raise IndexError(
            f"{where}: layer must be in 0..{len(layers) - 1} "
            f"({len(layers)} decoder layers), got {layer}"
        )
    return layers[layer]


def _block(model: torch.nn.Module, index: int, module: torch.nn.Module, d: int) -> Block | None:
    attention, mlp = _child(module, ATTENTION), _child(module, MLP)
    projection = None if attention is None else _child(attention, PROJECTION)
    reader = mlp
    if mlp is None:
        reader, mlp = (_child(module, (name,)) for name in LAYERS)
    if attention is None or projection is None or mlp is None or reader is None:
        return None
    norms = {name: part for name, part in module.named_children() if _is_norm(part, d)}
    return Block(index, module, attention, projection, mlp, reader, norms)


def find_decoder(model: torch.nn.Module, where: str, fix: str) -> Decoder:
    """Recognise a model by its structure; nothing is run.

    Args:
        model: a Hugging Face decoder: Llama, Qwen, Gemma, Phi-3, Mixtral, GPT-2, GPT-NeoX, OPT, ...
        where, fix: of the messages: the public function that asks, and what its users may do.

    Raises:
        TypeError, ValueError: for another model, with what is missing; blocks that share modules,
            or lie in a scripted module, which hooks do not see.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    layers, d = _layers(model), getattr(getattr(model, "config", None), "hidden_size", None)
    if layers is None:
        n = _n_layers(model)
        reason = f"no ModuleList of config.num_hidden_layers ({n}) blocks"
        raise _refusal(model, where, reason, fix)
    if not isinstance(d, int):
        raise _refusal(model, where, f"config.hidden_size is {d}", fix)
    blocks = []
    for index, module in enumerate(layers):
        block = _block(model, index, module, d)
        if block is None:
            children = [name for name, _ in module.named_children()]
            reason = f"block {index} ({type(module).__name__}) has {children}"
            raise _refusal(model, where, reason, fix)
        blocks.append(block)
    modules = [m for b in blocks for m in (b.module, b.attention, b.projection, b.mlp)]
    if len(set(modules)) < len(modules):
        reason = "blocks share modules, which hooks cannot tell apart"
        raise _refusal(model, where, reason, fix)
    check_fires(where, model, modules)
    parent = next(m for m in model.modules() if any(child is layers for child in m.children()))
    beside = [m for m in parent.children() if m is not layers]
    names = list(parent._modules.values())
    # defined after the blocks, or (OPT) last of those before
    after = [m for m in names[names.index(layers) + 1 :] if m is not None and _is_norm(m, d)]
    norms = after[:1] or [m for m in beside if _is_norm(m, d)][-1:]
    return Decoder(
        model,
        where,
        fix,
        d,
        tuple(blocks),
        tuple(beside),
        embedding=getattr(model, "get_input_embeddings", lambda: None)(),
        unembedding=getattr(model, "get_output_embeddings", lambda: None)(),
        final_norm=norms[0] if norms else None,
    )
