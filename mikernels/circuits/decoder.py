# SPDX-License-Identifier: Apache-2.0
"""Where a Hugging Face decoder writes into its residual stream, and hooks that record it.

A model is recognised by structure, then by arithmetic, number by number on the batch at hand:

- every block returns its input plus what its attention and its MLP returned, within rounding;
- the next block, and after the last the module that reads the stream (the final norm), gets that;
- attention returns what its projection returned, bit for bit;
- for heads, the projection returned `z W_O + b`, within rounding.

So models with a norm or a factor on the way to the residual stream (Gemma 2, OLMo 2, Granite) are
refused, as are hooks, adapters, subclasses and quantised or sharded layers that compute something
else. Cost: some 20 reads of `[B, P, d]` a layer, 2 % of GPT-2's forward and backward pass (4 x 64
tokens, a core of Zen 4), and for heads one more product with W_O; a GPU is read back once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.circuits.claims import Claims, product_limit, sum_limit
from mikernels.models.hooks import NEVER, check_fires

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


def _drops(module: torch.nn.Module) -> bool:
    """Whether it is in training mode and drops numbers in it."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return module.training and module.p > 0
    rates = (value for name, value in vars(module).items() if "dropout" in name)
    return module.training and any(isinstance(rate, float) and rate > 0 for rate in rates)


def decoder_blocks(model: torch.nn.Module) -> list[Block]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{NAME}: model must be a torch.nn.Module, got {type(model).__name__}")
    n_layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    layers = next((m for m in lists if len(m) == n_layers), None)
    if not layers:
        raise unrecognised(model, f"no ModuleList of config.num_hidden_layers ({n_layers}) blocks")
    if model.training or any(map(_drops, model.modules())):
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
    check_fires(NAME, model, modules)
    return blocks


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple | list) else output


