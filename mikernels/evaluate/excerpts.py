# SPDX-License-Identifier: Apache-2.0
"""Excerpts of text: the tokens around a row, and which rows of a feature to show.

An excerpt shows `BEFORE` tokens before a row and `AFTER` after it, as far as its window goes. A row
is a *peak* of a feature if no row of its excerpt is stronger. Of two peaks with the same phrase (a
token and the four before it), or with a token in common, the stronger one is shown, and at a tie
the first: texts repeat themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mikernels.activations import Rows
from mikernels.evaluate.firing import Slots

# tokens shown on either side of the strongest one
BEFORE, AFTER = 14, 8
# tokens of a phrase before the last one
PHRASE = 4
# candidates that are looked at in a go
BLOCK = 16
MISSING = "\ufffd"


def starts_of(windows: np.ndarray) -> np.ndarray:
    """The first row of each window, of `[n]` numbers of windows.

    Raises:
        ValueError: a window that is in several places.
    """
    changes = windows[1:] != windows[:-1]
    begins = np.flatnonzero(np.append(True, changes)[: len(windows)])
    names, times = np.unique(windows[begins], return_counts=True)
    if len(names) < len(begins):
        raise ValueError(
            f"excerpts: rows must be in reading order, each window in one piece, got window "
            f"{int(names[times > 1][0])} in several; read them with ModelSource.read()"
        )
    return begins


class Candidates(NamedTuple):
    """Rows that may be shown, `[n]` each.

    Attributes:
        low, high: the first row of each excerpt, and the one after its last. phrases: by number.
    """

    rows: np.ndarray
    low: np.ndarray
    high: np.ndarray
    phrases: np.ndarray


class Excerpts:
    """The excerpts of some rows of text.

    Args:
        rows: `token_ids` and `windows`, `[n]`, in reading order.
        pieces: the text of every token id, by the id as text.

    Raises:
        ValueError: a window that is in several places.
    """

    def __init__(self, rows: Rows, pieces: dict[str, str]):
        windows = rows["windows"].cpu().numpy()
        begins = starts_of(windows)
        # of each row its window's place, and of each window its rows
        lengths = np.diff(begins, append=len(windows))
        self._window = np.repeat(np.arange(len(begins), dtype=np.int32), lengths)
        self._names = windows[begins]
        self._ends = np.append(begins, len(windows))
        ids = rows["token_ids"].cpu().numpy()
        used, tokens = np.unique(ids, return_inverse=True)
        self.tokens = tokens.astype(np.int32)
        self.pieces = np.array([pieces.get(str(i), MISSING) for i in used.tolist()], object)
        self._phrases: np.ndarray | None = None

    @property
    def phrases(self) -> np.ndarray:
        """`[n]` int32: rows with one number end the same phrase."""
        if self._phrases is None:
            found = self.tokens.astype(np.int64)
            place = np.arange(len(found)) - self._ends[self._window]
            for back in range(1, PHRASE + 1):
                # 0 is the start of the window
                before = np.where(place >= back, np.roll(self.tokens, back) + 1, 0)
                # below rows x token ids, 2^31 2^20
                found = np.unique(found * (len(self.pieces) + 1) + before, return_inverse=True)[1]
            self._phrases = found.astype(np.int32)
        return self._phrases

    def bounds(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each row its excerpt's first row, and the one after its last."""
        window = self._window[rows]
        low = np.maximum(rows - BEFORE, self._ends[window])
        return low, np.minimum(rows + AFTER + 1, self._ends[window + 1])

    def peaks(self, slots: Slots) -> np.ndarray:
        """`[S]` bool: which activations are peaks of their features."""
        rows, values, features = slots.rows.astype(np.int64), slots.values, slots.features
        found = np.ones(len(rows), bool)
        first = np.arange(len(rows))
        for step in range(1, BEFORE + 1):
            # what is too far at one step is farther at the next
            first = first[: np.searchsorted(first, len(rows) - step)]
            second = first + step
            near = (
                (rows[second] - rows[first] <= BEFORE)
                & (features[second] == features[first])
                & (self._window[rows[second]] == self._window[rows[first]])
            )
            first, second = first[near], second[near]
            if not len(first):
                break
            found[second[values[first] > values[second]]] = False
            seen = rows[second] - rows[first] <= AFTER
            found[first[seen & (values[second] > values[first])]] = False
        return found

    def ranked(self, slots: Slots) -> np.ndarray:
        """Places of the peaks among the activations: by feature, strongest first, ties by row."""
        peaks = np.flatnonzero(self.peaks(slots))
        # floats above 0 are ordered as their bits are; stable, and slots are by row
        strength = slots.values[peaks].view(np.int32).astype(np.int64)
        order = np.argsort((slots.features[peaks] << 32) - strength, kind="stable")
        return peaks[order]

    def candidates(self, rows: np.ndarray) -> Candidates:
        """What `Shown.take` needs to know of these rows, in their order."""
        return Candidates(rows, *self.bounds(rows), self.phrases[rows])

    def window(self, rows: np.ndarray) -> np.ndarray:
        """Of each row the number of its window."""
        return self._names[self._window[rows]]

    def around(self, row: int) -> range:
        """The rows of an excerpt."""
        low, high = self.bounds(np.array([row]))
        return range(int(low[0]), int(high[0]))

    def texts(self, inside: Sequence[int]) -> list[str]:
        """Of each row its token."""
        return self.pieces[self.tokens[inside]].tolist()


class Shown:
    """What has been shown of a feature: no more of it is shown again."""

    def __init__(self) -> None:
        self._phrases: set[int] = set()
        self._rows: set[int] = set()

    def take(
        self, candidates: Candidates, n: int, start: int = 0, stop: int | None = None
    ) -> list[int]:
        """The first n rows of candidates start..stop-1 that show anything new.

        Their excerpts share no row with one shown before, nor with one left out since its phrase
        was: next to that stands more of the same text.
        """
        found: list[int] = []
        stop = len(candidates.rows) if stop is None else stop
        for begin in range(start, stop, BLOCK):
            if len(found) == n:
                break
            end = min(begin + BLOCK, stop)
            columns = (column[begin:end].tolist() for column in candidates)
            for row, low, high, phrase in zip(*columns, strict=True):
                if len(found) == n:
                    break
                if not self._rows.isdisjoint(range(low, high)):
                    continue
                self._rows.update(range(low, high))
                if phrase not in self._phrases:
                    self._phrases.add(phrase)
                    found.append(row)
        return found
