# SPDX-License-Identifier: Apache-2.0
"""Items of an SAE's features, from what they do on text.

Windows of the text are divided at random: evidence comes from one half of them, questions from the
other. Features are drawn at random among those that fire often enough for both, and are not chosen
by how they look.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from mikernels.activations import Rows
from mikernels.evaluate.firing import Excerpts, Firing
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
        self._halves = [half.nonzero()[:, 0].tolist() for half in (~self._tested, self._tested)]
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
        where, _ = self._firing.of(feature)
        strength = self._firing.strength(feature).tolist()
        tested = self._tested[where]
        seen: set[tuple[str, ...]] = set()
        best = self._excerpts.strongest(where[~tested].tolist(), self._plan.examples, seen)
        # an excerpt of its own strength: the strongest row in it is the one that it is around
        peaks = [
            row
            for row in where[tested].tolist()
            if strength[row] == max(strength[r] for r in self._excerpts.around(row))
        ]
        active = self._excerpts.strongest(peaks, len(peaks), seen)
        fuzzing = self._game == "fuzzing"
        wanted = self._plan.questions if fuzzing else self._plan.questions // 2
        if len(best) < self._plan.examples or len(active) < wanted:
            return None
        silent = self._silent(strength, rng, 0, self._plan.examples, seen)
        others = [] if fuzzing else self._silent(strength, rng, 1, wanted, seen)
        if silent is None or others is None:
            return None
        evidence = [self._passage(inside, strength) for _, inside in best]
        placebo = [
            Passage(
                tokens=self._excerpts.texts(inside),
                scores=misplaced(shown.scores, len(inside), (), rng),
            )
            for shown, inside in zip(evidence, silent, strict=True)
        ]
        questions = []
        for place in _of_each_band(len(active), wanted, rng):
            passage = self._passage(active[place][1], strength)
            questions.append(
                Question(**passage.model_dump(), right=True, quarter=4 * place // len(active))
            )
        if fuzzing:
            # one of each two neighbours in strength
            for first in range(0, wanted, 2):
                number = first + rng.randrange(2)
                shown = questions[number]
                scores = wrong_scores(shown.scores, rng)
                questions[number] = Question(tokens=shown.tokens, scores=scores, right=False)
        for inside in others:
            passage = self._passage(inside, strength)
            questions.append(Question(**passage.model_dump(), right=False))
        return Material(f"feature {feature}", evidence, placebo, questions)

    def _passage(self, inside: Sequence[int], strength: Sequence[float]) -> Passage:
        return Passage(tokens=self._excerpts.texts(inside), scores=[strength[r] for r in inside])

    def _silent(
        self,
        strength: Sequence[float],
        rng: random.Random,
        half: int,
        n: int,
        seen: set[tuple[str, ...]],
    ) -> list[list[int]] | None:
        """Random excerpts without an activation; None where such are hard to find."""
        drawn = (rng.choice(self._halves[half]) for _ in range(TRIES * n))
        quiet = (r for r in drawn if not any(strength[i] for i in self._excerpts.around(r)))
        found = self._excerpts.strongest(quiet, n, seen)
        return [inside for _, inside in found] if len(found) == n else None


def _of_each_band(n: int, bands: int, rng: random.Random) -> list[int]:
    """Of 0..n - 1 in equal bands one number each."""
    edges = [-(-i * n // bands) for i in range(bands + 1)]
    return [rng.randrange(low, high) for low, high in zip(edges, edges[1:], strict=False)]
