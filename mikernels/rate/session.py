# SPDX-License-Identifier: Apache-2.0
"""One rater's way through the items, kept in a file after every answer."""

from __future__ import annotations

import random
import re
from datetime import datetime, timezone
from pathlib import Path

from mikernels.files import explained, read_json, sha256_of, write_json
from mikernels.rate.items import ITEMS, load_items
from mikernels.schema import Entry, RatedItem, RatedItems, Ratings, Turn, check

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
RESERVED = ("items", "report")


def ratings_path(folder: Path, rater: str) -> Path:
    """Raises ValueError: for a name that is no file's, or another file's."""
    if not NAME.fullmatch(rater) or rater.lower() in RESERVED:
        raise ValueError(
            f"rate: --rater must be 1 to 40 letters, digits, '.', '-' or '_' and none of "
            f"{', '.join(RESERVED)}, got {rater!r}"
        )
    return folder / f"{rater}.json"


def load_ratings(path: Path, items: RatedItems, digest: str) -> Ratings:
    """A rater's file, which must be of these items.

    Raises:
        FileNotFoundError, ValueError: naming the file and the field.
    """
    fix = "move the file away to rate these items"
    found = check(Ratings, read_json(path, "rate", "ratings", fix), "rate", path, fix)
    if found.items != digest:
        raise ValueError(
            f"rate: {path} must be of the items in {path.parent / ITEMS}, got ratings of others; "
            f"{fix}"
        )
    sizes = {item.id: len(item.questions) for item in items.items}
    turns = [(turn.item, turn.repeat) for turn in found.turns]
    if sorted(turns) != sorted([(i, False) for i in sizes] + [(i, True) for i in items.repeats]):
        raise ValueError(f"rate: {path} must hold a turn of each item, got others; {fix}")
    for turn in found.turns:
        if len(turn.answers) != sizes[turn.item]:
            raise ValueError(
                f"rate: {path} must hold {sizes[turn.item]} answers of item {turn.item}, got "
                f"{len(turn.answers)}; {fix}"
            )
    return found


def turns(items: RatedItems, rng: random.Random) -> list[Turn]:
    """All items in random order; those that come twice in its first half, and again at the end."""
    twice = [item for item in items.items if item.id in items.repeats]
    once = [item for item in items.items if item.id not in items.repeats]
    rng.shuffle(once)
    half = max(0, len(items.items) // 2 - len(twice))
    early, late = once[:half] + twice, once[half:]
    rng.shuffle(early)
    again = [item for item in early if item.id in items.repeats]
    shown = [(item, False) for item in early + late] + [(item, True) for item in again]
    return [
        Turn(
            item=item.id,
            repeat=repeat,
            order=rng.sample(range(len(item.questions)), len(item.questions)),
            answers=[None] * len(item.questions),
        )
        for item, repeat in shown
    ]


class Session:
    """A rater's turns: a new file, or the one that there is.

    Raises:
        FileNotFoundError, ValueError: naming the file and the field. OSError: it cannot be written.
    """

    def __init__(self, folder: Path, rater: str):
        self.path = ratings_path(folder, rater)
        self.items = load_items(folder)
        digest = sha256_of(folder / ITEMS)
        if self.path.exists():
            self.ratings = load_ratings(self.path, self.items, digest)
        else:
            # raters differ in order, so that no item is always the first
            rng = random.Random(f"{self.items.seed}:{rater}")
            self.ratings = Ratings(
                format="mikernels-ratings",
                version=1,
                rater=rater,
                items=digest,
                turns=turns(self.items, rng),
            )
            self._write(self.ratings)

    @property
    def current(self) -> int | None:
        """The first turn that is not finished; None at the end."""
        unfinished = (i for i, turn in enumerate(self.ratings.turns) if not turn.finished)
        return next(unfinished, None)

    def item(self, turn: Turn) -> RatedItem:
        return next(item for item in self.items.items if item.id == turn.item)

    def save(self, entry: Entry) -> None:
        """Keep what was entered; a finished turn stays as it is.

        Raises:
            IndexError: it is of another turn than the current one.
            ValueError: other answers than questions, or a turn finished that is not complete;
                nothing has changed then.
            OSError: it cannot be written; nothing has changed then.
        """
        if entry.turn != self.current:
            raise IndexError(
                f"rate: turn must be {self.current}, got {entry.turn}; reload the page"
            )
        turn = self.ratings.turns[entry.turn]
        if len(entry.answers) != len(turn.answers):
            raise ValueError(
                f"rate: answers must be {len(turn.answers)}, got {len(entry.answers)}; reload the "
                f"page"
            )
        if entry.finish and (None in entry.answers or entry.rating is None):
            raise ValueError("rate: all questions and the rating must be answered, got fewer")
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        entered = {
            "answers": entry.answers,
            "rating": entry.rating,
            "description": entry.description,
            "finished": now if entry.finish else None,
        }
        turns = list(self.ratings.turns)
        turns[entry.turn] = turn.model_copy(update=entered)
        changed = self.ratings.model_copy(update={"turns": turns})
        self._write(changed)
        self.ratings = changed

    def _write(self, ratings: Ratings) -> None:
        with explained("rate", "the ratings", self.path, "free space; what was saved before stays"):
            write_json(self.path, ratings.model_dump())
