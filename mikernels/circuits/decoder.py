# SPDX-License-Identifier: Apache-2.0
"""Where a Hugging Face decoder writes into its residual stream, and hooks that record it.

A model is recognised by structure, then by arithmetic: while it runs, every block must return its
input plus what its attention and its MLP returned, within rounding. Models with a norm or a factor
on the way to the residual stream (Gemma 2, OLMo 2, Granite) do not, and are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from mikernels._dispatch import accumulate_dtype

NAME = "gradient_components"
ATTENTION = ("self_attn", "attn", "attention")
PROJECTION = ("o_proj", "c_proj", "out_proj", "dense")


class Block(NamedTuple):
    block: torch.nn.Module
    attention: torch.nn.Module
    projection: torch.nn.Module
    mlp: torch.nn.Module


def unrecognised(model: object, reason: str) -> ValueError:
    return ValueError(
        f"{NAME}: model must be a Hugging Face decoder (Llama, GPT-2, ...) of blocks with "
        f"attention ({', '.join(ATTENTION)}) that ends in a projection ({', '.join(PROJECTION)}) "
        f"and an mlp, both added to the residual stream as they are, got "
        f"{type(model).__name__}: {reason}; "
        f"collect its gradients with hooks of your own for compute_gradient_interactions"
    )


def _child(module: torch.nn.Module, names: tuple[str, ...]) -> torch.nn.Module | None:
    found = (getattr(module, name, None) for name in names)
    return next((child for child in found if isinstance(child, torch.nn.Module)), None)


def decoder_blocks(model: torch.nn.Module) -> list[Block]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{NAME}: model must be a torch.nn.Module, got {type(model).__name__}")
    n_layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    layers = next((m for m in lists if len(m) == n_layers), None)
    if not layers:
        raise unrecognised(model, f"no ModuleList of config.num_hidden_layers ({n_layers}) blocks")
    if model.training:
        raise ValueError(
            f"{NAME}: model must be in eval mode, got training mode, in which dropout makes "
            f"gradients random; call model.eval()"
        )
    blocks = []
    for layer, block in enumerate(layers):
        attention, mlp = _child(block, ATTENTION), _child(block, ("mlp",))
        projection = None if attention is None else _child(attention, PROJECTION)
        if attention is None or projection is None or mlp is None:
            children = [name for name, _ in block.named_children()]
            raise unrecognised(model, f"block {layer} ({type(block).__name__}) has {children}")
        blocks.append(Block(block, attention, projection, mlp))
    modules = [module for parts in blocks for module in parts]
    if len(set(modules)) < len(modules):
        raise unrecognised(model, "blocks share modules, which hooks cannot tell apart")
    return blocks


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def watch(model: torch.nn.Module, layer: int, parts: Block, stack: ExitStack) -> dict[str, Any]:
    """Hooks that fill the returned dictionary in the next forward pass and check what they see."""
    site: dict[str, Any] = {}

    def enter(module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        # with all parameters frozen, this is where the graph begins
        site["x"] = x = x.detach().requires_grad_() if layer == 0 else x
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def project(module, args, output):
        site["z"], site["projected"] = args[0], output

    def attend(module, args, output):
        site["attn"] = _first(output)

    def feed(module, args, output):
        site["mlp"] = _first(output)

    def leave(module, args, output):
        if not site.keys() >= {"attn", "z", "mlp"}:
            raise unrecognised(model, f"block {layer} runs only {sorted(site)}")
        x, attn, mlp, y = (
            t.detach().to(accumulate_dtype(t.dtype))
            for t in (site["x"], site["attn"], site["mlp"], _first(output))
        )
        # two sums rounded in the model and two here: an eps of the terms at most, each
        limit = 4 * torch.finfo(site["attn"].dtype).eps * sum(t.norm() for t in (x, attn, mlp))
        if (y - (x + attn + mlp)).norm() > limit:
            raise unrecognised(model, f"block {layer} does not return input + attention + mlp")
        projected = site["projected"]
        if projected.shape != attn.shape or (projected.detach() - attn).norm() > 0:
            raise unrecognised(model, f"block {layer} changes what its projection returns")

    stack.callback(parts.block.register_forward_pre_hook(enter, with_kwargs=True).remove)
    hooks = (
        (parts.projection, project),
        (parts.attention, attend),
        (parts.mlp, feed),
        (parts.block, leave),
    )
    for module, hook in hooks:
        stack.callback(module.register_forward_hook(hook).remove)
    return site


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def head_matrices(model: torch.nn.Module, layer: int, parts: Block) -> torch.Tensor:
    """W_O as `[H, dh, d]`."""
    heads = getattr(model.config, "num_attention_heads", None)
    projection = parts.projection
    weight = getattr(projection, "weight", None)
    # transformers' Conv1D, of GPT-2, stores [in, out]
    transposed = type(projection).__name__ == "Conv1D"
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        raise unrecognised(model, f"the projection of block {layer} is {projection}")
    if not transposed and not isinstance(projection, torch.nn.Linear):
        raise unrecognised(model, f"the projection of block {layer} is {projection}")
    w_o = weight.detach() if transposed else weight.detach().T
    if not isinstance(heads, int) or w_o.shape[0] % heads:
        raise unrecognised(model, f"{heads} heads (config.num_attention_heads) at {projection}")
    return w_o.unflatten(0, (heads, -1))
