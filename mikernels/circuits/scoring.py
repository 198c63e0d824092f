# SPDX-License-Identifier: Apache-2.0
"""Edge scores from what `mikernels.circuits.recording` keeps, a tile of tokens at a time.

    S[w, r] = sum over tokens of <a_w - a'_w, G_r>

A tile's writers are widened to `[W, tokens, d]` once, `(z - z') W_O` for a head, and its readers
group by group of blocks, `G = g F^T` less what stretches the norm; `edge_scores` multiplies them.
So each is formed once, where widening heads inside of the product would form them for every block
after them, and what lies in memory does not grow with heads times d but by a tile.

That writers add up to what is read after the last block is checked in every tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.circuits.recording import ROUNDINGS, Gradients, Written, slack
from mikernels.models.readers import Wiring
from mikernels.ops.pairs.edges import edge_scores

# bytes of a tile's writers, and of the readers beside them
TILE = 1 << 26
# readers that meet the writers at a time: each reads them all
READERS = 64


@dataclass(eq=False)
class Changes:
    """What the writers wrote on the clean prompts less what they did on the counterfactual ones.

    Attributes:
        start: `[B, P, d]`. z: of each block `[B, P, H, dh]`. mlp: of each block, None without.
        end: `[B, P, d]`, at the end of the stream. size: `[B, P]`, of the largest streams of both.
    """

    start: torch.Tensor
    z: list[torch.Tensor]
    mlp: list[torch.Tensor | None]
    end: torch.Tensor
    size: torch.Tensor

    @classmethod
    def of(cls, clean: Written, other: Written, last: bool = False) -> Changes:
        """Changes; at padding whatever is there.

        Args:
            last: nobody reads `other` after this: its memory holds them.
        """

        def less(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.sub(a, b, out=b) if last else a - b

        return cls(
            less(clean.start, other.start),
            [less(a, b) for a, b in zip(clean.z, other.z, strict=True)],
            [
                None if a is None or b is None else less(a, b)
                for a, b in zip(clean.mlp, other.mlp, strict=True)
            ],
            less(clean.end, other.end),
            clean.size + other.size,
        )


@dataclass(frozen=True)
class Tile:
    """Some positions of some prompts."""

    rows: slice
    at: slice

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.rows, self.at]


def tiles(batch: int, positions: int, token: int, budget: int) -> Iterator[Tile]:
    """Of so many bytes a token; whole prompts if one fits."""
    n = max(1, budget // token)
    rows = max(1, n // positions)
    step = min(n, positions)
    for b in range(0, batch, rows):
        for p in range(0, positions, step):
            yield Tile(slice(b, min(b + rows, batch)), slice(p, min(p + step, positions)))


class Products:
    """Adds edge scores of batches to a total.

    Args:
        wiring: of the model.
        out: `[Q, W, R]` float32 (float64), what is added to.
    """

    def __init__(self, wiring: Wiring, out: torch.Tensor):
        self._wiring, self._out = wiring, out

    def add(
        self,
        changes: Changes,
        gradients: list[Gradients],
        end: torch.Tensor,
        weights: torch.Tensor,
        kept: torch.Tensor | None,
        by_position: torch.Tensor | None = None,
    ) -> None:
        """Adds those of a batch.

        Args:
            changes, gradients, end: of the batch; end is the gradient at the end of the stream.
            weights: `[Q, B]` float32, of the prompts.
            kept: the positions `[B, P]` that are not padding, None for all.
            by_position: `[P, W, R]`, to which the scores weighted by the first row of weights are
                added, position by position.

        Raises:
            ValueError: where what was written does not add up.
        """
        graph = self._wiring.graph
        batch, positions, d = end.shape
        widest = max(READERS, *(layer.readers for layer in graph.layers))
        token = changes.start.element_size() * d * (len(graph.writers) + 2 * widest)
        for tile in tiles(batch, positions, token, TILE):
            tile_kept = None if kept is None else tile.of(kept)
            delta = self._writers(changes, tile)
            if tile_kept is not None:
                # whatever padding holds, it is not counted
                delta.masked_fill_(~tile_kept.to(delta.device)[None, :, :, None], 0)
            self._check(changes, tile, delta, tile_kept)
            view = delta.permute(1, 2, 0, 3)
            for first, last, grads, prefix in self._readers(gradients, end, tile, delta.dtype):
                before = int(prefix.max())
                both = view[:, :, :before], grads.permute(1, 2, 0, 3)
                into = self._out[:, :before, first:last]
                edge_scores(*both, prefix=prefix, weights=weights[:, tile.rows], out=into)
                if by_position is not None:
                    place = by_position[tile.at, :before, first:last]
                    _by_position(*both, prefix, weights[0, tile.rows], place)

    def _writers(self, changes: Changes, tile: Tile) -> torch.Tensor:
        """`[W, B, P, d]` of a tile."""
        graph = self._wiring.graph
        start = tile.of(changes.start)
        delta = start.new_empty(len(graph.writers), *start.shape)
        delta[0] = start
        at = 1
        wiring = self._wiring
        for z, mlp, w, reading in zip(
            changes.z, changes.mlp, wiring.w_o, wiring.layers, strict=True
        ):
            part = tile.of(z)
            heads = part.shape[2]
            out = delta[at : at + heads].view(heads, -1, start.shape[-1])
            torch.bmm(part.flatten(0, 1).transpose(0, 1), w, out=out)
            if reading.written is not None:
                reading.written.forth_(out)
            at += heads
            if mlp is not None:
                delta[at] = tile.of(mlp)
                at += 1
        return delta

    def _check(
        self, changes: Changes, tile: Tile, delta: torch.Tensor, kept: torch.Tensor | None
    ) -> None:
        """That what was written adds up to what is read at the end."""
        wide = accumulate_dtype(delta.dtype)
        total = delta.sum(0, dtype=wide)
        size = tile.of(changes.size)
        off = (total - tile.of(changes.end)).norm(dim=-1)
        # a walk of two roundings a block, each of the stream as large as it is there: what one
        # block writes and another takes away again is not in its end
        walk = math.sqrt(2 * len(self._wiring.layers))
        bad = ~(off <= slack(delta.dtype, ROUNDINGS + walk) * size)
        if kept is not None:
            bad &= kept.to(bad.device)
        if bad.any():
            row, place = bad.nonzero()[0].tolist()
            raise self._wiring.decoder.refusal(
                f"what its parts write must add up to what is read after the last block, got "
                f"{float(off[row, place]):.3g} apart of {float(size[row, place]):.3g} at row "
                f"{row + tile.rows.start}, position {place + tile.at.start}"
            )

    def _readers(
        self, gradients: list[Gradients], end: torch.Tensor, tile: Tile, dtype: torch.dtype
    ) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """Groups of readers: (first, last, gradients `[R, B, P, d]`, prefix `[R]`)."""
        graph = self._wiring.graph
        prefix = torch.tensor(graph.prefix, device=end.device)
        some = tile.of(end)
        n = len(gradients)
        i = 0
        while i <= n:
            first, stop = graph.first_reader(i), i + 1
            while stop <= n and graph.first_reader(min(stop + 1, n)) - first <= READERS:
                stop += 1
            last = graph.first_reader(min(stop, n)) + (stop > n)
            g = some.new_empty(last - first, *some.shape, dtype=dtype)
            for layer in range(i, min(stop, n)):
                at = graph.first_reader(layer) - first
                count = graph.layers[layer].readers
                self._widen(layer, gradients[layer], tile, g[at : at + count])
            if stop > n:
                g[-1] = some
            yield first, last, g, prefix[first:last]
            i = stop

    def _widen(self, layer: int, given: Gradients, tile: Tile, out: torch.Tensor) -> None:
        """The readers of one block, `[R, B, P, d]`."""
        reading = self._wiring.layers[layer]
        at = 0
        for p, g in zip(reading.projections, given.heads, strict=True):
            part = tile.of(g).to(out.dtype).flatten(0, 1).transpose(0, 1)
            n = len(p.weight)
            into = out[at : at + n].view(n, -1, out.shape[-1])
            torch.bmm(part, p.weight.transpose(1, 2), out=into)
            at += n
        if reading.norm is not None:
            reading.norm.back_(out[:at])
        for stretch in given.stretches:
            share = tile.of(stretch.share).movedim(2, 0)
            out[:at].addcmul_(tile.of(stretch.along)[None], share[..., None], value=-1)
        if given.mlp is not None:
            out[at] = tile.of(given.mlp)


def _by_position(
    delta: torch.Tensor,
    grads: torch.Tensor,
    prefix: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Adds scores `[P, W, R]`: positions in the place of prompts."""
    weighted = grads * weights.to(grads)[:, None, None, None]
    each = torch.eye(grads.shape[1], dtype=out.dtype, device=out.device)
    edge_scores(
        delta.transpose(0, 1), weighted.transpose(0, 1), prefix=prefix, weights=each, out=out
    )
