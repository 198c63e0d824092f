# SPDX-License-Identifier: Apache-2.0
"""The components of a decoder and the gradient of a logit at each: `L3.attn`, `L3.h7`, `L3.mlp`.

A component writes into the residual stream, so all gradients are `[B, P, d]` in one basis. For an
attention block and an MLP it is the gradient at the output, g. At a head's own residual write that
gradient would be g again, the same for all heads of a layer; at z, the head's input to the output
projection, `g_z = g W_O^T` differs from head to head but is in a basis of that head. Hence

    g_z W_O,   [B, P, dh] times [dh, d]

the move of the residual stream when z goes up its gradient: the part of g that the head can write.

One forward and one backward pass, `[B, P, d]` a component. Parameters are frozen meanwhile, so that
no weight gradient is computed, and nothing is left in any `.grad`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from mikernels.models.decoder import find_decoder
from mikernels.models.hooks import original
from mikernels.models.padding import with_positions
from mikernels.models.parts import Decoder
from mikernels.models.watch import Watch

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


def _last(kept: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    """`[B, V]` logits at the last position that is not padding."""
    if kept is None:
        return logits[:, -1]
    last = kept.shape[1] - 1 - kept.int().flip(-1).argmax(-1)
    return logits[torch.arange(len(last), device=logits.device), last.to(logits.device)]


def _target(target: int | torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    """`[B]` token ids."""
    if not (finite := logits.isfinite().all(-1)).all():
        raise ValueError(
            f"{NAME}: model must return finite logits, got NaN or inf in row "
            f"{int(finite.int().argmin())}; mend its weights, or load it in a wider dtype"
        )
    if target is None:
        return logits.argmax(-1)
    ids = torch.as_tensor(target, device=logits.device)
    if (
        ids.is_floating_point()
        or ids.dtype == torch.bool
        or ids.shape not in ((), logits.shape[:1])
    ):
        raise ValueError(
            f"{NAME}: target must be a token id or [{len(logits)}] of them, got {ids.dtype} "
            f"{list(ids.shape)}"
        )
    if ((ids < 0) | (ids >= logits.shape[1])).any():
        raise ValueError(
            f"{NAME}: target must be in 0..{logits.shape[1] - 1} (vocabulary), got {ids.tolist()}"
        )
    return ids.to(torch.int64).expand(len(logits))


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def _gradients(
    decoder: Decoder, score: torch.Tensor, wanted: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Of the score at each; a ValueError names the first that it does not depend on."""
    cut = [name for name, tensor in wanted.items() if not tensor.requires_grad]
    found: tuple[torch.Tensor | None, ...] = ()
    if not cut and score.requires_grad:
        found = torch.autograd.grad(score, list(wanted.values()), allow_unused=True)
        cut = [name for name, g in zip(wanted, found, strict=True) if g is None]
    grads = [g for g in found if g is not None]
    if len(grads) < len(wanted):
        place = cut[0] if cut else "the logits"
        raise decoder.refusal(f"no gradient reaches {place}: something detaches it")
    return grads


def gradient_components(
    model: torch.nn.Module,
    inputs: torch.Tensor | Mapping[str, Any],
    target: int | torch.Tensor | None = None,
    *,
    heads: bool = False,
    attribution: bool = False,
) -> dict[str, torch.Tensor]:
    """The gradient of a logit at every attention block and MLP of a decoder, or at every head.

    The logit is that of the target token at the last position that the attention mask keeps; the
    rows of a batch are independent, and padding, before or after, changes nothing: positions are
    counted from the first token (unless position_ids are given), and at padding the result is 0.

    Args:
        model: a Hugging Face causal language model (Llama, Qwen, Mixtral, GPT-2, GPT-NeoX, OPT,
            ... style) in eval mode, or a HookedTransformer, with blocks that add attention and MLP
            to the residual stream as they are; or normed (Gemma 2 and 3, OLMo 2), and then the
            norm's output is the component.
        inputs: token ids `[B, P]`, or what the tokeniser returned (keywords of the model), with an
            attention_mask of 1 for tokens and 0 for padding where there is any.
        target: a token id, `[B]` of them, or None: the one the model predicts.
        heads: the heads of each layer in place of the attention block, which is their sum: an
            interaction of the whole with its part would say nothing.
        attribution: gradient times activation, elementwise: `g * output`, and for a head
            `g * (z W_O)`. Summed over positions and d: what the component adds to the logit, to
            first order. Heads add up to the attention block less its bias.

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
    w_o = [decoder.w_o(block) for block in decoder.blocks] if heads else []
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        # switches gradients on, also within the caller's no_grad
        stack.enter_context(torch.inference_mode(False))
        watch = Watch(decoder, kept, w_o, stack)
        logits = _last(kept, decoder.logits(given))
        watch.check()
        for block, flow in zip(decoder.blocks, watch.flows, strict=True) if heads else ():
            if flow.attention_writer is not block.attention:
                name = next(n for n, m in block.norms.items() if m is flow.attention_writer)
                raise decoder.refusal(
                    f"block {block.index} adds what {name} makes of the sum of its heads, so that "
                    f"no head writes by itself",
                    "ask for heads=False, or ",
                )
        score = logits.gather(1, _target(target, logits.detach())[:, None]).sum()
        sites = watch.sites
        at = "z" if heads and not attribution else "attn"
        wanted = {
            f"L{i}.{name}": site[name]
            for i, site in enumerate(sites)
            for name in (at, "mlp")
            if name in site
        }
        grads = dict(zip(wanted, _gradients(decoder, score, wanted), strict=True))
    found: dict[str, torch.Tensor] = {}
    for layer, site in enumerate(sites):
        g, shape = grads[f"L{layer}.{at}"], site["x"].shape
        if heads:
            z = (site["z"].detach() if attribution else g).reshape(
                *shape[:2], *w_o[layer].shape[:2]
            )
            written = torch.einsum("bphe,hed->bphd", z, w_o[layer])
            found |= split_heads(f"L{layer}", written * g[:, :, None] if attribution else written)
        else:
            found[f"L{layer}.attn"] = g * site["attn"].detach() if attribution else g
        if "mlp" in site:
            g = grads[f"L{layer}.mlp"]
            found[f"L{layer}.mlp"] = (g * site["mlp"].detach() if attribution else g).reshape(shape)
    if kept is None:
        return found
    return {name: part.where(kept.to(part.device)[..., None], 0) for name, part in found.items()}
