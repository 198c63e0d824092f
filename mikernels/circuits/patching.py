# SPDX-License-Identifier: Apache-2.0
"""A model run on a circuit: all that is not in it is cut, so that other activations take its place.

Of edges, every reader r (q, k and v of each head by itself) is given

    x_r = x~_r + sum over kept edges (u, r) of (a_u - a~_u)

with a_u what writer u writes in this run, and x~ the stream without any kept edge
(`mikernels.circuits.baseline`). Of nodes, one that is not kept writes a~ (a head: has the z of a~).
Nodes on no path of kept edges from the input to the logits are cut first: they do not differ from
a~ but for what a mean or 0 makes of their own input. (Hanna et al., arXiv 2403.17806; there the
norm of a sum of heads is taken anew for each reader, here a head writes with the scale of the run.)

Several circuits are rows of one batch, and a writer without a kept edge has no place in the buffer
of `a_u - a~_u`, `[W, B, P, d]`, of which the writers before a reader are the first.

With all edges kept a reader must be given the stream itself, and with no node kept the logits' norm
that of x~: that is checked on a prompt of every call, number by number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.circuits import baseline
from mikernels.circuits.baseline import (
    Baseline,
    Parts,
    Writes,
    head_weights,
    normed,
    product,
    scaled,
)
from mikernels.circuits.passes import run
from mikernels.circuits.prompts import Inputs, Prompts, check_aligned, read_prompts
from mikernels.circuits.recording import unit as rounding
from mikernels.circuits.selection import on_paths
from mikernels.circuits.targets import Behavior, Target, last_logits, read_target, vocabulary
from mikernels.models.claims import FACTORS, Claims
from mikernels.models.decoder import find_decoder
from mikernels.models.graph import Graph
from mikernels.models.hooks import check_one_dtype, original
from mikernels.models.parts import Tap
from mikernels.models.readers import Reading, Wiring, wire
from mikernels.ops.pairs.edges import edge_mix

FIX = "run its circuits with hooks of your own"
# of what the rows of a forward pass keep: the writers' differences, a layer's inputs, the logits
MEMORY = 512 << 20


def pruned(graph: Graph, mask: torch.Tensor) -> torch.Tensor:
    """Of `[W, R]` bool the edges on paths from the input to the logits; of `[W]` the nodes on paths
    through such nodes."""
    edges = mask & graph.allowed() if mask.dim() == 2 else mask[:, None] & graph.allowed()
    kept = on_paths(graph, edges)
    return kept if mask.dim() == 2 else kept.any(1)


class _Hooks:
    """Of one forward pass of C circuits: rows `[C, B]` of P tokens."""

    def __init__(
        self,
        wiring: Wiring,
        base: Baseline,
        masks: torch.Tensor,
        rows: torch.Size,
        stack: ExitStack,
        claims: Claims | None,
    ):
        self.wiring, self.base, self.masks, self.claims = wiring, base, masks, claims
        self.graph, self.circuits, self.rows = wiring.graph, len(masks), rows
        self._stack = stack
        # of x~, for what may round
        streams = (*base.x, *base.middle, base.final)
        self._size = None if claims is None else max(float(x.norm(dim=-1).amax()) for x in streams)

    def see(self, tap: Tap, see: Callable[[torch.Tensor], None]) -> None:
        self._stack.callback(tap.hook(see))

    def edit(self, tap: Tap, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """What `change` returns takes the place of what passes, in its shape."""
        self._stack.callback(tap.edit(lambda x: change(x).reshape(x.shape)))

    def view(self, x: torch.Tensor, *shape: int) -> torch.Tensor:
        """`[C, B, P, ...]` of what a module sees."""
        return x.reshape(self.circuits, *self.rows, *(shape or (-1,)))

    def claim(self, place: str, got: torch.Tensor, own: torch.Tensor, moved: float) -> None:
        """That a stream `[B, P, d]` is the model's own, within the rounding of sums of writers."""
        if self.claims is None or self._size is None:
            return
        acc = accumulate_dtype(own.dtype)
        factors = FACTORS[torch.get_float32_matmul_precision()] if acc == torch.float32 else 0.0
        terms, d = len(self.graph.writers), own.shape[-1]
        # transformers' norms compute in fp32 also where all else is in fp64
        scaled = any(reading.written is not None for reading in self.wiring.layers)
        eps = rounding(own.dtype) if scaled else torch.finfo(own.dtype).eps
        # numbers of a dtype, a walk of as many roundings as writers, and products of d terms
        unit = (4 + math.sqrt(terms)) * eps
        unit += 8 * math.sqrt(d / 3) * torch.finfo(acc).eps + 2 * factors
        size = float(own.norm(dim=-1).amax()) + self._size + moved
        self.claims.equal(place, got, own, unit * size)


