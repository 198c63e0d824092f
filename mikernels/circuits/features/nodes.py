# SPDX-License-Identifier: Apache-2.0
"""Scores of features in coordinate form: which prompt, position and feature, and how much."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mikernels.values.intervals import Interval, mean_intervals


@dataclass(frozen=True)
class Node:
    """A feature, an error or a skip connection.

    Attributes:
        name: `14.mlp_out.f123`, `14.mlp_out.error`, `14.mlp_out.skip`.
        site: `14.mlp_out`. feature: its number, None for what is not one.
        score: the mean over prompts of what it adds to the number of the prompt over that of its
            counterfactual, with Student's 95 % interval over prompts (NaN for one prompt).
        at: (prompt, position) at which it adds most, by size; None for one that is nowhere.
    """

    name: str
    site: str
    feature: int | None
    score: Interval
    at: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class SiteScores:
    """What a site's features and error do, on the CPU.

    Attributes:
        site: its name. n_features: F.
        prompts, positions, features: int64 `[n]`, where a feature is active in the prompt or in its
            counterfactual, in that order.
        values, deltas: `[n]`, its activation, and less that in the counterfactual.
        gradients: `[n]`, of the number by the activation.
        scores: `[n]`, deltas times gradients.
        error: `[B, P]`, of the error node, 0 at padding. skip: of the skip connection, None for
            dictionaries without.
        whole: `[B, P]`: `<x - x', g>`, which scores, error and skip add up to.
    """

    site: str
    n_features: int
    prompts: torch.Tensor
    positions: torch.Tensor
    features: torch.Tensor
    values: torch.Tensor
    deltas: torch.Tensor
    gradients: torch.Tensor
    scores: torch.Tensor
    error: torch.Tensor
    skip: torch.Tensor | None
    whole: torch.Tensor

    def totals(self) -> torch.Tensor:
        """`[F]` float64: the mean over prompts of each feature's score, all positions together."""
        sums = np.bincount(
            self.features.numpy(), self.scores.double().numpy(), minlength=self.n_features
        )
        return torch.from_numpy(sums) / max(1, len(self.error))

    def nodes(self, features: list[int]) -> list[Node]:
        """Of some features, in the order given."""
        b = len(self.error)
        place = torch.full((self.n_features,), -1, dtype=torch.int64)
        place[features] = torch.arange(len(features))
        own = (place[self.features] >= 0).nonzero()[:, 0]
        column, scores = place[self.features[own]], self.scores[own].double()
        keys = (self.prompts[own] * len(features) + column).numpy()
        units = np.bincount(keys, scores.numpy(), minlength=b * len(features))
        intervals = mean_intervals(units.reshape(b, len(features)))
        # the strongest slot of each column: sorted by size, then stably by column
        by_size = scores.abs().argsort(descending=True, stable=True)
        by_column = by_size[column[by_size].argsort(stable=True)]
        starts = np.searchsorted(column[by_column].numpy(), np.arange(len(features)))
        found = []
        for i, (feature, interval) in enumerate(zip(features, intervals, strict=True)):
            at = None
            if starts[i] < len(by_column) and column[slot := by_column[starts[i]]] == i:
                at = int(self.prompts[own[slot]]), int(self.positions[own[slot]])
            found.append(Node(f"{self.site}.f{feature}", self.site, feature, interval, at))
        return found

    def rest(self) -> list[Node]:
        """The error's node, and that of a skip connection."""
        found = []
        for name, scores in (("error", self.error), ("skip", self.skip)):
            if scores is None:
                continue
            units = scores.double()
            at = divmod(int(units.abs().argmax()), units.shape[1])
            interval = mean_intervals(units.sum(1)[:, None].numpy())[0]
            found.append(Node(f"{self.site}.{name}", self.site, None, interval, at))
        return found


def joined(parts: list[SiteScores]) -> SiteScores:
    """Of batches of prompts in order, one site's scores."""
    first = parts[0]
    begin, prompts = 0, []
    for part in parts:
        prompts.append(part.prompts + begin)
        begin += len(part.error)

    def together(name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    names = ("positions", "features", "values", "deltas", "gradients", "scores", "error", "whole")
    found: dict[str, Any] = {name: together(name) for name in names}
    skip = None if first.skip is None else together("skip")
    return replace(first, prompts=torch.cat(prompts), skip=skip, **found)
