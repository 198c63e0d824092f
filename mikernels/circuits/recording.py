# SPDX-License-Identifier: Apache-2.0
"""Passes over a wired decoder: what every writer wrote, and the gradient at every reader.

Neither is formed per head in the width of the stream. What a head writes is kept as its z
(`z / scale` where a norm follows attention), and the gradient at what it reads as that of its q, k
and v: `mikernels.circuits.scoring` widens both, a tile of tokens at a time.

With q_h = norm(x) W_h and norm(x) = gain (x - mean) / scale + bias, the gradient at one reader is

    G_h = F(dq_h W_h^T) / scale - n c_h,    n = (x - mean) / scale,    c_h = n F(...) / (d scale)

F being times the gain, less the mean over d for a LayerNorm. A frozen norm has no second term.
Which of the two holds is not asked of anybody: over the readers of a block the G add up to
what the gradient of the stream gains from its output to its input, and the one that does is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.circuits.passes import run
from mikernels.circuits.prompts import Prompts
from mikernels.circuits.targets import Behavior
from mikernels.models.claims import FACTORS
from mikernels.models.hooks import frozen, returned
from mikernels.models.parts import first_tensor, is_hook_point
from mikernels.models.readers import Norm, Reading, Wiring

# roundings that a gradient of the stream may be off by, in eps of the model's dtype: autograd adds
# up the gradients of a norm, of q, k and v, and of the MLP. SmolLM2 is off by 0.26 in bf16 and fp16
ROUNDINGS = 4
# tokens at which they must add up
ROWS = 64


def unit(dtype: torch.dtype) -> float:
    """One rounding; transformers' norms compute in fp32 also where all else is in fp64."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def slack(dtype: torch.dtype, roundings: float) -> float:
    """What a vector may be off by, as a part of its size: roundings of its numbers, and those of
    the products that it is made of, which are added up in fp32 and may take rounded factors."""
    found = roundings * unit(dtype) + 64 * torch.finfo(torch.float32).eps
    if accumulate_dtype(dtype) == torch.float32:
        found += ROUNDINGS * FACTORS[torch.get_float32_matmul_precision()]
    return found


@dataclass(eq=False)
class Written:
    """What the writers of one run wrote, detached.

    Attributes:
        values: `[B]`, the number of each prompt.
        start, end: `[B, P, d]`, what the first block is given, and what is read after the last.
        size: `[B, P]`, of the stream where it is largest, in at least fp32.
        z: of each block `[B, P, H, dh]`, over the scale of the norm after attention, if any.
        mlp: of each block `[B, P, d]`, what is added to the stream; None without an MLP.
        attention: likewise; empty unless asked for.
    """

    values: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    size: torch.Tensor
    z: list[torch.Tensor]
    mlp: list[torch.Tensor | None]
    attention: list[torch.Tensor]


class Stretch(NamedTuple):
    """The second term of one pass: `n [B, P, d]`, and c `[B, P, R]` of the readers q, k and v."""

    along: torch.Tensor
    share: torch.Tensor


@dataclass(eq=False)
class Gradients:
    """The gradients at the readers of one block, added up over passes.

    Attributes:
        heads: `dq / scale` `[B, P, n, dh]`, and so for k and v.
        mlp: `[B, P, d]`, None without an MLP.
        stretches: of each pass, none where the norm is frozen or there is none.
    """

    heads: list[torch.Tensor]
    mlp: torch.Tensor | None
    stretches: list[Stretch] = field(default_factory=list)


# what takes the place of a writer's output: of the block's number and "attention", "mlp" or "start"
Patch = Callable[[int, str], torch.Tensor | None]


