# SPDX-License-Identifier: Apache-2.0
"""How the parts of a decoder read its residual stream: the norm before each, and the products that
make every head's q, k and v.

    q_h = norm(x) W_Q[h] + b_Q[h],    and so for k and v of each head, or group of heads

Names suggest which modules these are and in which order a fused one (GPT-2's `c_attn`, GPT-NeoX's
`query_key_value`) holds its columns. A pass over a few tokens decides, by arithmetic:

- each product is `norm(x) W + b`, within rounding, and each norm is of a known form
  (`mikernels.models.norms`);
- the columns of a head are those on which its result depends. With z_h its result at the last
  token, the gradient of z_h is zero in the columns of other heads, and in those of q at any token
  but the last, where those of k and v are not. A norm over all heads (OLMo 2) may mix the heads of
  q, and of k. Which of a fused module's parts is k and which v is the layout's word.

All that, with what writes into the stream (`mikernels.models.watch`), is a `Wiring`: the model as
the graph of `mikernels.models.graph`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from mikernels.models.claims import Claims, product_limit
from mikernels.models.graph import Graph, Layer
from mikernels.models.hooks import NEVER, frozen, returned
from mikernels.models.norms import Form, form_of, parameters, statistics
from mikernels.models.parts import Block, Decoder, Projection, first_tensor, is_hook_point
from mikernels.models.watch import Flow, Watch

# of the pass that decides: enough for keys and values before the last token
TOKENS = 8


class Norm(NamedTuple):
    """A norm, and what it computes; form None for `gain x`."""

    module: torch.nn.Module
    form: Form | None

    def gain(self, like: torch.Tensor) -> torch.Tensor | None:
        """`[d]`, None for 1."""
        weight, _ = parameters(self.module)
        if weight is None:
            return None
        gain = weight.detach().to(like)
        return gain + self.form.added if self.form is not None and self.form.added else gain

    def back_(self, g: torch.Tensor) -> torch.Tensor:
        """A gradient `[..., d]` of what it returns as that of `(x - mean) / scale`, in place."""
        gain = self.gain(g)
        g = g if gain is None else g.mul_(gain)
        return g.sub_(g.mean(-1, keepdim=True)) if self.centred else g

    def forth_(self, x: torch.Tensor) -> torch.Tensor:
        """What a part of its input `[..., d]`, over the scale, is in what it returns, in place."""
        x = x.sub_(x.mean(-1, keepdim=True)) if self.centred else x
        gain = self.gain(x)
        return x if gain is None else x.mul_(gain)

    @property
    def centred(self) -> bool:
        return self.form is not None and self.form.centred

    def statistics(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`(x - mean) / scale` and `1 / scale` `[..., 1]`, in at least fp32; None without a
        scale."""
        if self.form is None:
            return None
        centred, inverse = statistics(x, self.form)
        # not in place: of an RMS norm it is x
        return centred * inverse, inverse


@dataclass(frozen=True, eq=False)
class Reading:
    """How one block reads the stream and writes to it.

    Attributes:
        block: the parts. flow: how they are connected.
        q, k, v: what attention makes of its input.
        norm: before attention; mlp_norm: before the MLP; perhaps the same. None: the stream itself.
        written: the norm after attention, of what the heads write; None where that is added as it
            is.
    """

    block: Block
    flow: Flow
    q: Projection
    k: Projection
    v: Projection
    norm: Norm | None
    mlp_norm: Norm | None
    written: Norm | None

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.q, self.k, self.v

    def hook(
        self, see: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]
    ) -> Iterator[Callable[[], None]]:
        """Calls `see` with the parts `[B, P, n, dh]` that each module has just made, one or three
        at a time; what it returns takes their place. Yields what ends that."""
        for module in dict.fromkeys(p.module for p in self.projections):
            mine = [p for p in self.projections if p.module is module]

            def change(made: torch.Tensor, mine: Any = mine) -> torch.Tensor | None:
                given = see({p.part: p.of(made, made.shape[:2]) for p in mine})
                if not given:
                    return None
                for p in mine:
                    made = p.put(made, given[p.part])
                return made

            if is_hook_point(module):
                # what it is given: backward rules and others' hooks act on what it returns
                yield module.register_forward_pre_hook(
                    lambda m, args, change=change: change(args[0])
                ).remove
            else:
                yield module.register_forward_hook(
                    lambda m, args, output, change=change: change(output)
                ).remove


