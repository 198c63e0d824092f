# SPDX-License-Identifier: Apache-2.0
"""Items of an SAE's features, from what they do on text.

Windows of the text are divided at random: evidence comes from one half of them, questions from the
other. Features are drawn at random among those that fire often enough for both, and are not chosen
by how they look.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch

from mikernels.activations import Rows
from mikernels.evaluate.excerpts import Excerpts, Shown
from mikernels.evaluate.firing import Firing, Slots
from mikernels.rate.items import Material, Plan, misplaced, wrong_scores
from mikernels.schema import Passage, Question

# rows drawn for each excerpt that must be without an activation
TRIES = 50


class FeatureMaterials:
    """Materials of features, in an order drawn by the seed.

    Args:
        firing: of all rows. rows: `token_ids` and `windows`. pieces: the text of every token id.
        plan: how many examples and questions each has. game: "detection" or "fuzzing".

    Attributes:
        drawn: features that were looked at; others fired too rarely, or nearly everywhere.

    Raises:
        ValueError: for rows without windows.
    """

    def __init__(
        self,
        firing: Firing,
        rows: Rows,
        pieces: dict[str, str],
        plan: Plan,
        game: str = "detection",
    ):
        if missing := [name for name in ("token_ids", "windows") if name not in rows]:
            raise ValueError(
                f"rate: activations must come with token_ids and windows, got no {missing[0]}; "
                f"write shards from ModelSource.read(), or give a model and text"
            )
        self._firing, self._excerpts = firing, Excerpts(rows, pieces)
        self._plan, self._game = plan, game
        windows = rows["windows"].unique()
        generator = torch.Generator().manual_seed(plan.seed)
        for_questions = windows[torch.randperm(len(windows), generator=generator)[::2]]
        self._tested = torch.isin(rows["windows"], for_questions)
        self._halves = [half.nonzero()[:, 0].numpy() for half in (~self._tested, self._tested)]
        self.drawn = 0

    def __iter__(self) -> Iterator[Material]:
        order = list(range(len(self._firing.counts)))
        random.Random(self._plan.seed).shuffle(order)
        for feature in order:
            self.drawn += 1
            found = self.of(feature)
            if found is not None:
                yield found

    def of(self, feature: int) -> Material | None:
        """None where its excerpts are too few."""
        rng = random.Random(f"{self._plan.seed}:{feature}")
        slots = self._firing.slots(feature, feature + 1)
        # each the strongest row of its excerpt
        peaks = slots.rows[self._excerpts.ranked(slots)].astype(np.int64)
        tested = self._tested.numpy()[peaks]
        shown = Shown()
        best = shown.take(self._excerpts.candidates(peaks[~tested]), self._plan.examples)
        active = shown.take(self._excerpts.candidates(peaks[tested]), len(peaks))
        fuzzing = self._game == "fuzzing"
        wanted = self._plan.questions if fuzzing else self._plan.questions // 2
        if len(best) < self._plan.examples or len(active) < wanted:
            return None
        silent = self._silent(slots, rng, 0, self._plan.examples, shown)
        others = [] if fuzzing else self._silent(slots, rng, 1, wanted, shown)
        if silent is None or others is None:
            return None
        strength = self._firing.strength(feature)
        evidence = [self._passage(row, strength) for row in best]
        placebo = [
            Passage(
                tokens=self._excerpts.texts(self._excerpts.around(row)),
                scores=misplaced(one.scores, len(self._excerpts.around(row)), (), rng),
            )
            for one, row in zip(evidence, silent, strict=True)
        ]
        questions = []
        for place in _of_each_band(len(active), wanted, rng):
            passage = self._passage(active[place], strength)
            questions.append(
                Question(**passage.model_dump(), right=True, quarter=4 * place // len(active))
            )
        if fuzzing:
            # one of each two neighbours in strength
            for first in range(0, wanted, 2):
                number = first + rng.randrange(2)
                one = questions[number]
                scores = wrong_scores(one.scores, rng)
                questions[number] = Question(tokens=one.tokens, scores=scores, right=False)
        for row in others:
            passage = self._passage(row, strength)
            questions.append(Question(**passage.model_dump(), right=False))
        return Material(f"feature {feature}", evidence, placebo, questions)

    def _passage(self, row: int, strength: torch.Tensor) -> Passage:
        inside = self._excerpts.around(row)
        scores = strength[inside.start : inside.stop].tolist()
        return Passage(tokens=self._excerpts.texts(inside), scores=scores)

    def _silent(
        self, slots: Slots, rng: random.Random, half: int, n: int, shown: Shown
    ) -> list[int] | None:
        """Rows of random excerpts without an activation; None where such are hard to find."""
        drawn = np.array(rng.choices(self._halves[half], k=TRIES * n), np.int64)
        low, high = self._excerpts.bounds(drawn)
        active = np.searchsorted(slots.rows, high) - np.searchsorted(slots.rows, low)
        found = shown.take(self._excerpts.candidates(drawn[active == 0]), n)
        return found if len(found) == n else None


def _of_each_band(n: int, bands: int, rng: random.Random) -> list[int]:
    """Of 0..n - 1 in equal bands one number each."""
    edges = [-(-i * n // bands) for i in range(bands + 1)]
    return [rng.randrange(low, high) for low, high in zip(edges, edges[1:], strict=False)]
