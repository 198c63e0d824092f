# SPDX-License-Identifier: Apache-2.0
"""What is known of each feature, as plain values: what pages, exports and tests read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

# of the activations above 0, from 0 to the feature's largest
BINS = 20


@dataclass(frozen=True)
class Example:
    """A feature's activations on a stretch of one window of text, around the strongest of them.

    Attributes:
        tokens: the text of each token. scores: the activation on each, 0 where it is not active.
        peak: the place in both of the strongest token. value: its activation.
        row: of the peak among all rows that were read. window: of the text, by number.
        position: of the peak in its window, None where the rows do not say.
        document: of the text, by number, None where the rows do not say.
    """

    tokens: list[str]
    scores: list[float]
    peak: int
    value: float
    row: int
    window: int
    position: int | None = None
    document: int | None = None

    def parts(self) -> list[tuple[str, float, bool]]:
        """Of each token its text, the activation on it, and whether it is the peak."""
        pairs = zip(self.tokens, self.scores, strict=True)
        return [(text, score, i == self.peak) for i, (text, score) in enumerate(pairs)]


@dataclass(frozen=True)
class FeatureView:
    """Everything that is known of one feature; a dead one has count 0, and nothing of activations.

    Attributes:
        number: 0..F-1, over all layers where there are several.
        label: short text for lists and search: the tokens with the largest shares.
        count: rows on which it is active. n_rows: rows that were read; count / n_rows is the
            density.
        maximum, mean: of its activations above 0; 0 of a dead one.
        histogram: `BINS` counts of its activations from 0 to the maximum, which the last one holds.
        tokens: (text, share of the sum of its activations), the largest first.
        examples: the strongest first, which share no token and no phrase (the peak and the four
            tokens before it).
        samples: of each lower quarter of its activations, from 0 to the maximum, some in order of
            strength, strongest first; they share nothing with each other or with the examples.
        promoted, suppressed: (token, score): the tokens whose logits its decoder row adds most to
            and least; empty without a model.
        similar: (feature, cosine of the decoder rows), the most similar first.
    """

    number: int
    label: str
    count: int
    n_rows: int
    maximum: float
    mean: float
    histogram: list[int]
    tokens: list[tuple[str, float]]
    examples: list[Example]
    samples: list[Example]
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]
    similar: list[tuple[int, float]]

    @property
    def density(self) -> float:
        """The share of the rows on which it is active."""
        return self.count / self.n_rows


class Features(Protocol):
    """The features of an SAE on some text, of which a view is made when it is asked for.

    Attributes:
        n_features: F. n_rows: tokens that were read.
        counts: `[F]` int64, rows on which each is active. maxima: `[F]` float32, 0 of dead ones.
        labels: F texts, as in the views; of dead ones "".
    """

    @property
    def n_features(self) -> int: ...

    @property
    def n_rows(self) -> int: ...

    @property
    def counts(self) -> torch.Tensor: ...

    @property
    def maxima(self) -> torch.Tensor: ...

    @property
    def labels(self) -> Sequence[str]: ...

    def view(self, feature: int) -> FeatureView:
        """Raises IndexError for another number than 0..F-1."""

    def views(self, start: int, stop: int) -> Iterator[FeatureView]:
        """Of features start..stop-1 (cut at F), made together: far faster than one by one."""
