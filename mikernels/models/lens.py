# SPDX-License-Identifier: Apache-2.0
"""HookedTransformers of TransformerLens, by their structure.

One is recognised by its list of `blocks`, whose `attn` holds W_O as a parameter `[H, dh, d]` and
shows the heads' z at a hook point of its own. So z is seen there, and what projects it is attention
itself. The norms hold hook points and are looked through. All else is as in any other decoder: a
block's input, what attention, MLP and the norms after them return, and the sum; what a user's hook
changes on the way (`hook_attn_out`, `hook_result`) is seen by the arithmetic of
`mikernels.models.watch`.

Checked against 2.10.0, 2.15.4 and 3.9.0. A TransformerBridge, the only model of 4.x, is a Hugging
Face model in other clothes, and that lies in its `original_model`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from mikernels.models.hooks import check_eval, eager
from mikernels.models.parts import (
    Block,
    Decoder,
    Product,
    Projection,
    Tap,
    child_named,
    is_hook_point,
    norms_in,
    refusal,
)

# copies of what every head reads, and the product of every head by itself
SPLIT = ("use_split_qkv_input", "use_attn_in", "use_attn_result", "use_hook_mlp_in")
INPUTS = ("input_ids", "attention_mask")


class Lens(Decoder):
    """A HookedTransformer."""

    counts_positions = True

    def check_eval(self) -> None:
        # it has no dropout, and is in training mode unless somebody says otherwise
        check_eval(self.where, self.model, dropout_only=True)

    def w_o(self, block: Block) -> torch.Tensor:
        weight = block.projection.W_O
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            raise self.refusal(f"W_O of block {block.index} is quantised ({weight.dtype})")
        if weight.dim() != 3 or weight.shape[2] != self.d or weight.is_meta:
            raise self.refusal(
                f"W_O of block {block.index} must be [heads, d_head, {self.d}], got "
                f"{list(weight.shape)} on {weight.device}"
            )
        return weight.detach()

    def b_o(self, block: Block) -> torch.Tensor | None:
        bias = getattr(block.projection, "b_O", None)
        return bias if isinstance(bias, torch.Tensor) else None

    def rounds_products(self, block: Block) -> bool:
        # z W_O is then made as (z * W_O).sum(-2), in the model's dtype
        return bool(getattr(self.model.cfg, "use_attn_result", False))

    def value_heads(self, block: Block, query: int, size: int) -> float:
        # of grouped heads W_V is what a property repeats
        weight = getattr(block.attention, "_W_V", None)
        weight = block.attention.W_V if weight is None else weight
        return len(weight) if isinstance(weight, torch.Tensor) else query

    def projections(self, block: Block) -> tuple[Projection, Projection, Projection]:
        attention: Any = block.attention
        grouped = not getattr(self.model.cfg, "ungroup_grouped_query_attention", False)
        found = []
        for part in "QKV":
            # of grouped heads those with an underscore are what is computed with
            weight, bias = (
                getattr(attention, f"_{name}_{part}", None) if grouped else None for name in "Wb"
            )
            weight = getattr(attention, f"W_{part}", None) if weight is None else weight
            bias = getattr(attention, f"b_{part}", None) if bias is None else bias
            point = child_named(attention, (f"hook_{part.lower()}",))
            if (
                point is None
                or not isinstance(weight, torch.Tensor)
                or not weight.is_floating_point()
                or weight.dim() != 3
            ):
                raise self.refusal(f"attention of block {block.index} has no W_{part} to read")
            bias = bias.detach() if isinstance(bias, torch.Tensor) else None
            found.append(Projection(part.lower(), point, weight.detach(), bias, None))
        q, k, v = found
        return q, k, v

    @contextmanager
    def whole(self) -> Iterator[None]:
        cfg: Any = self.model.cfg
        before = {name: getattr(cfg, name) for name in SPLIT if getattr(cfg, name, False)}
        try:
            for name in before:
                setattr(cfg, name, False)
            yield
        finally:
            for name in before:
                setattr(cfg, name, True)

    def last_products(self, block: Block) -> list[Product]:
        mlp = block.mlp
        read = None if mlp is None else child_named(mlp, ("hook_post",))
        weight, bias = (getattr(mlp, name, None) for name in ("W_out", "b_out"))
        if read is None or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            return []
        return [Product(Tap(read), weight.detach(), bias)]

    def logits(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        others = sorted(inputs.keys() - set(INPUTS))
        if others or "input_ids" not in inputs:
            raise ValueError(
                f"{self.where}: inputs must be input_ids, and attention_mask where rows are "
                f"padded, for {type(self.model).__name__}, got {sorted(inputs)}; leave out what it "
                f"does not take"
            )
        with eager():
            mask = inputs.get("attention_mask")
            logits = self.model(inputs["input_ids"], return_type="logits", attention_mask=mask)
        if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
            raise ValueError(
                f"{self.where}: model must return logits [B, P, V], got {type(logits).__name__} "
                f"from {type(self.model).__name__}"
            )
        return logits


def _attention(block: torch.nn.Module) -> tuple[torch.nn.Module, Tap] | None:
    """What in it holds W_O, and where that shows z."""
    attention = child_named(block, ("attn",))
    z = None if attention is None else child_named(attention, ("hook_z",))
    if attention is None or z is None or not is_hook_point(z):
        return None
    return (
        (attention, Tap(z)) if isinstance(getattr(attention, "W_O", None), torch.Tensor) else None
    )


def _blocks(model: torch.nn.Module) -> torch.nn.ModuleList:
    blocks = getattr(model, "blocks", None)
    return blocks if isinstance(blocks, torch.nn.ModuleList) else torch.nn.ModuleList()


def is_lens(model: torch.nn.Module) -> bool:
    """Whether a model is made of such blocks."""
    return any(_attention(block) is not None for block in _blocks(model))


def bridged(model: torch.nn.Module) -> torch.nn.Module | None:
    """The Hugging Face model inside of a TransformerBridge, None for other models."""
    inner = getattr(model, "original_model", None)
    return inner if isinstance(inner, torch.nn.Module) and len(_blocks(model)) else None


def find(model: torch.nn.Module, where: str, fix: str) -> Lens:
    """The model's parts.

    Raises:
        ValueError: for another model, with what is missing.
    """
    layers, cfg = _blocks(model), getattr(model, "cfg", None)
    n, d = (getattr(cfg, name, None) for name in ("n_layers", "d_model"))
    if n != len(layers) or not isinstance(d, int):
        reason = f"{len(layers)} blocks, where cfg.n_layers is {n} and cfg.d_model {d}"
        raise refusal(model, where, reason, fix)
    blocks = []
    for index, module in enumerate(layers):
        if (found := _attention(module)) is None:
            children = [name for name, _ in module.named_children()]
            reason = f"block {index} ({type(module).__name__}) has {children}"
            raise refusal(model, where, reason, fix)
        (attention, z), mlp = found, child_named(module, ("mlp",))
        norms, parallel = norms_in(module, d), bool(getattr(cfg, "parallel_attn_mlp", False))
        blocks.append(Block(index, module, attention, z, attention, mlp, mlp, norms, parallel))
    ends = (child_named(model, ("embed",)), child_named(model, ("unembed",)))
    return Lens.of(model, where, fix, d, layers, blocks, ends)
