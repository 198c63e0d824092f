# SPDX-License-Identifier: Apache-2.0
"""How many candidates a token of encode keeps, learned from the calls before.

Too few, and tokens are done again without the screen: in training on one batch (G1, H200) scores
gather below the k-th until a step took 41 ms instead of 9. So every call counts the tokens that its
candidates were too few for, and a later one, once the number has arrived on the host by itself,
keeps more. What is selected does not hang on how many were kept, nor do its bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# a share of uncertain tokens above which more are kept, by how much more, and at most
SHARE, MORE, MOST = 1 / 512, 1.5, 8.0
# calls without an uncertain token after which fewer are kept
QUIET = 200


@dataclass
class Kept:
    """For one size of encode on one device."""

    factor: float = 1.0
    quiet: int = 0
    # (uncertain tokens on the host, what is recorded behind their copy, tokens of that call)
    pending: tuple[torch.Tensor, Any, int] | None = None

    def candidates(self, c: int, most: int) -> int:
        """c times the factor in eights, at most `most` unless c is more."""
        self._read()
        return max(c, min(most, -(-int(c * self.factor) // 8) * 8))

    def count(self, uncertain: torch.Tensor, n: int) -> None:
        """Take note of a call: `uncertain` 0-dim int64 on the device, which is not waited for."""
        if self.pending is not None:
            return
        if uncertain.device.type != "cuda":
            self._learn(int(uncertain), n)
            return
        if torch.cuda.is_current_stream_capturing():
            return
        here = torch.empty((), dtype=torch.int64, pin_memory=True)
        here.copy_(uncertain, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self.pending = here, arrived, n

    def _read(self) -> None:
        if self.pending is None:
            return
        here, arrived, n = self.pending
        # an event must not be asked while a graph is recorded
        if not torch.cuda.is_current_stream_capturing() and arrived.query():
            self.pending = None
            self._learn(int(here), n)

    def _learn(self, uncertain: int, n: int) -> None:
        self.quiet = 0 if uncertain else self.quiet + 1
        if uncertain > SHARE * n:
            self.factor = min(MOST, self.factor * MORE)
        elif self.quiet >= QUIET:
            self.factor, self.quiet = max(1.0, self.factor / MORE), 0


_KEPT: dict[tuple[Any, ...], Kept] = {}


def kept_of(*key: Any) -> Kept:
    """What is known of a size; the same object for the same key."""
    return _KEPT.setdefault(key, Kept())
