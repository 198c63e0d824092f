# SPDX-License-Identifier: Apache-2.0
"""How a decoder writes into its residual stream: hooks that record one forward pass.

What structure suggests (`mikernels.models.decoder`) is checked by arithmetic, number by number on
the batch at hand:

- every block returns its input plus what its attention and its MLP wrote, within rounding. A part
  writes what it returns, or, where a norm of the block reads that (Gemma 2, OLMo 2), what the norm
  returns;
- an MLP reads what its block got, with what attention wrote or (parallel) without, where the model
  says which;
- the next block, and after the last the module that reads the stream (the final norm), gets that;
- attention returns what its projection returned, bit for bit;
- for heads, the projection returned `z W_O + b`, within rounding.

So models with a factor on the way to the residual stream (Granite) or a norm on the stream itself
(OPT-350m) are refused, as are hooks, adapters, subclasses and quantised or sharded layers that
compute something else. Cost: some 20 reads of `[B, P, d]` a layer, 2 % of GPT-2's forward and
backward pass (4 x 64 tokens, a core of Zen 4), and for heads one more product with W_O; a GPU is
read back once.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.models.claims import Claims, product_limit
from mikernels.models.hooks import NEVER, returned
from mikernels.models.parts import Block, Decoder


@dataclass
class Flow:
    """What one block did in the pass.

    Attributes:
        attention_norm, mlp_norm: whose output the part read, None for the stream itself; one norm
            may serve both.
        attention_writer, mlp_writer: whose output was added to the stream: the part, or a norm;
            None for the MLP of a block without.
        parallel: whether the MLP read the block's input, without what attention wrote.
    """

    attention_norm: torch.nn.Module | None
    mlp_norm: torch.nn.Module | None
    attention_writer: torch.nn.Module
    mlp_writer: torch.nn.Module | None
    parallel: bool = False


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]


class Seen:
    """A tensor as a hook saw it: what changes it in place afterwards changes every reference."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self._version = tensor, tensor._version

    def read(self, decoder: Decoder, claim: str) -> torch.Tensor:
        """The tensor, unchanged; ValueError else."""
        if self.tensor._version != self._version:
            raise decoder.refusal(f"{claim}: got it changed in place")
        return self.tensor


