# SPDX-License-Identifier: Apache-2.0
"""What people are shown: evidence of a feature or component, and questions about other texts.

Two games, of which a person sees one (Paulo et al., arXiv 2410.13928, who let a model play them;
the evidence is what a person of Bills et al. 2023 reads):

    detection    in which of these texts is the feature active?
    fuzzing      in which of these texts are the right tokens shaded?

Half of an item's questions are to be answered with yes. Some items are controls: mismatched, where
the evidence is that of another feature and says nothing about the questions, and random, where the
shaded tokens of the evidence were drawn. What a person gets right on controls is luck, the look of
the texts, or a habit; features are judged by how much more it is on them. Some items come twice,
the second time long after the first.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mikernels.files import explained, read_json, write_json
from mikernels.schema import Passage, Question, RatedItems, check

FOLDER, ITEMS = "rate", "items.json"


@dataclass(frozen=True)
class Plan:
    """How many of what.

    Attributes:
        features: that are rated. controls: items whose evidence is wrong. repeats: of the features,
            how many come twice. examples: passages of evidence. questions: of each item, an even
            number. seed: of all that is drawn.

    Raises:
        ValueError: for numbers below their least, an odd one, more repeats than features.
    """

    features: int = 12
    controls: int = 4
    repeats: int = 2
    examples: int = 6
    questions: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("features", 1), ("controls", 0), ("repeats", 0), ("examples", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"rate: {name} must be at least {least}, got {getattr(self, name)}"
                )
        if self.repeats > self.features:
            raise ValueError(
                f"rate: repeats must be at most {self.features} (features), got {self.repeats}"
            )
        if self.questions < 2 or self.questions % 2:
            raise ValueError(
                f"rate: questions must be an even number of at least 2, got {self.questions}; half "
                f"of them are to be answered with yes"
            )

    @property
    def materials(self) -> int:
        """How many `compose` takes: a mismatched control is made of two."""
        return self.features + self.controls + (self.controls + 1) // 2


@dataclass(frozen=True)
class Material:
    """What items of one feature or component are made of.

    Attributes:
        name: of it. evidence: passages that show what it does. placebo: as many, with scores at
            random places. questions: half of them to be answered with yes.
    """

    name: str
    evidence: list[Passage]
    placebo: list[Passage]
    questions: list[Question]


def misplaced(
    scores: Sequence[float], length: int, free: Sequence[int], rng: random.Random
) -> list[float]:
    """The scores that are not 0, strongest first as far as there is room, at random places.

    Args:
        length: tokens of the text that they are put on.
        free: places to choose from; all of the text where these are too few.
    """
    values = sorted((s for s in scores if s), key=abs, reverse=True)[:length]
    places = rng.sample(free if len(free) >= len(values) else range(length), len(values))
    found = [0.0] * length
    for place, value in zip(places, values, strict=True):
        found[place] = value
    return found


def wrong_scores(scores: Sequence[float], rng: random.Random) -> list[float]:
    """A passage's scores on other tokens of it; where too few are free, the strongest one moves."""
    free = [i for i, score in enumerate(scores) if not score]
    found = misplaced(scores, len(scores), free, rng)
    peak = max(range(len(scores)), key=lambda i: abs(scores[i]))
    if found[peak] == scores[peak] and len(scores) > 1:
        other = rng.choice([i for i in range(len(scores)) if i != peak])
        found[peak], found[other] = found[other], found[peak]
    return found


def compose(
    kind: str, game: str, materials: Sequence[Material], plan: Plan, source: dict[str, Any]
) -> RatedItems:
    """The items of a plan, of as many materials.

    No feature is in two items, but for those that come twice: whom evidence reminds of an earlier
    item would know a control.

    Args:
        source: where they are from, for the file.

    Raises:
        ValueError: for too few materials.
    """
    if len(materials) < plan.materials:
        raise ValueError(
            f"rate: {plan.features} {kind}s with {plan.controls} controls must be made of "
            f"{plan.materials} {kind}s with enough text, got {len(materials)}; ask for fewer, or "
            f"give more text"
        )
    rng = random.Random(plan.seed)
    # also where the strongest come first, controls are made of no weaker ones than what is rated
    left = iter(rng.sample(materials[: plan.materials], plan.materials))
    parts: list[tuple[Material, list[Passage], str | None]] = []
    for number in range(plan.features + plan.controls):
        one = next(left)
        if number < plan.features:
            parts.append((one, one.evidence, None))
        elif (number - plan.features) % 2:
            parts.append((one, one.placebo, "random"))
        else:
            parts.append((one, next(left).evidence, "mismatched"))
    twice = rng.sample(range(plan.features), plan.repeats)
    made = {
        "format": "mikernels-rate-items",
        "version": 1,
        "kind": kind,
        "game": game,
        "seed": plan.seed,
        "source": source,
        "items": [
            {
                "id": f"{number}",
                "name": one.name,
                "control": control,
                "evidence": [passage.model_dump() for passage in evidence],
                "questions": [question.model_dump() for question in one.questions],
            }
            for number, (one, evidence, control) in enumerate(parts, 1)
        ],
        "repeats": [f"{1 + i}" for i in twice],
    }
    return RatedItems.model_validate(made)


def save_items(folder: Path, items: RatedItems) -> None:
    """Raises OSError when they cannot be written."""
    with explained("rate", "the items", folder / ITEMS, "free space or choose another RUN"):
        write_json(folder / ITEMS, items.model_dump())


def load_items(folder: Path) -> RatedItems:
    """Raises FileNotFoundError, ValueError: naming the file and the field."""
    path, fix = folder / ITEMS, "delete the folder to make new ones (and rate them again)"
    return check(RatedItems, read_json(path, "rate", "the items of a run", fix), "rate", path, fix)