class _Nodes(_Hooks):
    """masks `[C, W]`: what is not kept writes a~."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        writes, layers = self.base.writes, self.wiring.layers
        self._replace(0, writes.input, Tap(layers[0].block.module, before=True))
        for layer, reading in enumerate(layers):
            first = self.graph.first_writer(layer)
            self._replace(first, writes.z[layer], reading.block.z)
            writer, mlp = reading.flow.mlp_writer, writes.mlp[layer]
            if writer is not None and mlp is not None:
                self._replace(first + self.graph.layers[layer].heads, mlp, Tap(writer))
        if self.claims is not None:
            self.see(Tap(self.wiring.final, before=True), self._check)

    def _replace(self, first: int, other: torch.Tensor, tap: Tap) -> None:
        # of heads [.., H, dh], else [.., d]
        several = other.dim() - 3
        n = other.shape[2] if several else 1
        kept = self.masks[:, first : first + n].to(other.device)
        if kept.all():
            return
        kept = kept.view(self.circuits, 1, 1, n, *[1] * several)
        self.edit(tap, lambda x: torch.where(kept, self.view(x, *other.shape[2:]), other))

    def _check(self, x: torch.Tensor) -> None:
        own = self.view(x)[0]
        place = "the stream after the last block, all nodes cut, must be what takes their place"
        self.claim(place, own, self.base.final.expand_as(own), 0.0)


class _Edges(_Hooks):
    """masks `[C, W, R]`: every reader gets the mix of what is kept."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        base, graph = self.base, self.graph
        kept = self.masks.any(2).any(0)
        # of each writer how many that are kept come before it: its place in the buffer
        self._before = [0, *kept.cumsum(0).tolist()]
        like = base.final
        self._weights = self.masks[:, kept].to(like)
        n, (b, positions) = self._before[-1], self.rows
        self._delta = like.new_empty(n, self.circuits * b, positions, graph.d)
        self._made: dict[int, Parts] = {}
        self._head_weights = head_weights(self.wiring)
        self._own = like
        layers = self.wiring.layers
        if self._kept(0):
            self.see(Tap(layers[0].block.module, before=True), self._input)
        for layer, reading in enumerate(layers):
            self._layer(layer, reading)
        self.edit(Tap(self.wiring.final, before=True), self._logits)

    def _kept(self, writer: int, n: int = 1) -> list[int]:
        """Which of n writers have a place."""
        places = self._before[writer : writer + n + 1]
        return [i for i in range(n) if places[i + 1] > places[i]]

    def _rows(self, c: int) -> slice:
        b = self.rows[0]
        return slice(c * b, (c + 1) * b)

    def _mixed(self, c: int, readers: Sequence[int], base: torch.Tensor) -> torch.Tensor:
        """`[B, P, k, d]`: the streams of k readers that share their writers."""
        n = self._before[self.graph.prefix[readers[0]]]
        delta = self._delta[:n, self._rows(c)].permute(1, 2, 0, 3)
        mask = self._weights[c, :n][:, list(readers)]
        x = base.expand(*self.rows, -1)
        mixed = edge_mix(x, delta, mask)
        if self.claims is not None:
            name = self.graph.readers[readers[0]]
            moved = float(delta.norm(dim=-1).sum(-1).amax()) if n else 0.0
            place = f"the input of {name}, all edges kept, must be the model's own stream"
            self.claim(place, mixed[:, :, 0], self._own, moved)
        return mixed

    def _any(self, c: int, first: int, n: int = 1) -> list[int]:
        """Which of n readers have a kept edge."""
        return self.masks[c, :, first : first + n].any(0).nonzero()[:, 0].tolist()

    def _input(self, x: torch.Tensor) -> None:
        torch.sub(self.view(x), self.base.writes.input, out=self.view(self._delta[0]))

    def _layer(self, layer: int, reading: Reading) -> None:
        for remove in reading.hook(lambda parts: self._parts(layer, reading, parts)):
            self._stack.callback(remove)
        z: list[torch.Tensor] = []
        first = self.graph.first_writer(layer)
        heads = self.graph.layers[layer].heads
        if kept := self._kept(first, heads):
            self.see(reading.block.z, z.append)

            def attended(projected: torch.Tensor) -> None:
                self._attended(layer, reading, kept, z.pop(), projected)

            self.see(Tap(reading.block.projection), attended)
        if self.claims is not None:
            self._follow(reading)
        if reading.block.mlp_reader is None or reading.flow.mlp_writer is None:
            return
        self.edit(
            Tap(reading.block.mlp_reader, before=True), lambda x: self._mlp_input(layer, reading)
        )
        if self._kept(first + heads):
            self.see(Tap(reading.flow.mlp_writer), lambda x: self._mlp(layer, x))

    def _follow(self, reading: Reading) -> None:
        """Of the run that is checked, the model's own stream."""

        def enter(x: torch.Tensor) -> None:
            self._own = self.view(x)[0]

        def attended(x: torch.Tensor) -> None:
            if not reading.flow.parallel:
                self._own = self._own + self.view(x)[0]

        self.see(Tap(reading.block.module, before=True), enter)
        self.see(Tap(reading.flow.attention_writer), attended)

    def _attended(
        self,
        layer: int,
        reading: Reading,
        kept: list[int],
        z: torch.Tensor,
        projected: torch.Tensor,
    ) -> None:
        w, other = self._head_weights[layer], self.base.writes.z[layer]
        z = self.view(z, *other.shape[2:])
        dz = (scaled(reading, z, projected) - other).flatten(0, 2).transpose(0, 1)
        if len(kept) < len(w):
            w, dz = w[kept], dz[kept]
        at = self._before[self.graph.first_writer(layer)]
        torch.bmm(dz, w, out=self._delta[at : at + len(kept)].flatten(1, 2))

    def _mlp(self, layer: int, x: torch.Tensor) -> None:
        at = self.graph.first_writer(layer + 1) - 1
        to = self.view(self._delta[self._before[at]])
        torch.sub(self.view(x), self.base.writes.mlp[layer], out=to)  # type: ignore[arg-type]

    def _parts(self, layer: int, reading: Reading, parts: Parts) -> Parts:
        if layer not in self._made:
            self._made[layer] = self._heads(layer, reading)
        made = self._made[layer]
        found = {part: made.pop(part).flatten(0, 1) for part in parts}
        if not made:
            del self._made[layer]
        return found

    def _heads(self, layer: int, reading: Reading) -> Parts:
        """q, k and v `[C, B, P, n, dh]` of all heads."""
        base = self.base.parts[layer]
        made = {
            part: x.expand(self.circuits, *self.rows, *x.shape[-2:]).clone()
            for part, x in base.items()
        }
        start, layers = self.graph.first_reader(layer), self.graph.layers[layer]
        for c in range(self.circuits):
            kept = self._any(c, start, layers.readers - layers.mlp)
            if not kept:
                continue
            x = self._mixed(c, [start + r for r in kept], self.base.x[layer])
            y = normed(reading.norm, x)
            first = done = 0
            for p in reading.projections:
                n = len(p.weight)
                heads = [r - first for r in kept if first <= r < first + n]
                if heads:
                    mine = product(y[:, :, done : done + len(heads)], p, heads)
                    made[p.part][c][:, :, heads] = mine
                first, done = first + n, done + len(heads)
        return made

    def _streams(self, reader: int, base: torch.Tensor) -> torch.Tensor:
        """`[C B, P, d]`: those of one reader."""
        return torch.cat(
            [
                self._mixed(c, [reader], base)[:, :, 0]
                if self._any(c, reader)
                else base.expand(*self.rows, -1)
                for c in range(self.circuits)
            ]
        )

    def _mlp_input(self, layer: int, reading: Reading) -> torch.Tensor:
        reader = self.graph.first_reader(layer + 1) - 1
        return normed(reading.mlp_norm, self._streams(reader, self.base.middle[layer]))

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        self._own = self.view(x)[0]
        return self._streams(len(self.graph.prefix) - 1, self.base.final)


