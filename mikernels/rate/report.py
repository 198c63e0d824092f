# SPDX-License-Identifier: Apache-2.0
"""What raters got right, on features and on controls, and how far they agree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mikernels.files import sha256_of
from mikernels.rate.agreement import agreement
from mikernels.rate.items import ITEMS, load_items
from mikernels.rate.session import RESERVED, load_ratings
from mikernels.schema import RatedItem, RatedItems, Ratings, Turn
from mikernels.values.intervals import Interval, mean_difference, mean_intervals

REPORT = "report.json"
NOTHING = Interval(float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True)
class Group:
    """Items of one sort; means over items (of each the mean over raters) with Student's interval.

    Attributes:
        items: how many. accuracy: the share of right answers; luck is 0.5. recall: of the questions
            to be answered with yes. specificity: of the others. rating: 1..5.
    """

    items: int
    accuracy: Interval
    recall: Interval
    specificity: Interval
    rating: Interval


@dataclass(frozen=True)
class ItemResult:
    """One item; accuracy has Wilson's interval over all answers, as if each were independent."""

    id: str
    name: str
    control: str | None
    raters: int
    accuracy: Interval
    rating: float
    descriptions: dict[str, str]


@dataclass(frozen=True)
class Agreement:
    """Cohen's kappa of two raters, or of one rater's two answers to what came twice.

    Attributes:
        raters: two names, or twice the same. items: that both finished; no controls.
        answers: of yes and no. ratings: with quadratic weights.
    """

    raters: tuple[str, str]
    items: int
    answers: Interval
    ratings: Interval


@dataclass(frozen=True)
class Report:
    """What people made of a run.

    Attributes:
        kind, game: as of the items. finished: of each rater, the turns, and of how many.
        groups: "rated", "controls", and "mismatched" and "random" of these.
        gain, rating_gain: rated less controls, with Welch's interval.
        quarters: recall by strength, from the strongest quarter of activations to the weakest.
        items: the best first. agreement: of each two raters, and of each one's two answers.
    """

    kind: str
    game: str
    finished: dict[str, tuple[int, int]]
    groups: dict[str, Group]
    gain: Interval
    rating_gain: Interval
    quarters: list[Interval]
    items: list[ItemResult]
    agreement: list[Agreement]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able but for numbers that are not finite."""
        return asdict(self, dict_factory=lambda pairs: {name: _plain(v) for name, v in pairs})


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return value.to_dict()
    return [_plain(v) for v in value] if isinstance(value, list) else value


@dataclass(frozen=True, eq=False)
class _Judged:
    """A finished turn: answers in the order of the item's questions."""

    rater: str
    turn: Turn
    item: RatedItem
    answers: np.ndarray
    right: np.ndarray

    @property
    def row(self) -> tuple[float, float, float, float]:
        """Accuracy, recall, specificity, rating."""
        hits, yes = self.answers == self.right, self.right
        assert self.turn.rating is not None
        return hits.mean(), hits[yes].mean(), hits[~yes].mean(), self.turn.rating


def read(folder: Path) -> tuple[RatedItems, dict[str, Ratings]]:
    """The items of a folder, and the ratings of each rater.

    Raises:
        FileNotFoundError: no items, or no ratings. ValueError: naming the file and the field.
    """
    items, digest = load_items(folder), sha256_of(folder / ITEMS)
    paths = [path for path in sorted(folder.glob("[!.]*.json")) if path.stem not in RESERVED]
    if not paths:
        raise FileNotFoundError(
            f"rate: {folder} must hold ratings, got none; rate the items first, without --report"
        )
    return items, {path.stem: load_ratings(path, items, digest) for path in paths}