@dataclass(frozen=True, eq=False)
class Wiring:
    """A decoder as a graph.

    Attributes:
        decoder: its parts. graph: names and order of writers and readers.
        layers: how each block reads and writes. w_o: of each block, `[H, dh, d]`.
        final: what reads the stream after the last block, the norm before the unembedding mostly.
    """

    decoder: Decoder
    graph: Graph
    layers: tuple[Reading, ...]
    w_o: tuple[torch.Tensor, ...]
    final: torch.nn.Module


class _Probe:
    """What hooks saw of one block in the pass."""

    def __init__(self) -> None:
        self.norms: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self.read: dict[str, torch.Tensor] = {}
        self.made: dict[torch.nn.Module, torch.Tensor] = {}


def _see(probe: _Probe, block: Block, found: list[Projection], stack: ExitStack) -> None:
    def norm(module, args, kwargs, output):  # type: ignore[no-untyped-def]
        probe.norms[module] = first_tensor(args, kwargs), returned(output)

    def read(name, module, args, kwargs):  # type: ignore[no-untyped-def]
        probe.read[name] = first_tensor(args, kwargs)

    def make(module, args, output):  # type: ignore[no-untyped-def]
        probe.made[module] = output

    for module in block.norms.values():
        stack.callback(module.register_forward_hook(norm, with_kwargs=True).remove)
    for name, reader in (("attention", block.attention), ("mlp", block.mlp_reader)):
        if reader is not None:
            hook = reader.register_forward_pre_hook(partial(read, name), with_kwargs=True)
            stack.callback(hook.remove)
    for module in dict.fromkeys(p.module for p in found):
        stack.callback(module.register_forward_hook(make).remove)


def _norm(
    decoder: Decoder, probe: _Probe, part: str, stream: torch.Tensor | None, index: int
) -> Norm | None:
    """The norm whose output a part reads, None for the stream itself."""
    y = probe.read[part]
    # TransformerLens adds 0 to it, so that no identity tells
    made = (m for m, (_, out) in probe.norms.items() if torch.equal(out, y))
    if (module := next(made, None)) is not None:
        return _known(decoder, probe, module)
    if stream is None or not torch.equal(stream.reshape(y.shape), y):
        raise decoder.refusal(f"the {part} of block {index} reads neither the stream nor a norm")
    return None


def _known(decoder: Decoder, probe: _Probe, module: torch.nn.Module) -> Norm:
    x, y = probe.norms[module]

    def refuse(reason: str) -> ValueError:
        return decoder.refusal(f"{type(module).__name__} is no norm of a known form, {reason}")

    return Norm(module, form_of(module, x.detach(), y.detach(), refuse))


def _check_products(decoder: Decoder, block: Block, probe: _Probe, found: list[Projection]) -> None:
    """Each product is that of its weights."""
    y = probe.read.get("attention")
    if not isinstance(y, torch.Tensor) or y.dim() != 3 or y.shape[-1] != decoder.d:
        raise decoder.refusal(f"attention of block {block.index} reads no [B, P, {decoder.d}]")
    claims = Claims(None)
    for p in found:
        out = probe.made.get(p.module)
        if out is None:
            name = type(p.module).__name__
            raise decoder.refusal(f"in block {block.index} {name} made no {p.part}; {NEVER}")
        w = p.weight.movedim(0, 1).flatten(1)
        b = None if p.bias is None else p.bias.flatten()
        got = p.of(out, y.shape[:2]).flatten(-2)
        made = y.detach() @ w
        made = made if b is None else made + b
        limit = product_limit(y.detach(), w, b, got.detach())
        claim = f"{p.part} of block {block.index} must be what attention reads times W + b"
        claims.equal(claim, got, made, limit)
    claims.check(decoder.refusal)