class _Hooks:
    """Records one run; `grads` then differentiates it."""

    def __init__(self, wiring: Wiring, stack: ExitStack, patch: Patch | None, edges: bool):
        self._wiring, self._patch = wiring, patch or _nothing
        n = len(wiring.layers)
        self.start = self.end = torch.empty(0)
        self.x: list[torch.Tensor] = [torch.empty(0)] * n
        self.z: list[torch.Tensor] = [torch.empty(0)] * n
        self.attention: list[torch.Tensor] = [torch.empty(0)] * n
        self.mlp: list[torch.Tensor | None] = [None] * n
        # for gradients: outputs of the projections, inputs of the MLP, and what its norm reads
        self.made: list[dict[torch.nn.Module, torch.Tensor]] = [{} for _ in range(n)]
        self.mlp_in: list[torch.Tensor | None] = [None] * n
        self.before: list[dict[torch.nn.Module, torch.Tensor]] = [{} for _ in range(n)]
        self.after: list[torch.Tensor] = [torch.empty(0)] * n
        for i, reading in enumerate(wiring.layers):
            self._block(i, reading, stack, edges)
        hook = wiring.final.register_forward_pre_hook(self._last, with_kwargs=True)
        stack.callback(hook.remove)

    def _last(self, module: Any, args: Any, kwargs: Any) -> None:
        self.end = first_tensor(args, kwargs)

    def _block(self, i: int, reading: Reading, stack: ExitStack, edges: bool) -> None:
        block, flow, add = reading.block, reading.flow, stack.callback

        def enter(module, args, kwargs):  # type: ignore[no-untyped-def]
            x = args[0] if args else kwargs["hidden_states"]
            if i == 0:
                given = self._patch(0, "start")
                # with all parameters frozen, this is where the graph begins
                x = (x if given is None else given).detach().requires_grad_(torch.is_grad_enabled())
                self.start = x
            self.x[i] = x
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        def keep_z(z: torch.Tensor) -> None:
            self.z[i] = z.detach()

        def attend(module, args, output):  # type: ignore[no-untyped-def]
            given = self._patch(i, "attention")
            if given is None:
                self.attention[i] = returned(output)
                return None
            self.attention[i] = given = _leaf(given, returned(output))
            return _with(output, given)

        def feed(module, args, output):  # type: ignore[no-untyped-def]
            given = self._patch(i, "mlp")
            if given is None:
                self.mlp[i] = returned(output)
                return None
            self.mlp[i] = given = _leaf(given, returned(output))
            return _with(output, given)

        add(block.module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        add(block.z.hook(keep_z))
        if reading.written is not None:

            def rescale(module, args, kwargs):  # type: ignore[no-untyped-def]
                self.after[i] = first_tensor(args, kwargs).detach()

            written = reading.written.module.register_forward_pre_hook(rescale, with_kwargs=True)
            add(written.remove)
        add(flow.attention_writer.register_forward_hook(attend).remove)
        if flow.mlp_writer is not None:
            add(flow.mlp_writer.register_forward_hook(feed).remove)
        if edges:
            self._readers(i, reading, stack)

    def _readers(self, i: int, reading: Reading, stack: ExitStack) -> None:
        def make(module, args, output):  # type: ignore[no-untyped-def]
            # rules scale at a hook point: what it was given is before that
            self.made[i][module] = args[0] if is_hook_point(module) else output

        def read(module, args, kwargs):  # type: ignore[no-untyped-def]
            self.before[i][module] = first_tensor(args, kwargs)

        def enter(module, args, kwargs):  # type: ignore[no-untyped-def]
            # an input of its own: the same tensor may be attention's
            x = first_tensor(args, kwargs)
            self.mlp_in[i] = alias = x.view_as(x)
            if args:
                return (alias, *args[1:]), kwargs
            name = next(name for name, value in kwargs.items() if value is x)
            return args, {**kwargs, name: alias}

        for module in dict.fromkeys(p.module for p in reading.projections):
            stack.callback(module.register_forward_hook(make).remove)
        for norm in {n.module for n in (reading.norm, reading.mlp_norm) if n is not None}:
            stack.callback(norm.register_forward_pre_hook(read, with_kwargs=True).remove)
        if (reader := reading.block.mlp_reader) is not None:
            stack.callback(reader.register_forward_pre_hook(enter, with_kwargs=True).remove)

    def written(self, values: torch.Tensor, attention: bool = False) -> Written:
        shape = self.start.shape
        z = []
        for i, reading in enumerate(self._wiring.layers):
            heads, size, _ = self._wiring.w_o[i].shape
            one = self.z[i].reshape(*shape[:2], heads, size)
            after = reading.written
            found = None if after is None else after.statistics(self.after[i].view(shape))
            if found is not None:
                one = (one * found[1][..., None]).to(one.dtype)
            z.append(one)
        streams = [x.detach().reshape(shape) for x in (*self.x, self.end)]
        largest = torch.stack([_size(x) for x in streams]).amax(0)
        return Written(
            values.detach(),
            self.start.detach(),
            self.end.detach().view(shape),
            largest,
            z,
            [None if x is None else x.detach().view(shape) for x in self.mlp],
            [x.detach().view(shape) for x in self.attention] if attention else [],
        )


def _size(x: torch.Tensor) -> torch.Tensor:
    """`[B, P]`; in fp16 it would be inf from 65,520."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=accumulate_dtype(x.dtype))


def _leaf(given: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """What takes the place of an output, where a graph begins."""
    return given.view_as(output).detach().requires_grad_(torch.is_grad_enabled())


def _with(output: Any, tensor: torch.Tensor) -> Any:
    """What a module returned with another first tensor."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


def _nothing(layer: int, part: str) -> None:
    return None


def record(
    wiring: Wiring, prompts: Prompts, behavior: Behavior, attention: bool = False
) -> Written:
    """One forward pass without gradients.

    Args:
        attention: also keep what attention wrote.
    """
    with torch.no_grad(), wiring.decoder.whole(), ExitStack() as stack:
        hooks = _Hooks(wiring, stack, None, edges=False)
        values = _values(wiring, prompts, behavior)
    return hooks.written(values, attention)


def _values(wiring: Wiring, prompts: Prompts, behavior: Behavior) -> torch.Tensor:
    last = behavior.only_last(prompts.kept)
    logits = run(wiring.decoder, prompts.given, last)
    return behavior(logits, None if last else prompts.kept)


def _differentiate(
    wiring: Wiring, values: torch.Tensor, wanted: Mapping[str, torch.Tensor], patched: bool
) -> dict[str, torch.Tensor]:
    """Of the sum of the values; zeros where a patch cut the way."""
    found = torch.autograd.grad(values.sum(), list(wanted.values()), allow_unused=True)
    grads = {}
    for (name, x), g in zip(wanted.items(), found, strict=True):
        if g is None and not patched:
            raise wiring.decoder.refusal(f"no gradient reaches {name}: something detaches it")
        grads[name] = torch.zeros_like(x) if g is None else g
    return grads


def at_writers(
    wiring: Wiring, prompts: Prompts, behavior: Behavior, patch: Patch | None = None
) -> tuple[Written, list[torch.Tensor]]:
    """A forward and a backward pass: also the gradients `[B, P, d]` at what is written, first at
    the start, then of each block at what attention wrote, and at what the MLP did."""
    with frozen(wiring.decoder.model), wiring.decoder.whole(), ExitStack() as stack:
        hooks = _Hooks(wiring, stack, patch, edges=False)
        values = _values(wiring, prompts, behavior)
        wanted = {"the first block": hooks.start}
        for i, (attention, mlp) in enumerate(zip(hooks.attention, hooks.mlp, strict=True)):
            wanted[f"the attention of block {i}"] = attention
            if mlp is not None:
                wanted[f"the MLP of block {i}"] = mlp
        grads = _differentiate(wiring, values, wanted, patch is not None)
        shape = hooks.start.shape
    return hooks.written(values), [g.view(shape) for g in grads.values()]


def at_readers(
    wiring: Wiring,
    prompts: Prompts,
    behavior: Behavior,
    into: list[Gradients] | None = None,
    patch: Patch | None = None,
) -> tuple[Written, list[Gradients], torch.Tensor]:
    """A forward and a backward pass: also the gradients at the readers.

    Args:
        into: gradients of other passes, to which these are added.

    Returns:
        What was written; the gradients of each block, and at the end of the stream `[B, P, d]`.

    Raises:
        ValueError: where the gradients of a block's readers do not add up.
    """
    with frozen(wiring.decoder.model), wiring.decoder.whole(), ExitStack() as stack:
        hooks = _Hooks(wiring, stack, patch, edges=True)
        values = _values(wiring, prompts, behavior)
        wanted = {"the last norm": hooks.end}
        for i, x in enumerate(hooks.x):
            wanted[f"block {i}"] = x
            for number, made in enumerate(hooks.made[i].values()):
                wanted[f"product {number} of block {i}"] = made
            if (mlp := hooks.mlp_in[i]) is not None:
                wanted[f"the MLP of block {i}"] = mlp
        grads = _differentiate(wiring, values, wanted, patch is not None)
        written = hooks.written(values)
        shape = written.start.shape
        streams = [grads[f"block {i}"].view(shape) for i in range(len(hooks.x))]
        streams.append(grads["the last norm"].view(shape))
        found = []
        with torch.no_grad():
            for i, reading in enumerate(wiring.layers):
                modules = list(hooks.made[i])
                parts = []
                for p in reading.projections:
                    g = grads[f"product {modules.index(p.module)} of block {i}"]
                    parts.append(p.of(g, torch.Size(shape[:2])))
                mlp_grad = grads.get(f"the MLP of block {i}")
                one = _pulled(
                    wiring, i, parts, None if mlp_grad is None else mlp_grad.view(shape),
                    {m: x.detach() for m, x in hooks.before[i].items()},
                    (streams[i], streams[i + 1]),
                )  # fmt: skip
                found.append(one if into is None else _sum(into[i], one))
    return written, found, streams[-1]


def _sum(total: Gradients, one: Gradients) -> Gradients:
    # not in bf16, where 256 + 1 is 256: of 300 passes the scores would be off by a quarter
    wide = accumulate_dtype(one.heads[0].dtype)
    heads = [a.to(wide).add_(b) for a, b in zip(total.heads, one.heads, strict=True)]
    mlp = total.mlp
    if mlp is not None and one.mlp is not None:
        mlp = mlp.to(wide).add_(one.mlp)
    return Gradients(heads, mlp, total.stretches + one.stretches)


def _pull(norm: Norm | None, x: torch.Tensor | None, g: torch.Tensor) -> list[torch.Tensor]:
    """A gradient of what a norm returned as that of what it read: both terms, `[B, P, d]`."""
    if norm is None:
        return [g, torch.zeros_like(g)]
    g = norm.back_(g.clone())
    found = None if x is None else norm.statistics(x.reshape(g.shape))
    if found is None:
        return [g, torch.zeros_like(g)]
    along, inverse = found
    wide = g.to(along.dtype) * inverse
    share = torch.linalg.vecdot(along, wide)[..., None] / along.shape[-1]
    return [wide.to(g.dtype), (along * share).to(g.dtype)]


def _pulled(
    wiring: Wiring,
    i: int,
    parts: list[torch.Tensor],
    mlp_grad: torch.Tensor | None,
    read: Mapping[torch.nn.Module, torch.Tensor],
    streams: tuple[torch.Tensor, torch.Tensor],
) -> Gradients:
    """The gradients of one block's readers, as kept; checked against those of the stream."""
    reading, shape = wiring.layers[i], streams[0].shape
    norm = reading.norm
    stretch = None
    found = None if norm is None else norm.statistics(read[norm.module].reshape(shape))
    if norm is not None and found is not None:
        along, inverse = found
        parts = [(g * inverse[..., None]).to(g.dtype) for g in parts]
        along = along.to(parts[0].dtype)
        gain = norm.gain(along)
        scaled = along if gain is None else along * gain
        shares = []
        for g, p in zip(parts, reading.projections, strict=True):
            t = (scaled @ p.weight.movedim(0, 1).flatten(1)).unflatten(-1, p.weight.shape[::2])
            shares.append(torch.linalg.vecdot(t, g) / shape[-1])
        stretch = Stretch(along, torch.cat(shares, -1))
    mlp_norm = reading.mlp_norm
    x = None if mlp_norm is None else read[mlp_norm.module]
    mlp = None if mlp_grad is None else _pull(mlp_norm, x, mlp_grad)
    live = _stretched(wiring, i, parts, stretch, mlp, streams)
    if mlp is not None:
        mlp[0] = mlp[0] - mlp[1] if live else mlp[0]
    return Gradients(
        [g.contiguous() for g in parts],
        None if mlp is None else mlp[0],
        [stretch] if live and stretch is not None else [],
    )


def _stretched(
    wiring: Wiring,
    i: int,
    parts: list[torch.Tensor],
    stretch: Stretch | None,
    mlp: list[torch.Tensor] | None,
    streams: tuple[torch.Tensor, torch.Tensor],
) -> bool:
    """Whether the norms of a block are differentiated, not frozen, by some of the tokens."""
    wide = accumulate_dtype(streams[0].dtype)
    # the largest: of tokens on which the number does not depend both sums are 0
    sizes = (_size(streams[0]) + _size(streams[1])).flatten()
    rows = sizes.topk(min(ROWS, len(sizes))).indices

    def some(x: torch.Tensor, dims: int = 1) -> torch.Tensor:
        return x.reshape(-1, *x.shape[-dims:])[rows].to(wide)

    before, after = map(some, streams)
    gained = before - after
    first, second = torch.zeros_like(gained), torch.zeros_like(gained)
    size = before.norm(dim=-1) + after.norm(dim=-1)
    norm = wiring.layers[i].norm
    for g, p in zip(parts, wiring.layers[i].projections, strict=True):
        one = some(g, 2).flatten(1) @ p.weight.movedim(1, 2).flatten(0, 1).to(wide)
        one = one if norm is None else norm.back_(one)
        first += one
        size += one.norm(dim=-1)
    if stretch is not None:
        along, share = map(some, stretch)
        second += along * share.sum(-1, keepdim=True)
    if mlp is not None:
        for total, term in zip((first, second), map(some, mlp), strict=True):
            total += term
            size += term.norm(dim=-1)
    away = [(gained - total).norm(dim=-1) for total in (first, first - second)]
    live = bool(away[1].sum() <= away[0].sum())
    limit = slack(streams[0].dtype, ROUNDINGS) * size
    off = away[live]
    if not (off <= limit).all():
        at = int((off - limit).argmax())
        raise wiring.decoder.refusal(
            f"the gradients of the readers of block {i} must add up to what its input's gradient "
            f"gains, got {float(off[at]):.3g} of {float(gained[at].norm()):.3g} apart, within "
            f"{float(limit[at]):.2g}",
            "remove what changes gradients (a hook, rules that this does not know), or ",
        )
    return live