class Watch:
    """Hooks that record one forward pass, and claims about what they see.

    Args:
        decoder: of find_decoder.
        kept: the positions `[B, P]` at which claims are made, None for all.
        w_o: of `decoder.w_o` for each block, or none.
        stack: removes the hooks.

    Attributes:
        sites: for each block "x", its input; "attn" and "mlp", what they write; "z" and
            "projected", input and output of the projection. `[B, P, d]`, or `[B P, d]` where the
            model computes so; z as `Block.z` says. A block without an MLP has no "mlp".
        flows: for each block how they were connected.
        reader: the module that read the stream after the last block, None without any.
    """

    def __init__(
        self,
        decoder: Decoder,
        kept: torch.Tensor | None,
        w_o: list[torch.Tensor],
        stack: ExitStack,
    ):
        self.sites: list[dict[str, torch.Tensor]] = [{} for _ in decoder.blocks]
        self.flows = [Flow(None, None, b.attention, b.mlp) for b in decoder.blocks]
        self.reader: torch.nn.Module | None = None
        self._decoder, self._w_o, self._stack = decoder, w_o, stack
        self._claims = Claims(kept)
        # what the last block that ran returned, until somebody reads it
        self._stream: Seen | None = None
        for block in decoder.blocks:
            self._hook(block)
        for module in decoder.beside:
            hook = module.register_forward_pre_hook(self._read, with_kwargs=True)
            stack.callback(hook.remove)

    def _hook(self, block: Block) -> None:
        layer, site, flow = block.index, self.sites[block.index], self.flows[block.index]
        claims, refusal = self._claims, self._decoder.refusal
        # until the block returns: (norm, what it read, what it made), and what the parts returned
        normed: list[tuple[torch.nn.Module, torch.Tensor, torch.Tensor]] = []
        raw: dict[str, torch.Tensor] = {}
        seen: list[Seen] = []

        def keep(name: str, tensor: Any) -> None:
            if name in site:
                raise refusal(f"block {layer} runs its {name} more than once")
            site[name] = tensor

        def enter(module, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            if layer == 0:
                # with all parameters frozen, this is where the graph begins
                x = x.detach().requires_grad_()
            elif self._stream is None:
                raise refusal(f"block {layer} does not follow block {layer - 1}")
            else:
                claim = f"block {layer} must get what block {layer - 1} returned"
                claims.equal(claim, x, self._stream.read(self._decoder, claim))
            keep("x", x)
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        def source(args, kwargs) -> tuple[torch.nn.Module | None, torch.Tensor | None]:
            """The norm that made an input, and what it read; else None and the input."""
            given = _tensors(args, kwargs)
            for norm, read, made in reversed(normed):
                if any(x is made for x in given):
                    return norm, read
            return None, given[0] if given else None

        def before_attention(module, args, kwargs):
            flow.attention_norm = source(args, kwargs)[0]

        def before_mlp(module, args, kwargs):
            flow.mlp_norm, read = source(args, kwargs)
            flow.parallel = read is not None and read is site.get("x")
            if block.parallel is None or read is None:
                return
            # what it reads may be a copy, which no identity tells
            flow.parallel = block.parallel
            alone = "its input" if block.parallel else "input + attention"
            terms = [site["x"]] if block.parallel else [site["x"], site["attn"]]
            claims.sums(f"the MLP of block {layer} must read {alone}", read.detach(), terms)

        def norm(module, args, kwargs, output):
            read = _tensors(args, kwargs)[0]
            # a norm that adds what it reads to the stream returns both, and writes nothing
            alone = isinstance(output, torch.Tensor)
            for part, writer in (("attn", "attention_writer"), ("mlp", "mlp_writer")):
                if alone and read is raw.get(part):
                    site[part] = output
                    setattr(flow, writer, module)
                    return
            normed.append((module, read, returned(output)))

        def project(module, args, output):
            output = returned(output)
            keep("projected", output)
            seen.append(Seen(output))
            if self._w_o and "z" in site:
                w = self._w_o[layer].flatten(0, 1)
                bias = self._decoder.b_o(block)
                z = site["z"].flatten(-2) if site["z"].dim() == 4 else site["z"]
                if z.shape[-1] != len(w) or output.shape[-1] != w.shape[1]:
                    reason = f"{list(z.shape)} times W_O {list(w.shape)} is {list(output.shape)}"
                    raise refusal(f"in block {layer} {reason}")
                acc = accumulate_dtype(w.dtype)
                z = z.detach().to(w.device)
                expected = z.to(acc) @ w.to(acc)
                expected = expected if bias is None else expected + bias.detach()
                rounded = self._decoder.rounds_products(block)
                limit = product_limit(z, w, bias, output.detach(), rounded)
                claim = f"the projection of block {layer} must return z W_O + b"
                claims.equal(f"{claim} ({type(module).__name__})", output, expected, limit)

        def attend(module, args, output):
            keep("attn", returned(output))
            raw["attn"] = site["attn"]

        def feed(module, args, output):
            keep("mlp", returned(output))
            raw["mlp"] = site["mlp"]

        def leave(module, args, output):
            if not site.keys() >= {"z", *block.writes}:
                raise refusal(f"in block {layer} hooks fire only on {sorted(site)}; {NEVER}")
            y = returned(output).detach()
            parts = " + ".join({"attn": "attention"}.get(n, n) for n in block.writes)
            claim = f"block {layer} must return input + {parts}"
            claims.sums(claim, y, [site[n] for n in ("x", *block.writes)])
            claim = f"attention of block {layer} must return what its projection does"
            projected, attended = seen.pop().read(self._decoder, claim), raw["attn"]
            if projected.shape != attended.shape:
                shapes = f"{list(attended.shape)} for {list(projected.shape)}"
                raise refusal(f"{claim}: got {shapes}")
            claims.equal(claim, attended, projected)
            self._stream = Seen(y)
            normed.clear()
            raw.clear()

        add = self._stack.callback
        add(block.module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        add(block.z.hook(lambda z: keep("z", z)))
        add(block.projection.register_forward_hook(project).remove)
        read = block.attention.register_forward_pre_hook(before_attention, with_kwargs=True)
        add(read.remove)
        add(block.attention.register_forward_hook(attend).remove)
        if block.mlp is not None and block.mlp_reader is not None:
            add(block.mlp_reader.register_forward_pre_hook(before_mlp, with_kwargs=True).remove)
            add(block.mlp.register_forward_hook(feed).remove)
        for part in block.norms.values():
            add(part.register_forward_hook(norm, with_kwargs=True).remove)
        add(block.module.register_forward_hook(leave).remove)

    def _ran(self, layer: int) -> bool:
        return self._decoder.blocks[layer].writes[-1] in self.sites[layer]

    def _read(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._ran(len(self.sites) - 1) and self._stream is not None:
            x = args[0] if args else next(iter(kwargs.values()))
            claim = f"{type(module).__name__} must get what the last block returned"
            self._claims.equal(claim, x, self._stream.read(self._decoder, claim))
            self._stream, self.reader = None, module

    def check(self) -> None:
        """After the forward pass, whether all claims hold.

        Raises:
            ValueError: with the place and the numbers.
        """
        refusal = self._decoder.refusal
        for layer, site in enumerate(self.sites):
            if not self._ran(layer):
                raise refusal(f"in block {layer} hooks fire only on {sorted(site)}; {NEVER}")
        fix = "remove or merge what changes it (a hook, an adapter), or "
        self._claims.check(lambda found: refusal(found, fix))