@dataclass(frozen=True, eq=False)
class Measured:
    """A behaviour's number for each of B prompts.

    Attributes:
        clean, empty: `[B]` of the whole model, and of that with everything cut.
        values: `[n, B]` of n circuits.
    """

    clean: torch.Tensor
    empty: torch.Tensor
    values: torch.Tensor


def _stacked(prompts: Prompts, times: int) -> dict[str, Any]:
    """The keywords of the model for the same prompts several times."""
    b = len(prompts.ids)
    return {
        name: x.repeat(times, *[1] * (x.dim() - 1)) if isinstance(x, torch.Tensor) and len(x) == b
        else x
        for name, x in prompts.given.items()
    }  # fmt: skip


class Patcher:
    """Runs a model on circuits of it, for the prompts and the behaviour of one call.

    Args:
        where: of messages: the public function.
        model: a Hugging Face decoder or a HookedTransformer, in eval mode.
        clean, corrupted, metric, tokenizer: as for `faithfulness_curve`.
        level: "edge" or "node": what the masks are of.
        ablation: one of ABLATIONS. batch: rows (prompts times circuits) of a forward pass; None: as
            many as keep its buffers below MEMORY, at least one.

    Attributes:
        graph: of the model. label: of the behaviour's number.
    """

    def __init__(
        self,
        where: str,
        model: torch.nn.Module,
        clean: Inputs,
        corrupted: Inputs | None,
        metric: Target | None,
        level: str,
        *,
        tokenizer: Any = None,
        ablation: str = "counterfactual",
        batch: int | None = None,
    ):
        model = original(model)
        decoder = find_decoder(model, where, FIX)
        decoder.check_eval()
        check_one_dtype(where, model)
        if ablation not in baseline.ABLATIONS:
            raise ValueError(
                f"{where}: ablation must be one of {', '.join(baseline.ABLATIONS)}, got "
                f"{ablation!r}"
            )
        if batch is not None and (not isinstance(batch, int) or batch < 1):
            raise ValueError(f"{where}: batch must be at least 1, or None, got {batch!r}")
        self._where, self._level, self._ablation = where, level, ablation
        self._clean = read_prompts(decoder, "clean", clean, tokenizer)
        self._other = self._reference(decoder, corrupted, tokenizer)
        b = len(self._clean.ids)
        self._behavior = read_target(where, metric, b, vocabulary(decoder), tokenizer)
        self.label = self._behavior.label
        self._wiring = wire(decoder)
        self.graph = self._wiring.graph
        self._size = self._batch(batch)
        self._parts = [slice(i, i + self._size) for i in range(0, b, self._size)]
        self._ends: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._targets: dict[int, Behavior] = {}
        self._base: Baseline | None = None
        self._checked = False

    def _reference(self, decoder: Any, corrupted: Inputs | None, tokenizer: Any) -> Prompts | None:
        where, ablation = self._where, self._ablation
        if ablation == "zero":
            return None
        if corrupted is None:
            raise ValueError(
                f"{where}: corrupted must be prompts for ablation {ablation!r}, got None; give "
                f"some, or ablation='zero'"
            )
        other = read_prompts(decoder, "corrupted", corrupted, tokenizer)
        if ablation == "counterfactual":
            check_aligned(where, self._clean, other, "clean", "corrupted")
        elif ablation == "mean-positional":
            widths = {len(row) for row in (self._clean.ids, other.ids) for row in row}
            padded = not (self._clean.mask.all() and other.mask.all())
            if padded or len(widths) > 1:
                raise ValueError(
                    f"{where}: clean and corrupted must be of as many tokens each for ablation "
                    f"'mean-positional', got {'padding' if padded else sorted(widths)}; "
                    f"ablation='mean' takes any"
                )
        return other

    def _batch(self, batch: int | None) -> int:
        """Prompts at a time; `self._stack`: circuits at a time."""
        (b, positions), graph = self._clean.ids.shape, self.graph
        if batch is None:
            most = max((layer.readers for layer in graph.layers), default=0)
            # a reader's stream, that normed, and what norms make on the way; of the baseline two
            # streams, the MLP's output, z, q, k and v of each block
            numbers = graph.d * (len(graph.writers) + 3 * most + 7 * len(graph.layers))
            if not self._behavior.only_last(self._clean.kept):
                numbers += vocabulary(self._wiring.decoder) or 0
            size = self._wiring.w_o[0].element_size()
            batch = max(1, MEMORY // (numbers * size * positions))
        if self._behavior.function is not None:
            # it may compare prompts
            self._stack = max(1, batch // b)
            return b
        # as many in each
        parts = math.ceil(b / batch)
        self._stack = max(1, batch * parts // b)
        return math.ceil(b / parts)

    # watches are of tensors that count their versions
    @torch.inference_mode(False)
    @torch.no_grad()
    def measure(self, masks: Sequence[torch.Tensor]) -> Measured:
        """The number of each prompt under each mask, bool `[W, R]` or `[W]`, of what is kept.

        Raises:
            ValueError: a number that is the same whether all is kept or nothing; a model whose
                arithmetic is another.
        """
        kept = [pruned(self.graph, mask.cpu()) for mask in masks]
        whole = self.graph.allowed() if self._level == "edge" else torch.tensor(True)
        # equal ones once, of like size side by side
        runs = {
            mask.numpy().tobytes(): mask
            for mask in kept
            if mask.any() and not (mask == whole).all()
        }
        order = sorted(runs, key=lambda key: int(runs[key].sum()))
        cleans, empties, found = [], [], []
        for number, part in enumerate(self._parts):
            prompts = self._clean.rows(part)
            base = self._baseline(number, prompts)
            clean, empty = self._ends[number]
            cleans.append(clean)
            empties.append(empty)
            if number == len(self._parts) - 1:
                self._check_effect(torch.cat(cleans), torch.cat(empties))
            if not self._checked:
                self._check(prompts, base)
            done: dict[bytes, torch.Tensor] = {}
            for i in range(0, len(order), self._stack):
                some = order[i : i + self._stack]
                values = self._run(number, prompts, base, torch.stack([runs[k] for k in some]))
                done |= dict(zip(some, values, strict=True))
            rows = []
            for mask in kept:
                end = clean if mask.any() else empty
                rows.append(done.get(mask.numpy().tobytes(), end))
            found.append(torch.stack(rows) if rows else clean.new_zeros(0, len(clean)))
        return Measured(torch.cat(cleans), torch.cat(empties), torch.cat(found, 1))

    def _check_effect(self, clean: torch.Tensor, empty: torch.Tensor) -> None:
        if clean.mean() == empty.mean():
            raise ValueError(
                f"{self._where}: metric must be another number when everything is cut, got "
                f"{self.label} = {clean.mean():.6g} in both; there is nothing to explain: take "
                f"another metric or other prompts"
            )

    @torch.no_grad()
    def _baseline(self, number: int, prompts: Prompts) -> Baseline:
        """Of one batch; the numbers of both its ends are then in `_ends`."""
        if self._ablation == "counterfactual":
            return self._counterfactual(number, prompts)
        if self._base is None:
            self._base = baseline.cut(self._wiring, self._level, self._writes())
        if number not in self._ends:
            clean = self._clean_values(number, prompts)
            none = torch.zeros(1, *self._shape(), dtype=torch.bool)
            self._ends[number] = clean, self._run(number, prompts, self._base, none)[0]
        return self._base

    def _counterfactual(self, number: int, prompts: Prompts) -> Baseline:
        # of several batches it is run again: all of them may be large
        if self._base is not None and len(self._parts) == 1:
            return self._base
        assert self._other is not None
        clean = None if number in self._ends else self._clean_values(number, prompts)
        other, behavior = self._other.rows(self._parts[number]), self._targets[number]
        last = behavior.only_last(other.kept)
        logits, self._base = baseline.recorded(self._wiring, self._level, other, last)
        if clean is not None:
            empty = behavior(logits, None if last else other.kept).double().cpu()
            self._ends[number] = clean, empty
        return self._base

    def _writes(self) -> Writes:
        if self._ablation == "zero":
            return baseline.zero(self._wiring, self._wiring.w_o[0])
        positional = self._ablation == "mean-positional"
        return baseline.mean(self._wiring, self._level, self._references(), positional)

    def _references(self) -> Iterator[Prompts]:
        assert self._other is not None
        for i in range(0, len(self._other.ids), self._size):
            yield self._other.rows(slice(i, i + self._size))

    def _shape(self) -> tuple[int, ...]:
        writers = len(self.graph.writers)
        return (writers, len(self.graph.readers)) if self._level == "edge" else (writers,)

    def _clean_values(self, number: int, prompts: Prompts) -> torch.Tensor:
        decoder, behavior = self._wiring.decoder, self._behavior[self._parts[number]]
        last = behavior.only_last(prompts.kept)
        with decoder.whole():
            logits = run(decoder, prompts.given, last)
        kept = None if last else prompts.kept
        if behavior.rows is None and behavior.function is None:
            # the token that the model predicts on the prompt, in all runs
            predicted = last_logits(logits, kept).argmax(-1)
            behavior = read_target(self._where, predicted, len(predicted))
        self._targets[number] = behavior
        return behavior(logits, kept).double().cpu()

    def _hooked(
        self, prompts: Prompts, base: Baseline, masks: torch.Tensor, last: bool,
        claims: Claims | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Logits `[C B, P, V]`."""
        decoder = self._wiring.decoder
        kind = _Edges if self._level == "edge" else _Nodes
        given = Prompts(_stacked(prompts, len(masks)), None)
        with torch.no_grad(), decoder.whole(), ExitStack() as stack:
            kind(self._wiring, base, masks, prompts.ids.shape, stack, claims)
            return run(decoder, given.given, last)

    def _run(
        self, number: int, prompts: Prompts, base: Baseline, masks: torch.Tensor
    ) -> torch.Tensor:
        """`[C, B]`."""
        behavior = self._targets[number]
        last = behavior.only_last(prompts.kept)
        logits = self._hooked(prompts, base, masks, last)
        kept = None if last else prompts.kept
        each = logits.unflatten(0, (len(masks), -1))
        return torch.stack([behavior(rows, kept) for rows in each]).double().cpu()

    def _check(self, prompts: Prompts, base: Baseline) -> None:
        """On one prompt, of all edges, or of no node."""
        first = prompts.rows(slice(0, 1))
        mask = self.graph.allowed() if self._level == "edge" else torch.zeros(self._shape()).bool()
        claims = Claims(first.kept)
        if self._ablation == "counterfactual":
            base = _first(base)
        self._hooked(first, base, mask[None], True, claims)
        claims.check(self._wiring.decoder.refusal)
        self._checked = True


def _first(base: Baseline) -> Baseline:
    """Of the first prompt."""
    return Baseline(
        base.writes.each(lambda x: x[:1]),
        tuple(x[:1] for x in base.x),
        tuple(x[:1] for x in base.middle),
        base.final[:1],
        tuple({part: x[:1] for part, x in parts.items()} for parts in base.parts),
    )