def _check_columns(
    decoder: Decoder, block: Block, probe: _Probe, found: list[Projection], z: torch.Tensor
) -> None:
    """The columns of each head are those on which its result depends."""
    q, k, _ = found
    n, size = q.weight.shape[0], decoder.heads(block).size
    rows = torch.Size((1, TOKENS))
    z = z.reshape(*rows, n, size)
    modules = list(dict.fromkeys(p.module for p in found))
    # not alike, and none 0
    ramp = 1 + torch.arange(size, dtype=z.dtype, device=z.device).cos() / 2
    for head in dict.fromkeys((0, n - 1)):
        cotangent = torch.zeros_like(z)
        cotangent[:, -1, head] = ramp
        outs = [probe.made[m] for m in modules]
        found_grads = torch.autograd.grad(z, outs, cotangent, retain_graph=True, allow_unused=True)
        grads = dict(zip(modules, found_grads, strict=True))
        for p in found:
            g = grads[p.module]
            where = f"{p.part} of head {head} in block {block.index}"
            if g is None:
                raise decoder.refusal(f"{where} has no part in what the head returns")
            depends = p.of(g, rows)[0].ne(0).any(-1)
            heads = p.weight.shape[0]
            own = torch.arange(heads, device=g.device) == head * heads // n
            # of all tokens for k and v; of q the last alone
            seen = depends[-1] if p.part == "q" else depends.any(0)
            before = bool(depends[:-1].any())
            mixed = p.part != "v" and bool(seen.all())
            if not (torch.equal(seen, own) or mixed) or before == (p.part == "q"):
                raise decoder.refusal(
                    f"{where} is not made of the columns that the layout says: what the head "
                    f"returns depends on those of {seen.nonzero()[:, 0].tolist()}"
                )


def wire(decoder: Decoder) -> Wiring:
    """Find how a decoder's parts read and write, in one pass over 8 tokens.

    Raises:
        ValueError: for a model whose arithmetic is another, with place and numbers.
    """
    device = next(decoder.model.parameters()).device
    size = None if decoder.embedding is None else getattr(decoder.embedding, "num_embeddings", None)
    ids = torch.arange(1, TOKENS + 1, device=device)[None] % (size or TOKENS + 1)
    w_o = [decoder.w_o(block) for block in decoder.blocks]
    found = [list(decoder.projections(block)) for block in decoder.blocks]
    probes = [_Probe() for _ in decoder.blocks]
    with frozen(decoder.model), decoder.whole(), ExitStack() as stack:
        watch = Watch(decoder, None, w_o, stack)
        for probe, block, parts in zip(probes, decoder.blocks, found, strict=True):
            _see(probe, block, parts, stack)
        decoder.logits({"input_ids": ids})
        watch.check()
        layers = []
        for block, probe, parts in zip(decoder.blocks, probes, found, strict=True):
            flow = watch.flows[block.index]
            _check_products(decoder, block, probe, parts)
            _check_columns(decoder, block, probe, parts, watch.sites[block.index]["z"])
            writer = flow.attention_writer
            written = None if writer is block.attention else _known(decoder, probe, writer)
            bias = decoder.b_o(block)
            if written is not None and bias is not None and bias.any():
                raise decoder.refusal(
                    f"block {block.index} norms the sum of its heads and a bias, so that what a "
                    f"head writes is not its own"
                )
            site = watch.sites[block.index]
            norm = _norm(decoder, probe, "attention", site["x"], block.index)
            middle = site["x"] if flow.parallel else site["x"] + site["attn"]
            mlp = None if block.mlp is None else _norm(decoder, probe, "mlp", middle, block.index)
            q, k, v = parts
            layers.append(Reading(block, flow, q, k, v, norm, mlp, written))
    final = watch.reader
    if final is None:
        raise decoder.refusal("nothing beside its blocks reads the last one's output")
    graph = Graph(
        type(decoder.model).__name__,
        decoder.d,
        tuple(
            Layer(len(r.q.weight), len(r.k.weight), r.block.mlp is not None, r.flow.parallel)
            for r in layers
        ),
    )
    return Wiring(decoder, graph, tuple(layers), tuple(w_o), final)
