# SPDX-License-Identifier: Apache-2.0
"""Batches that keep the time: what a library does between two of them is its training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


def orders(n: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of row numbers, every row once an epoch; the seed decides all of them."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while left.numel() < batch:
            left = torch.cat([left, torch.randperm(n, generator=generator)])
        yield left[:batch]
        left = left[batch:]


class Feed:
    """The same batches in the same order for everyone, and the CPU seconds between them.

    It is a source for our Trainer and an iterator for the others. The clock stands while a batch is
    made and while the curve is measured, so `seconds` holds a library's own loop and nothing else.

    Args:
        x: `[n, d]`. batch, steps: sizes of the run. seed: of the order.
        marks: points of the learning curve, evenly spaced over the run, the end being the last.

    Attributes:
        measure: called at the points with the SAE as it is; gives its variance unexplained.
        curve: dicts of step, tokens, cpu (seconds so far) and fvu.
        seconds: of the process, over all its threads.
    """

    def __init__(self, x: torch.Tensor, batch: int, steps: int, seed: int, marks: int):
        self.x, self.batch, self.steps, self.seed = x, batch, steps, seed
        self.d = x.shape[1]
        self.measure: Callable[[], float] | None = None
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0
        self._orders = orders(x.shape[0], batch, seed)
        self._points = {round(steps * (i + 1) / marks) for i in range(marks)}
        self._given = 0
        self._since: float | None = None

    def next_batch(self) -> torch.Tensor:
        self._stop()
        if self._given == self.steps:
            raise StopIteration
        batch = self.x[next(self._orders)]
        self._given += 1
        self._since = time.process_time()
        return batch

    __next__ = next_batch

    def __iter__(self) -> Feed:
        return self

    def finish(self) -> None:
        """After the last step; the library's own end of the run is part of its time."""
        self._stop()
        if self._given != self.steps:
            raise RuntimeError(f"Feed: {self.steps} batches must be taken, got {self._given}")

    def state_dict(self) -> dict[str, Any]:
        return {"given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("Feed: a run that is compared is not resumed; start it again")

    def _stop(self) -> None:
        if self._since is None:
            return
        self.seconds += time.process_time() - self._since
        self._since = None
        if self._given in self._points and self.measure is not None:
            self._points.discard(self._given)
            tokens = self._given * self.batch
            self.curve.append(
                {
                    "step": self._given,
                    "tokens": tokens,
                    "cpu": self.seconds,
                    "fvu": self.measure(),
                }
            )
