# SPDX-License-Identifier: Apache-2.0
"""What takes the place of what is cut: each writer's other output a~, and the streams of these.

| ablation | a~ of a writer |
|---|---|
| counterfactual | what it writes on the counterfactual prompt, token by token |
| zero | 0 |
| mean | the mean over the reference prompts and their tokens |
| mean-positional | the mean over the reference prompts, at each position |

A head is kept as z, `dh` numbers in place of d, with `a = z W`. Where a norm follows attention
(Gemma 2, OLMo 2), z is that over the norm's scale and W is W_O times its gain. What no writer
writes, the biases b_O, stays: the stream before a reader is

    x~ = sum of a~ of the writers before it + sum of b_O of the attentions before it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch.nn.functional import layer_norm

from mikernels.circuits.passes import run
from mikernels.circuits.prompts import Prompts
from mikernels.models.norms import parameters
from mikernels.models.parts import Projection, Tap
from mikernels.models.readers import Norm, Reading, Wiring
from mikernels.models.watch import Watch

ABLATIONS = ("counterfactual", "zero", "mean", "mean-positional")
Parts = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Writes:
    """What the writers wrote, `[B, P, ...]`, or `[1, P, ...]` or `[1, 1, ...]` for all prompts.

    Attributes:
        input: `[.., d]`. z: of each block `[.., H, dh]`, see above; as it is at node level.
        mlp: of each block `[.., d]`, None for one without.
    """

    input: torch.Tensor
    z: tuple[torch.Tensor, ...]
    mlp: tuple[torch.Tensor | None, ...]

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Writes:
        mlp = tuple(None if x is None else change(x) for x in self.mlp)
        return Writes(change(self.input), tuple(map(change, self.z)), mlp)

    def plus(self, other: Writes) -> Writes:
        pairs = zip(self.mlp, other.mlp, strict=True)
        mlp = tuple(None if a is None or b is None else a + b for a, b in pairs)
        z = tuple(a + b for a, b in zip(self.z, other.z, strict=True))
        return Writes(self.input + other.input, z, mlp)


@dataclass(frozen=True, eq=False)
class Baseline:
    """A model of which everything is cut.

    Attributes:
        writes: a~. x, middle, final: the stream before attention, before the MLP, and after the
            last block, `[.., d]`.
        parts: of each block the q, k and v `[.., n, dh]` of x; none at node level.
    """

    writes: Writes
    x: tuple[torch.Tensor, ...]
    middle: tuple[torch.Tensor, ...]
    final: torch.Tensor
    parts: tuple[Parts, ...]


def head_weights(wiring: Wiring) -> tuple[torch.Tensor, ...]:
    """Of each block the W `[H, dh, d]` of `a = z W`."""
    pairs = zip(wiring.layers, wiring.w_o, strict=True)
    return tuple(w if r.written is None else r.written.forth_(w.clone()) for r, w in pairs)


def scaled(reading: Reading, z: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
    """z `[.., H, dh]` over the scale of the norm after attention, if there is one."""
    if reading.written is None or (found := reading.written.statistics(projected)) is None:
        return z
    inverse = found[1].reshape(*z.shape[:-2], 1, 1)
    return (z.to(inverse.dtype) * inverse).to(z.dtype)


def normed(norm: Norm | None, x: torch.Tensor) -> torch.Tensor:
    """What a part reads of a stream `[..., d]`, without the hooks on its norm.

    In fp32 by torch's own, where the module takes six passes: of the time of a circuit of
    GPT-2's sizes those were a third.
    """
    if norm is None:
        return x
    if norm.form is None or x.dtype != torch.float32:
        return norm.module.forward(x)
    gain, (_, bias), eps = norm.gain(x), parameters(norm.module), norm.form.eps
    if norm.form.centred:
        return layer_norm(x, x.shape[-1:], gain, bias, eps)
    y = x * (x.norm(dim=-1, keepdim=True).square_() / x.shape[-1] + eps).rsqrt_()
    y = y if gain is None else y.mul_(gain)
    return y if bias is None else y.add_(bias)


def product(y: torch.Tensor, p: Projection, heads: list[int]) -> torch.Tensor:
    """`y W[h] + b[h]` of `[B, P, k, d]`, an own input for each of k heads: `[B, P, k, dh]`."""
    every = len(heads) == len(p.weight)
    weight = p.weight if every else p.weight[heads]
    made = torch.bmm(y.flatten(0, 1).transpose(0, 1), weight)
    if p.bias is not None:
        made += (p.bias if every else p.bias[heads])[:, None]
    return made.transpose(0, 1).unflatten(0, y.shape[:2])


def _constant(wiring: Wiring, reading: Reading) -> torch.Tensor | None:
    """`[d]`: what attention adds to the stream beside its heads."""
    if reading.written is not None:
        return parameters(reading.written.module)[1]
    return wiring.decoder.b_o(reading.block)


def _attended(
    wiring: Wiring, level: str, layer: int, w: torch.Tensor, z: torch.Tensor
) -> torch.Tensor:
    """What attention adds for heads of these z."""
    reading = wiring.layers[layer]
    if level == "node":
        projected = torch.einsum("bphe,hed->bpd", z, wiring.w_o[layer])
        if reading.written is not None:
            return normed(reading.written, projected)
        attn = projected
    else:
        attn = torch.einsum("bphe,hed->bpd", z, w)
    bias = _constant(wiring, reading)
    return attn if bias is None else attn + bias


def _made(wiring: Wiring, level: str, x: tuple[torch.Tensor, ...]) -> tuple[Parts, ...]:
    if level == "node":
        return ()
    found = []
    for reading, stream in zip(wiring.layers, x, strict=True):
        y = normed(reading.norm, stream)
        made = {}
        for p in reading.projections:
            n, _, size = p.weight.shape
            out = (y @ p.weight.movedim(0, 1).flatten(1)).unflatten(-1, (n, size))
            made[p.part] = out if p.bias is None else out + p.bias
        found.append(made)
    return tuple(found)


def _baseline(
    wiring: Wiring, level: str, writes: Writes, attended: Callable[[int], torch.Tensor]
) -> Baseline:
    stream, x, middle = writes.input, [], []
    for layer, reading in enumerate(wiring.layers):
        x.append(stream)
        after = stream + attended(layer)
        middle.append(stream if reading.flow.parallel else after)
        mlp = writes.mlp[layer]
        stream = after if mlp is None else after + mlp
    return Baseline(writes, tuple(x), tuple(middle), stream, _made(wiring, level, tuple(x)))


@torch.no_grad()
def cut(wiring: Wiring, level: str, writes: Writes) -> Baseline:
    """The baseline of some writes."""
    weights = head_weights(wiring)

    def attended(layer: int) -> torch.Tensor:
        return _attended(wiring, level, layer, weights[layer], writes.z[layer])

    return _baseline(wiring, level, writes, attended)


def last_alone(wiring: Wiring, stack: ExitStack) -> None:
    """Logits are computed at the last position alone: of GPT-2's multiply-adds they are 30 %, and
    not all models can be asked."""
    if (unembedding := wiring.decoder.unembedding) is not None:
        stack.callback(Tap(unembedding, before=True).edit(lambda x: x[:, -1:]))


@torch.no_grad()
def recorded(
    wiring: Wiring, level: str, prompts: Prompts, last: bool
) -> tuple[torch.Tensor, Baseline]:
    """The logits of some prompts, and these as the baseline.

    Raises:
        ValueError: for a model whose arithmetic is another (`mikernels.models.watch`).
    """
    decoder = wiring.decoder
    with decoder.whole(), ExitStack() as stack:
        watch = Watch(decoder, prompts.kept, list(wiring.w_o), stack)
        if last:
            last_alone(wiring, stack)
        logits = run(decoder, prompts.given, last)
        watch.check()
    rows = prompts.ids.shape
    sites = [{name: x.detach() for name, x in site.items()} for site in watch.sites]
    zs, mlps = [], []
    for reading, w, site in zip(wiring.layers, wiring.w_o, sites, strict=True):
        z = site["z"].reshape(*rows, *w.shape[:2])
        zs.append(z if level == "node" else scaled(reading, z, site["projected"]))
        mlps.append(site["mlp"].reshape(*rows, -1) if "mlp" in site else None)
    writes = Writes(sites[0]["x"], tuple(zs), tuple(mlps))

    def attended(layer: int) -> torch.Tensor:
        return sites[layer]["attn"].reshape(*rows, -1)

    return logits, _baseline(wiring, level, writes, attended)


def zero(wiring: Wiring, like: torch.Tensor) -> Writes:
    """Nothing, in the dtype and on the device of `like`."""
    blank = like.new_zeros(1, 1, wiring.graph.d)
    return Writes(
        blank,
        tuple(like.new_zeros(1, 1, *w.shape[:2]) for w in wiring.w_o),
        tuple(None if reading.block.mlp is None else blank for reading in wiring.layers),
    )


@torch.no_grad()
def mean(wiring: Wiring, level: str, batches: Iterable[Prompts], positional: bool) -> Writes:
    """The mean over all prompts, and over their tokens or at each position."""
    total, count, dtype = None, 0, None
    for prompts in batches:
        _, found = recorded(wiring, level, prompts, True)
        dtype = found.writes.input.dtype
        mask = prompts.mask

        def summed(x: torch.Tensor, mask: torch.Tensor = mask) -> torch.Tensor:
            inside = mask.to(x.device).reshape(*mask.shape, *[1] * (x.dim() - 2))
            # fp64: of 10,000 tokens
            return x.double().where(inside, 0).sum((0,) if positional else (0, 1))[None]

        part = found.writes.each(summed)
        total = part if total is None else total.plus(part)
        count += len(mask) if positional else int(mask.sum())
    assert total is not None

    def divided(x: torch.Tensor) -> torch.Tensor:
        x = x if positional else x[:, None]
        return (x / count).to(dtype)

    return total.each(divided)
