# SPDX-License-Identifier: Apache-2.0
"""Which tokens a feature's activations are on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mikernels.evaluate.excerpts import Excerpts
from mikernels.evaluate.firing import Firing, Slots

# of a label
WORDS = 3


@dataclass(frozen=True)
class Shares:
    """Of every feature the texts that hold the largest shares of its activations.

        share = sum of its activations on tokens of this text / sum of its activations

    Attributes:
        texts: all that there are. numbers: `[F, n]` int32, places in them, the largest share first,
            ties by place; -1 where there are fewer. shares: `[F, n]` float32.
    """

    texts: list[str]
    numbers: np.ndarray
    shares: np.ndarray

    def of(self, feature: int) -> list[tuple[str, float]]:
        pairs = zip(self.numbers[feature].tolist(), self.shares[feature].tolist(), strict=True)
        return [(self.texts[number], share) for number, share in pairs if number >= 0]

    def label(self, feature: int) -> str:
        """Its first texts in a line; "" of a dead feature."""
        words = (self.texts[n] for n in self.numbers[feature, :WORDS].tolist() if n >= 0)
        return " \u00b7 ".join(word.strip() or repr(word)[1:-1] for word in words)


def shares_of(firing: Firing, excerpts: Excerpts, n: int) -> Shares:
    """Of all features, in one pass over the activations, summed in float64."""
    # tokens of one text are one: a reader sees no more
    texts, same = np.unique(excerpts.pieces, return_inverse=True)
    of_row = same.astype(np.int32)[excerpts.tokens]
    numbers = np.full((firing.n_features, n), -1, np.int32)
    shares = np.zeros((firing.n_features, n), np.float32)
    for slots in firing.chunks(0, firing.n_features):
        row, number, share = _largest(slots, of_row[slots.rows], len(texts), n)
        place = np.arange(len(row)) - np.searchsorted(row, row)
        numbers[slots.start + row, place] = number
        shares[slots.start + row, place] = share
    return Shares(texts.tolist(), numbers, shares)


def _largest(
    slots: Slots, texts: np.ndarray, n_texts: int, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(feature counted from the first, text, share), the n largest of each in order."""
    from scipy.sparse import csr_matrix

    count = len(slots.offsets) - 1
    sums = csr_matrix(
        (slots.values.astype(np.float64), texts, slots.offsets), shape=(count, n_texts)
    )
    sums.sum_duplicates()
    row = np.repeat(np.arange(count), np.diff(sums.indptr))
    order = np.lexsort((sums.indices, -sums.data, row))
    kept = order[np.arange(len(row)) - sums.indptr[row] < n]
    total = np.bincount(row, sums.data, count)
    return row[kept], sums.indices[kept], sums.data[kept] / total[row[kept]]
