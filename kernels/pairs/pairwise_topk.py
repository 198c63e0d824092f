# SPDX-License-Identifier: Apache-2.0
"""pairwise_topk: screened by a product that keeps maxima, settled by exact scores of few groups.

1. Rows of a are taken in panels. One fp16 product (`pairwise_group_max`) gives an upper bound of
   the strength of every pair and keeps the largest of each GROUP columns.
2. Groups are scored exactly, highest bounds first, until no bound of the others reaches the k-th
   strength: then they hold nothing that is wanted, whatever was found and whatever the data. A
   group that ties with the k-th pair counts only if it lies before it; what is not finite has no
   bound and comes first. Later panels know what earlier ones found.
3. Where bounds cannot separate (duplicates, more than one group in SHARE to be scored), where k is
   that large or the problem small, products in fp64 do the work: the definition, in blocks.

The host waits for counts, some three times per panel: this operator is no part of a training step.
Scratch: 64 MB of packed rows of either operand, 64 MB of maxima, 64 MB of sums where rows are long,
and some 100 MB for exact scores, whatever n, m and D.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..common.launch import ceil_div
from ..select.order import NOTHING
from .pairwise_exact import (
    FIRST,
    GROUP,
    PAIRS,
    Pairs,
    exact_scores,
    keys_of,
    product_scores,
)
from .pairwise_screen import Screen

# where bounds separate nothing: the spread of scores falls as the root of the columns
MOST_COLUMNS = 1 << 19
# multiplications that fp64 is done with before a screen has begun (0.1 ms on an H100)
LITTLE = 1 << 31
# a group's exact scores reuse nothing: where more than one in SHARE is wanted, fp64 products win
SHARE = 16
# groups scored first, if k is less; groups scored at a time
FEWEST, AT_ONCE = 256, 1 << 15


@dataclass(frozen=True)
class Found:
    """The best pairs so far, best first: key of the strength, score, place (row * m + column)."""

    k: int
    # key and place of the last pair that is still of use, while there are fewer than k
    floor: tuple[torch.Tensor, torch.Tensor]
    keys: torch.Tensor
    scores: torch.Tensor
    places: torch.Tensor

    @property
    def missing(self) -> int:
        return self.k - len(self.keys)

    def limit(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.floor if self.missing else (self.keys[-1], self.places[-1])

    def reached(self, keys: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Which of these come no later than the k-th pair."""
        key, place = self.limit()
        return (keys > key) | ((keys == key) & (places <= place))

    def add(self, keys: torch.Tensor, scores: torch.Tensor, places: torch.Tensor) -> Found:
        """With what is wanted among more pairs; NOTHING is no pair."""
        wanted = self.reached(keys, places)
        given = (keys, scores, places), (self.keys, self.scores, self.places)
        keys, scores, places = (torch.cat([old, t[wanted]]) for t, old in zip(*given, strict=True))
        order = places.argsort()
        order = order[keys[order].sort(descending=True, stable=True).indices[: self.k]]
        return replace(self, keys=keys[order], scores=scores[order], places=places[order])

    def settled(self, place: int) -> bool:
        """Whether no pair from this place on can be among the k best: there are k of NaN before."""
        return not self.missing and bool((self.keys[-1] == FIRST) & (self.places[-1] < place))


def by_groups(p: Pairs, first: int, bounds: torch.Tensor, found: Found) -> Found:
    """With what is wanted of the rows from `first` on, of whose groups `bounds` are known."""
    before, left = found, bounds.view(-1)
    (rows, groups), most = bounds.shape, bounds.numel() // SHARE
    # what may be NaN first, and in order: k of NaN are the end
    unbounded = left == FIRST
    if int(unbounded.sum()) > most:
        return by_products(p, first, first + rows, before, found)
    for chosen in unbounded.nonzero()[:, 0].split(AT_ONCE):
        found = found.add(*exact_scores(p, first, groups, chosen))
    left.masked_fill_(unbounded, NOTHING.value)
    place = torch.arange(first, first + rows, device=bounds.device)[:, None] * p.b.shape[2]
    offset = torch.arange(0, groups * GROUP, GROUP, device=bounds.device)
    done = 0
    while True:
        key, last = found.limit()
        wanted = (bounds > key) | ((bounds == key) & (place <= last - offset))
        count = int(wanted.sum())
        if count == 0:
            return found
        # too many seem wanted until the best are known: k groups first
        take = min(count, max(FEWEST, found.k - done)) if done < found.k else count
        if take > most:
            return by_products(p, first, first + rows, before, found)
        chosen = left.topk(min(take, AT_ONCE)).indices
        found = found.add(*exact_scores(p, first, groups, chosen))
        left[chosen] = NOTHING.value
        done += len(chosen)


def by_products(
    p: Pairs, first: int, last: int, found: Found, better: Found | None = None
) -> Found:
    """With what is wanted of rows first..last, by fp64 products; `better` knows of some of it."""
    m = p.b.shape[2]
    if better is not None:
        found = replace(found, floor=better.limit())
    rows = min(last - first, max(int(PAIRS**0.5), PAIRS // m))
    cols = max(1, PAIRS // rows)
    for i in range(first, last, rows):
        if found.settled(i * m):
            break
        for j in range(0, m, cols):
            found = found.add(*product_scores(p, slice(i, min(i + rows, last)), slice(j, j + cols)))
    return found


@torch.no_grad()
def pairwise_topk(
    a: torch.Tensor,
    b: torch.Tensor,
    row_scale: torch.Tensor | None,
    col_scale: torch.Tensor | None,
    row_rank: torch.Tensor | None,
    col_rank: torch.Tensor | None,
    k: int,
    by: str,
    min_value: float,
    symmetric: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mikernels::pairwise_topk` for a [B, P, n, D] and b [B, P, m, D] of any strides.

    `symmetric` saves nothing here but for ranks, of which tiles below the diagonal are left out.
    """
    n, m = a.shape[2], b.shape[2]
    size, device = min(k, n * m), a.device
    if row_rank is None or col_rank is None:
        row_rank = col_rank = None
    vectors = row_scale, col_scale, row_rank, col_rank
    p = Pairs(a, b, *(None if t is None else t.contiguous() for t in vectors), by == "abs")
    floor = keys_of(torch.tensor([min_value], dtype=torch.float64, device=device).float())[0]
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    # whatever its place
    last = torch.tensor(torch.iinfo(torch.int64).max, device=device)
    found = Found(size, (floor, last), nothing.int(), nothing.float(), nothing)
    groups = n * ceil_div(m, GROUP)
    if size == 0:
        pass
    elif n * m * p.columns <= LITTLE or p.columns > MOST_COLUMNS or size * SHARE > groups:
        found = by_products(p, 0, n, found)
    else:
        screen = Screen(p)
        for first in range(0, n, screen.rows):
            if found.settled(first * m):
                break
            found = by_groups(p, first, screen.maxima(first, min(n, first + screen.rows)), found)
    values = torch.cat([found.scores, found.scores.new_zeros(found.missing)])
    places = found.places // max(1, m), found.places % max(1, m)
    rows, cols = (torch.cat([t, t.new_full((found.missing,), -1)]) for t in places)
    return values, rows, cols