def report(items: RatedItems, ratings: dict[str, Ratings]) -> Report:
    """All that is finished; what comes twice counts once, but for a rater's own agreement.

    Raises:
        ValueError: nobody has finished an item.
    """
    by_id = {item.id: item for item in items.items}
    done = [
        _judged(rater, turn, by_id[turn.item])
        for rater, found in ratings.items()
        for turn in found.turns
        if turn.finished
    ]
    first = [judged for judged in done if not judged.turn.repeat]
    if not first:
        raise ValueError("rate: at least one item must be rated, got none that is finished")
    rows: dict[str | None, list[tuple[float, ...]]] = {None: [], "mismatched": [], "random": []}
    results = []
    for item in items.items:
        of_item = [judged for judged in first if judged.item is item]
        if of_item:
            rows[item.control].append(tuple(np.mean([judged.row for judged in of_item], axis=0)))
            results.append(_result(of_item))
    controls = rows["mismatched"] + rows["random"]
    columns = {
        name: np.array(found).reshape(-1, 4)
        for name, found in {"rated": rows[None], "controls": controls, **rows}.items()
        if name
    }
    rated, others = columns["rated"], columns["controls"]
    return Report(
        kind=items.kind,
        game=items.game,
        finished={
            rater: (sum(bool(turn.finished) for turn in found.turns), len(found.turns))
            for rater, found in ratings.items()
        },
        groups={name: Group(len(found), *_means(found)) for name, found in columns.items()},
        gain=mean_difference(rated[:, 0], others[:, 0]),
        rating_gain=mean_difference(rated[:, 3], others[:, 3]),
        quarters=_quarters(judged for judged in first if judged.item.control is None),
        items=sorted(results, key=lambda r: (r.control is not None, -r.accuracy.value, r.id)),
        agreement=_agreements(list(ratings), done),
    )


def _judged(rater: str, turn: Turn, item: RatedItem) -> _Judged:
    answers = np.empty(len(turn.order), dtype=bool)
    answers[turn.order] = turn.answers
    right = np.array([question.right for question in item.questions])
    return _Judged(rater, turn, item, answers, right)


def _means(rows: np.ndarray) -> list[Interval]:
    """Of shares three times, and of ratings; bounds of a few items are cut to what can be."""
    if not len(rows):
        return [NOTHING] * 4
    ends = [(0.0, 1.0)] * 3 + [(1.0, 5.0)]
    return [
        Interval(mean, max(low, least), min(high, most))
        for (mean, low, high), (least, most) in zip(mean_intervals(rows), ends, strict=True)
    ]


def _result(judged: list[_Judged]) -> ItemResult:
    # half a second of imports that only this needs
    from scipy.stats import binomtest

    item = judged[0].item
    hits = np.concatenate([one.answers == one.right for one in judged])
    wilson = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return ItemResult(
        id=item.id,
        name=item.name,
        control=item.control,
        raters=len(judged),
        accuracy=Interval(float(hits.mean()), float(wilson.low), float(wilson.high)),
        rating=float(np.mean([one.row[3] for one in judged])),
        descriptions={one.rater: one.turn.description for one in judged if one.turn.description},
    )


def _quarters(judged: Iterable[_Judged]) -> list[Interval]:
    """Of each quarter the means over items, without those that have no such question."""
    of_item: dict[str, list[list[bool]]] = {}
    for one in judged:
        hits = of_item.setdefault(one.item.id, [[], [], [], []])
        for question, answer in zip(one.item.questions, one.answers.tolist(), strict=True):
            if question.right and question.quarter is not None:
                hits[question.quarter].append(answer)
    found = []
    for quarter in range(4):
        means = [np.mean(hits[quarter]) for hits in of_item.values() if hits[quarter]]
        found.append(mean_intervals(np.array(means)[:, None])[0] if means else NOTHING)
    return found


def _agreements(raters: list[str], done: list[_Judged]) -> list[Agreement]:
    def turns(rater: str, repeat: bool) -> dict[str, _Judged]:
        mine = (one for one in done if one.rater == rater and one.turn.repeat == repeat)
        # on controls people share their habits
        return {one.item.id: one for one in mine if one.item.control is None}

    pairs = [((a, b), turns(a, False), turns(b, False)) for a, b in combinations(raters, 2)]
    pairs += [((a, a), turns(a, False), turns(a, True)) for a in raters]
    found = []
    for names, one, other in pairs:
        both = [(one[i], other[i]) for i in one if i in other]
        if both:
            answers = [_pairs(a.answers.astype(int), b.answers.astype(int)) for a, b in both]
            ratings = [[(int(a.row[3]) - 1, int(b.row[3]) - 1)] for a, b in both]
            found.append(
                Agreement(names, len(both), agreement(answers, 2), agreement(ratings, 5, True))
            )
    return found


def _pairs(one: np.ndarray, other: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(one.tolist(), other.tolist(), strict=True))
