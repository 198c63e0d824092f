# SPDX-License-Identifier: Apache-2.0
"""Passes of a model over blocks of windows, each made once for all the sources that read it.

The source that comes to a block first has the model run over it; what the block gives the others is
kept for them until they come there too. A source that falls far behind (nobody reads it, or its
training has ended) has its rows dropped and the block read again should it ask, so what is kept is
bounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch

from mikernels.activations.sources import BATCH, Rows
from mikernels.models.sites import Recorder

Place = tuple[int, int, int]
"""A block: the epoch, its first window, and how many it has."""
# batches of rows that may wait for a source, beside a block: one step of as many micro-batches
WAITING = 32


class Reader(Protocol):
    """A source as the passes see it."""

    batch_size: int | None

    def next_place(self) -> Place:
        """The block that it will ask for."""
        ...

    def untouched(self) -> bool:
        """Nothing has been read: it may be sent to any block first."""
        ...

    def names(self) -> tuple[str, ...]:
        """Its sites."""
        ...

    def select(self, tokens: torch.Tensor, recorded: Rows, number: int) -> Rows:
        """Its rows of windows `[w, t]`, the first the `number`-th, from what its sites gave."""
        ...

    def judge(self) -> None:
        """Raises if it cannot use what it has got."""
        ...


class Found:
    """What a block gives one source: parts, nothing past the end of an epoch, or an error."""

    def __init__(self) -> None:
        self.parts: list[Rows] = []
        self.error: Exception | None = None

    def attempt(self, take: Callable[[], Rows | None]) -> None:
        """Add what a source takes, unless it refuses, or has refused before."""
        if self.error is None:
            try:
                if (part := take()) is not None:
                    self.parts.append(part)
            except Exception as error:
                self.error = error

    def rows(self) -> Rows | None:
        if self.error is not None:
            raise self.error
        if not self.parts:
            return None
        return {name: torch.cat([part[name] for part in self.parts]) for name in self.parts[0]}

    def size(self) -> int:
        return sum(len(part["activations"]) for part in self.parts)


class Passes:
    """The passes of several sources over the same windows.

    Args:
        sources: those that share them.
        recorder: of all their sites.
        windows: starts reading an epoch.
        per_forward: windows of a pass.
    """

    def __init__(
        self,
        sources: Sequence[Reader],
        recorder: Recorder,
        windows: Callable[[], Iterator[torch.Tensor]],
        per_forward: int,
    ):
        self._recorder, self._windows = recorder, windows
        self._per_forward = per_forward
        self._open: tuple[int, int, Iterator[torch.Tensor]] | None = None
        self._checked = False
        self._waiting: dict[Reader, deque[tuple[Place, Found]]] = {s: deque() for s in sources}
        # they get nothing more until they ask
        self._behind: set[Reader] = set()

    def load(
        self, source: Reader, place: Place, tell: Callable[[int, int], None] | None = None
    ) -> Rows | None:
        """The rows of a block for one source; None past the epoch's last block.

        Args:
            tell: called with the tokens read of the block, from 0, and all of them.
        """
        queue = self._waiting[source]
        if queue and queue[0][0] == place:
            return queue.popleft()[1].rows()
        queue.clear()
        self._behind.discard(source)
        others = [other for other in self._waiting if self._follows(other, source, place)]
        found = self._read(place, [source, *others], tell)
        for other, mine in zip(others, found[1:], strict=True):
            self._waiting[other].append((place, mine))
        return found[0].rows()

    def rows(self, source: Reader, windows: list[torch.Tensor], number: int) -> Rows:
        """The rows of at least one given window for one source."""
        found = Found()
        self._run(windows, number, [source], [found])
        rows = found.rows()
        assert rows is not None
        return rows

    def _follows(self, other: Reader, source: Reader, place: Place) -> bool:
        """Whether another source comes to this block next, and not too far behind."""
        if other is source or other in self._behind:
            return False
        queue = self._waiting[other]
        if (
            sum(found.size() for _, found in queue) > WAITING * (other.batch_size or BATCH)
            and len(queue) > 1
        ):
            queue.clear()
            self._behind.add(other)
            return False
        if not queue:
            return other.untouched() or other.next_place() == place
        (epoch, start, count), last = queue[-1]
        ended = not last.parts and last.error is None
        return place == ((epoch + 1, 0, count) if ended else (epoch, start + count, count))

    def _read(
        self,
        place: Place,
        sources: Sequence[Reader],
        tell: Callable[[int, int], None] | None,
    ) -> list[Found]:
        epoch, start, count = place
        found = [Found() for _ in sources]
        try:
            if self._open is None or self._open[:2] != (epoch, start):
                reader = self._windows()
                # ends with the text: a saved block may lie anywhere
                for _ in zip(range(start), reader, strict=False):
                    pass
            else:
                reader = self._open[2]
            windows = [w for _, w in zip(range(count), reader, strict=False)]
            self._open = epoch, start + count, reader
            self._run(windows, start, sources, found, tell)
            for source, mine in zip(sources, found, strict=True):
                mine.attempt(source.judge)
        except Exception as error:
            # the others would come to the same
            for each in found:
                each.error = error
        return found

    def _run(
        self,
        windows: list[torch.Tensor],
        number: int,
        sources: Sequence[Reader],
        found: Sequence[Found],
        tell: Callable[[int, int], None] | None = None,
    ) -> None:
        """Run the model over windows, the first the epoch's `number`-th, and add what each source
        takes; a source that refuses what it gets has an error of its own."""
        done, total = 0, sum(map(len, windows))
        for tokens in stacks(windows, self._per_forward):
            if tell is not None:
                tell(done, total)
            going = [pair for pair in zip(sources, found, strict=True) if pair[1].error is None]
            if not going:
                break
            if not self._checked:
                # of one window, since this records more than what is asked for
                self._recorder.check(tokens[:1])
                self._checked = True
            wanted = {name for source, _ in going for name in source.names()}
            recorded = self._recorder.record(tokens, wanted)
            for source, mine in going:
                own = {name: recorded[name] for name in source.names()}
                mine.attempt(partial(source.select, tokens, own, number))
            number += len(tokens)
            done += tokens.numel()
        if tell is not None and windows:
            tell(done, total)


def stacks(windows: Iterable[torch.Tensor], most: int) -> Iterator[torch.Tensor]:
    """Windows `[w, t]` of one length each, at most so many, in their order."""
    held: list[torch.Tensor] = []
    for window in windows:
        if held and (len(held) == most or window.shape != held[0].shape):
            yield torch.stack(held)
            held = []
        held.append(window)
    if held:
        yield torch.stack(held)