class Seen:
    """A tensor as a hook saw it: what changes it in place afterwards changes every reference."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self._version = tensor, tensor._version

    def read(self, model: torch.nn.Module, claim: str) -> torch.Tensor:
        """The tensor, unchanged; ValueError else."""
        if self.tensor._version != self._version:
            raise unrecognised(model, f"{claim}: got it changed in place")
        return self.tensor


class Watch:
    """Hooks that record one forward pass, and claims about what they see.

    Args:
        model, blocks: of decoder_blocks.
        kept: the positions `[B, P]` at which claims are made, None for all.
        w_o: of head_matrices for each block, or none.
        stack: removes the hooks.

    Attributes:
        sites: for each block "attn", "mlp", and "z", the input of the projection.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        blocks: list[Block],
        kept: torch.Tensor | None,
        w_o: list[torch.Tensor],
        stack: ExitStack,
    ):
        self.sites: list[dict[str, torch.Tensor]] = [{} for _ in blocks]
        self._model, self._blocks = model, blocks
        self._w_o, self._stack = w_o, stack
        self._claims = Claims(kept)
        # what the last block that ran returned, until somebody reads it
        self._stream: Seen | None = None
        for layer in range(len(blocks)):
            self._hook(layer)
        parent = next(m for m in model.modules() if blocks[0].block in _listed(m))
        for reader in parent.children():
            if blocks[0].block not in reader.modules():
                hook = reader.register_forward_pre_hook(self._read, with_kwargs=True)
                stack.callback(hook.remove)

    def _hook(self, layer: int) -> None:
        parts, site = self._blocks[layer], self.sites[layer]
        claims = self._claims
        projected: list[Seen] = []

        def keep(name: str, tensor: Any) -> None:
            if name in site:
                raise unrecognised(self._model, f"block {layer} runs its {name} more than once")
            site[name] = tensor

        def enter(module, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            if layer == 0:
                # with all parameters frozen, this is where the graph begins
                x = x.detach().requires_grad_()
            elif self._stream is None:
                raise unrecognised(self._model, f"block {layer} does not follow block {layer - 1}")
            else:
                claim = f"block {layer} must get what block {layer - 1} returned"
                claims.equal(claim, x, self._stream.read(self._model, claim))
            keep("x", x)
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        def project(module, args, kwargs, output):
            z = args[0] if args else next(iter(kwargs.values()))
            keep("z", z)
            projected.append(Seen(output))
            if self._w_o:
                w = self._w_o[layer].flatten(0, 1)
                bias = getattr(module, "bias", None)
                if z.shape[-1] != len(w) or output.shape[-1] != w.shape[1]:
                    reason = f"{list(z.shape)} times W_O {list(w.shape)} is {list(output.shape)}"
                    raise unrecognised(self._model, f"in block {layer} {reason}")
                acc = accumulate_dtype(w.dtype)
                z = z.detach().to(w.device)
                expected = z.to(acc) @ w.to(acc)
                expected = expected if bias is None else expected + bias.detach()
                limit = product_limit(z, w, bias, output.detach())
                claim = f"the projection of block {layer} must return z W_O + b"
                claims.equal(f"{claim} ({type(module).__name__})", output, expected, limit)

        def attend(module, args, output):
            keep("attn", _first(output))

        def feed(module, args, output):
            keep("mlp", _first(output))

        def leave(module, args, output):
            if not site.keys() >= {"attn", "z", "mlp"}:
                raise unrecognised(
                    self._model, f"in block {layer} hooks fire only on {sorted(site)}; {NEVER}"
                )
            y = _first(output).detach()
            parts = [site[name].detach().to(y.device) for name in ("x", "attn", "mlp")]
            x, attn, mlp = (t.to(accumulate_dtype(t.dtype)) for t in parts)
            claim = f"block {layer} must return input + attention + mlp"
            claims.equal(claim, y, x + attn + mlp, sum_limit(parts, y))
            claim = f"attention of block {layer} must return what its projection does"
            written = projected.pop().read(self._model, claim)
            if written.shape != site["attn"].shape:
                shapes = f"{list(site['attn'].shape)} for {list(written.shape)}"
                raise unrecognised(self._model, f"{claim}: got {shapes}")
            claims.equal(claim, site["attn"], written)
            self._stream = Seen(y)

        add = self._stack.callback
        add(parts.block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        add(parts.projection.register_forward_hook(project, with_kwargs=True).remove)
        add(parts.attention.register_forward_hook(attend).remove)
        add(parts.mlp.register_forward_hook(feed).remove)
        add(parts.block.register_forward_hook(leave).remove)

    def _read(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "mlp" in self.sites[-1] and self._stream is not None:
            x = args[0] if args else next(iter(kwargs.values()))
            claim = f"{type(module).__name__} must get what the last block returned"
            self._claims.equal(claim, x, self._stream.read(self._model, claim))
            self._stream = None

    def check(self) -> None:
        """After the forward pass, whether all claims hold.

        Raises:
            ValueError: with the place and the numbers.
        """
        for layer, site in enumerate(self.sites):
            if "mlp" not in site:
                raise unrecognised(
                    self._model, f"in block {layer} hooks fire only on {sorted(site)}; {NEVER}"
                )
        fix = "remove or merge what changes it (a hook, an adapter), or"
        self._claims.check(lambda found: unrecognised(self._model, f"{found}; {fix}"))


def _listed(module: torch.nn.Module) -> list[torch.nn.Module]:
    lists = (child for child in module.children() if isinstance(child, torch.nn.ModuleList))
    return [part for child in lists for part in child]


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


def _head_size(model: torch.nn.Module, attention: torch.nn.Module, heads: int) -> int | None:
    """What the model says, of a head's z."""
    for owner, name in (
        (attention, "v_head_dim"), (attention, "head_dim"), (attention, "head_size"),
        (model.config, "head_dim"),
    ):  # fmt: skip
        size = getattr(owner, name, None)
        if isinstance(size, int):
            return size
    width = getattr(model.config, "hidden_size", None)
    return width // heads if isinstance(width, int) else None


def head_matrices(model: torch.nn.Module, layer: int, parts: Block) -> torch.Tensor:
    """W_O as `[H, dh, d]`."""
    heads: Any = getattr(model.config, "num_attention_heads", None)
    projection = parts.projection
    weight = getattr(projection, "weight", None)
    if (
        not isinstance(weight, torch.Tensor)
        or not weight.is_floating_point()
        or weight.dim() != 2
        or weight.is_meta
    ):
        raise unrecognised(model, f"the projection of block {layer} is {projection}")
    # transformers' Conv1D, of GPT-2, stores [in, out]; what else there is, arithmetic decides
    transposed = any(kind.__name__ == "Conv1D" for kind in type(projection).__mro__)
    w_o = weight.detach() if transposed else weight.detach().T
    known = isinstance(heads, int) and heads > 0
    size = _head_size(model, parts.attention, heads) if known else None
    if not known or size is None or w_o.shape[0] != heads * size:
        raise unrecognised(
            model,
            f"the projection of block {layer} must read {heads} heads (config.num_attention_heads) "
            f"of {size} numbers, got {w_o.shape[0]} in {projection}",
        )
    return w_o.unflatten(0, (heads, size))
