# SPDX-License-Identifier: Apache-2.0
"""Hooks under which a run of a model is one on circuits: see `mikernels.circuits.patching`.

Several circuits are rows of one batch. Of edges, `a_u - a~_u` of every writer u with a kept edge is
written to a buffer `[W, B, P, d]` as the run proceeds. Writers lie in the order of the model, so
that those before a reader are the first, read in place. The model's own q, k and v, the input of
the MLP and that of the last norm are replaced.

With claims, also that with all edges kept a reader is given the stream of the model, and that with
no node kept the last norm is given that of a~.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.circuits.baseline import (
    Baseline,
    Parts,
    normed,
    product,
    scaled,
)
from mikernels.circuits.recording import unit as rounding
from mikernels.models.claims import FACTORS, Claims
from mikernels.models.parts import Tap
from mikernels.models.readers import Reading, Wiring
from mikernels.ops.pairs.edges import edge_mix

# numbers of the streams of a block's readers at a time. On a CPU more are not in a cache, and freed
# memory of more than 32 MB goes back to the system, to come again page by page: for 400 tokens of
# GPT-2's sizes a layer takes 74 ms in one piece, and 45 ms in four (Zen 5, one core)
CPU_CHUNK, CHUNK = 1 << 22, 1 << 26


class _Hooks:
    """Of one forward pass of C circuits.

    Args:
        heads: of `head_weights`. rows: B prompts of P tokens, `[B, P]`.
        stack: removes the hooks. claims: of what is checked, None for nothing.
    """

    def __init__(
        self,
        wiring: Wiring,
        heads: tuple[torch.Tensor, ...],
        base: Baseline,
        masks: torch.Tensor,
        rows: torch.Size,
        stack: ExitStack,
        claims: Claims | None,
    ):
        self.wiring, self.base, self.masks, self.claims = wiring, base, masks, claims
        self.graph, self.circuits, self.rows = wiring.graph, len(masks), rows
        self._head_weights, self._stack = heads, stack
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
        norms = any(reading.written is not None for reading in self.wiring.layers)
        eps = rounding(own.dtype) if norms else torch.finfo(own.dtype).eps
        # numbers of a dtype, a walk of as many roundings as writers, and products of d terms
        unit = (4 + math.sqrt(terms)) * eps
        unit += 8 * math.sqrt(d / 3) * torch.finfo(acc).eps + 2 * factors
        size = float(own.norm(dim=-1).amax()) + self._size + moved
        self.claims.equal(place, got, own, unit * size)


class Nodes(_Hooks):
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


class Edges(_Hooks):
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

    def _mixed(self, c: int, readers: list[int], base: torch.Tensor, rows: slice) -> torch.Tensor:
        """`[B, P, k, d]`: the streams of k readers that share their writers, of some prompts."""
        n, first = self._before[self.graph.prefix[readers[0]]], c * self.rows[0]
        delta = self._delta[:n, first + rows.start : first + rows.stop].permute(1, 2, 0, 3)
        x = base.expand(*self.rows, -1)[rows]
        mixed = edge_mix(x, delta, self._weights[c, :n][:, readers])
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
            readers = [start + r for r in kept]
            for rows in self._chunks(len(kept)):
                y = normed(reading.norm, self._mixed(c, readers, self.base.x[layer], rows))
                first = done = 0
                for p in reading.projections:
                    n = len(p.weight)
                    heads = [r - first for r in kept if first <= r < first + n]
                    if heads:
                        mine = product(y[:, :, done : done + len(heads)], p, heads)
                        made[p.part][c][rows][:, :, heads] = mine
                    first, done = first + n, done + len(heads)
        return made

    def _chunks(self, readers: int) -> Iterator[slice]:
        """Of the prompts, so that their streams stay in a cache, and in memory that is there."""
        b, positions = self.rows
        most = CPU_CHUNK if self._delta.device.type == "cpu" else CHUNK
        step = max(1, most // (positions * readers * self.graph.d))
        return (slice(i, min(b, i + step)) for i in range(0, b, step))

    def _streams(self, reader: int, base: torch.Tensor) -> torch.Tensor:
        """`[C B, P, d]`: those of one reader."""
        return torch.cat(
            [
                self._mixed(c, [reader], base, slice(0, self.rows[0]))[:, :, 0]
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
