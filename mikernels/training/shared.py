# SPDX-License-Identifier: Apache-2.0
"""One source read once for several trainers, each of which has a position of its own.

A batch is read by the trainer that comes to it first, and kept for those at the same position until
they take it. One that is elsewhere (a resumed set of which some had saved a later step) reads from
its own position, and shares again from where it meets the others.
"""

from __future__ import annotations

import copy
from collections import deque
from typing import Any, NamedTuple

import torch

from mikernels.training.batches import BatchSource
from mikernels.values.batch import Batch

State = dict[str, Any]


class Kept(NamedTuple):
    """A batch, the position after it, and torch's generator before and after its reading."""

    batch: torch.Tensor | Batch
    after: State
    random: tuple[torch.Tensor, torch.Tensor]


class View:
    """The source as one of its readers has it: a BatchSource.

    Attributes:
        d, batch_size: of the source.
        waiting: batches read for it that it has not taken.
        position: after what it took. tail: after what waits for it.
    """

    def __init__(self, shared: Shared, position: State):
        self._shared = shared
        self.d = shared.source.d
        self.batch_size = getattr(shared.source, "batch_size", None)
        self.waiting: deque[Kept] = deque()
        self.position = position
        self.left = False

    @property
    def on_progress(self) -> Any:
        """Of a source that has it: who is told how far the reading is."""
        return self._shared.source.on_progress  # type: ignore[attr-defined]

    @on_progress.setter
    def on_progress(self, told: Any) -> None:
        self._shared.source.on_progress = told  # type: ignore[attr-defined]

    @property
    def tail(self) -> State:
        return self.waiting[-1].after if self.waiting else self.position

    def next_batch(self, *size: int) -> torch.Tensor | Batch:
        if not self.waiting:
            self._shared.read(self, *size)
        batch, self.position, (before, after) = self.waiting.popleft()
        # a source that draws from torch's generator would have moved this reader's, too
        if torch.equal(before, torch.get_rng_state()):
            torch.set_rng_state(after)
        return batch

    def leave(self) -> None:
        """Nothing is kept for it any more; it may still read."""
        self.left = True
        self.waiting.clear()

    def state_dict(self) -> State:
        return copy.deepcopy(self.position)

    def load_state_dict(self, state: State) -> None:
        self._shared.seek(state)
        self.waiting.clear()
        self.position = copy.deepcopy(state)


class Shared:
    """A source and its readers.

    Args:
        source: read by nobody else from now on.
    """

    def __init__(self, source: BatchSource):
        self.source = source
        self._at = copy.deepcopy(source.state_dict())
        self._error: Exception | None = None
        self._views: list[View] = []

    def view(self) -> View:
        """A reader more, at the source's position."""
        self._views.append(View(self, self._at))
        return self._views[-1]

    def seek(self, position: State) -> None:
        if not _same(position, self._at):
            self.source.load_state_dict(copy.deepcopy(position))
            self._at, self._error = position, None

    def read(self, view: View, *size: int) -> None:
        """The next batch for a view, and for the others that come to it next.

        Args:
            size: of the batch, the same for all, where the source leaves it open.
        """
        self.seek(before := view.position)
        if self._error is not None:
            raise self._error
        random = torch.get_rng_state()
        try:
            batch = self.source.next_batch(*size)
        except Exception as error:
            # the others come to the same, and not to what would be behind it
            self._error = error
            raise
        self._at = copy.deepcopy(self.source.state_dict())
        kept = Kept(batch, self._at, (random, torch.get_rng_state()))
        view.waiting.append(kept)
        for other in self._views:
            if other is not view and not other.left and _same(other.tail, before):
                other.waiting.append(kept)


def _same(a: State, b: State) -> bool:
    # one object while they go together: no need to compare
    return a is b or a == b
