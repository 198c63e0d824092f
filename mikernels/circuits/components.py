# SPDX-License-Identifier: Apache-2.0
"""The components of a decoder and the gradient of a logit at each: `L3.attn`, `L3.h7`, `L3.mlp`.

A component writes into the residual stream, so all gradients are `[B, P, d]` in one basis. For an
attention block and an MLP it is the gradient at the output, g. At a head's own residual write that
gradient would be g again, the same for all heads of a layer; at z, the head's input to the output
projection, `g_z = g W_O^T` differs from head to head but is in a basis of that head. Hence

    g_z W_O,   [B, P, dh] times [dh, d]

the move of the residual stream when z goes up its gradient: the part of g that the head can write.

One forward and one backward pass (`mikernels.circuits.passes`), `[B, P, d]` a component.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mikernels.circuits.passes import backward
from mikernels.circuits.targets import Target, read_target, vocabulary
from mikernels.models.decoder import find_decoder
from mikernels.models.hooks import original
from mikernels.models.padding import with_positions

NAME = "gradient_components"
FIX = "collect its gradients with hooks of your own for compute_gradient_interactions"


def split_heads(name: str, heads: torch.Tensor) -> dict[str, torch.Tensor]:
    """A component of several heads `[..., H, D]` as H components `name.h0`, `name.h1`, ... (views).

    Raises:
        ValueError: for fewer than two dimensions.
    """
    if heads.dim() < 2:
        raise ValueError(f"split_heads: {name} must be [..., H, D], got {list(heads.shape)}")
    return {f"{name}.h{h}": part for h, part in enumerate(heads.unbind(-2))}


def gradient_components(
    model: torch.nn.Module,
    inputs: torch.Tensor | Mapping[str, Any],
    target: Target | None = None,
    *,
    heads: bool = False,
    attribution: bool = False,
    tokenizer: Any = None,
) -> dict[str, torch.Tensor]:
    """The gradient of a logit at every attention block and MLP of a decoder, or at every head.

    The logit is that of the target token, or what else the target asks for, at the last position
    that the attention mask keeps; the rows of a batch are independent, and padding, before or
    after, changes nothing: positions are counted from the first token (unless position_ids are
    given), and at padding the result is 0.

    Args:
        model: a Hugging Face causal language model (Llama, Qwen, Mixtral, GPT-2, GPT-NeoX, OPT,
            ... style) in eval mode, or a HookedTransformer, with blocks that add attention and MLP
            to the residual stream as they are; or normed (Gemma 2 and 3, OLMo 2), and then the
            norm's output is the component.
        inputs: token ids `[B, P]`, or what the tokeniser returned (keywords of the model), with an
            attention_mask of 1 for tokens and 0 for padding where there is any.
        target: a token id or `[B]` of them, a pair (a, b) for a logit difference, a set, a
            callable, ... (`mikernels.circuits.targets`); None: the token the model predicts.
        heads: the heads of each layer in place of the attention block, which is their sum: an
            interaction of the whole with its part would say nothing.
        attribution: gradient times activation, elementwise: `g * output`, and for a head
            `g * (z W_O)`. Summed over positions and d: what the component adds to the logit, to
            first order. Heads add up to the attention block less its bias.
        tokenizer: for targets that are texts.

    Returns:
        Name -> `[B, P, d]` in the dtype of the model, in the order of the model: `L0.attn` (or
        `L0.h0`, `L0.h1`, ...), `L0.mlp`, `L1.attn`, ...

    Raises:
        TypeError, ValueError: for a model that is not recognised, with the place and the numbers
            where its arithmetic is another (see `mikernels.models.watch`); for heads where a norm
            follows attention; for one in training mode; for other inputs or targets; for logits or
            activations that are not finite. Hooks are removed and `requires_grad` is restored in
            any case.
    """
    model = original(model)
    decoder = find_decoder(model, NAME, FIX)
    decoder.check_eval()
    given = {"input_ids": inputs} if isinstance(inputs, torch.Tensor) else inputs
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{NAME}: inputs must be a tensor of token ids or a mapping with input_ids, got "
            f"{type(inputs).__name__}"
        )
    ids = given.get("input_ids")
    if isinstance(ids, torch.Tensor) and (ids.dim() != 2 or ids.numel() == 0):
        raise ValueError(f"{NAME}: input_ids must be [B, P], not empty, got {list(ids.shape)}")
    given, kept = with_positions(NAME, model, given, decoder.counts_positions)
    content = given.get("inputs_embeds") if ids is None else ids
    rows = len(content) if isinstance(content, torch.Tensor) else 0
    behavior = read_target(NAME, target, rows, vocabulary(decoder), tokenizer)
    w_o = [decoder.w_o(block) for block in decoder.blocks] if heads else []
    at = "z" if heads and not attribution else "attn"
    done = backward(decoder, given, kept, behavior, (at, "mlp"), w_o)
    for block, flow in zip(decoder.blocks, done.flows, strict=True) if heads else ():
        if flow.attention_writer is not block.attention:
            name = next(n for n, m in block.norms.items() if m is flow.attention_writer)
            raise decoder.refusal(
                f"block {block.index} adds what {name} makes of the sum of its heads, so that no "
                f"head writes by itself",
                "ask for heads=False, or ",
            )
    found: dict[str, torch.Tensor] = {}
    for layer, (site, grads) in enumerate(zip(done.sites, done.grads, strict=True)):
        g, shape = grads[at], site["x"].shape
        if heads:
            z = (site["z"].detach() if attribution else g).reshape(
                *shape[:2], *w_o[layer].shape[:2]
            )
            written = torch.einsum("bphe,hed->bphd", z, w_o[layer])
            found |= split_heads(f"L{layer}", written * g[:, :, None] if attribution else written)
        else:
            found[f"L{layer}.attn"] = g * site["attn"].detach() if attribution else g
        if "mlp" in site:
            g = grads["mlp"]
            found[f"L{layer}.mlp"] = (g * site["mlp"].detach() if attribution else g).reshape(shape)
    if kept is None:
        return found
    return {name: part.where(kept.to(part.device)[..., None], 0) for name, part in found.items()}
