# SPDX-License-Identifier: Apache-2.0
"""Prompts whose answer is known, each beside a counterfactual of the same tokens but for some.

| task | a prompt | its answer | the counterfactual |
|---|---|---|---|
| `ioi` | Mary and John ... John gave the ring to | Mary, not John | other names, or the other one |
| `greater_than` | from the year 1745 to the year 17 | above 45, not below | from 1701 |
| `induction` | random words, again, cut off | the next of them | that word is another |
| `repeated_name` | Anna Clark and Tom Hughes ... Anna | Clark, not Hughes | surnames swapped |

Prompts are made from a seed, in any number, and differ; names and words are those of a list that
the tokeniser has as one token. That a prompt and its counterfactual are aligned is checked.
`variations` asks the same in other words, or after a sentence that says nothing about it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mikernels.circuits.prompts import pad_left

__all__ = ["Task", "greater_than", "induction", "ioi", "repeated_name", "variations"]

NAMES = """
    Adam Alan Alex Alice Amy Andrew Anna Anne Arthur Ben Bob Brian Carl Charles Chris Daniel David
    Elizabeth Emily Emma Eric Frank George Grace Henry Jack James Jane Jason Jim Joe John Julia Kate
    Kevin Laura Linda Lisa Louis Lucy Maria Mark Martin Mary Matthew Max Michael Mike Nancy Nick
    Oliver Paul Peter Rachel Richard Robert Rose Ruth Sam Sarah Scott Simon Sophie Steve Susan
    Thomas Tim Tom Victor Will William
"""
SURNAMES = """
    Adams Allen Anderson Baker Bell Bennett Brown Campbell Carter Clark Cole Collins Cook Cooper Cox
    Davis Edwards Evans Fisher Foster Gray Green Hall Harris Hill Hughes Jackson Johnson Jones Kelly
    King Lee Lewis Long Martin Miller Mitchell Moore Morgan Morris Murphy Nelson Parker Perry
    Phillips Porter Price Reed Roberts Robinson Rogers Ross Russell Scott Smith Stewart Taylor
    Thompson Turner Walker Ward Watson White Williams Wilson Wood Wright Young
"""
PLACES = """
    airport bank beach bridge castle church city farm forest garden hospital hotel house island lake
    library market mountain museum office park restaurant river school station store theater tower
    valley village
"""
THINGS = """
    apple bag ball basket bell book bottle box cake camera card chair clock coat coin cup drink
    flower gift guitar hammer hat key lamp letter map message mirror newspaper paper pen phone
    picture ring rope shirt stone ticket tool toy watch
"""
EVENTS = """
    alliance attack campaign conference conflict construction crisis debate dispute expedition
    famine festival journey mission occupation operation plan project reform revolution siege strike
    struggle trial war
"""
# A: the one that gives, who is named twice; B: the one that is given to
IOI = (
    "When {x} and {y} came to the {place}, {a} handed the {thing} to",
    "After {x} and {y} had left the {place}, {a} passed a {thing} to",
    "While {x} and {y} were walking to the {place}, {a} offered a {thing} to",
    "Once {x} and {y} sat down in the {place}, {a} showed the {thing} to",
    "As soon as {x} and {y} reached the {place}, {a} gave the {thing} to",
    "Yesterday {x} and {y} met near the {place}, and {a} brought a {thing} to",
)
YEARS = "The {event} went on from the year {century}{year} to the year {century}"
OTHER_YEARS = (
    "The {event} began in the year {century}{year} and was over in the year {century}",
    "It was in the year {century}{year} that the {event} began, and it ended in the year {century}",
    "They planned the {event} in the year {century}{year} and saw it in the year {century}",
)
FULL_NAMES = (
    "This morning {a} {s} and {b} {t} visited the {place}. In the evening, the {thing} was found "
    "by {a}",
    "At the {place}, {a} {s} was waiting for {b} {t} with a {thing}. Nobody had told {a}",
    "The {thing} belonged to {a} {s}, but {b} {t} took it to the {place}. Later we spoke to {a}",
    "Both {a} {s} and {b} {t} were seen at the {place}. The owner of the {thing} was {a}",
)
# before a prompt, which they say nothing about; no word of them is in a list above
SENTENCES = (
    "The weather was fine that day.",
    "It had been raining for a while.",
    "Nobody said anything about this.",
    "Somewhere a dog was heard.",
    "All of it is quite well known.",
)
# that of one prompt, until they are padded
_Row = tuple[list[int], list[int], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Task:
    """B prompts, their counterfactuals and answers.

    Attributes:
        name: of the task.
        prompts, counterfactuals: as text.
        input_ids, counterfactual_ids: `[B, P]` int64, padded before the tokens.
        attention_mask: `[B, P]`, of both.
        correct, wrong: of each prompt the token ids that answer it, and those that do not.
    """

    name: str
    prompts: tuple[str, ...]
    counterfactuals: tuple[str, ...]
    input_ids: torch.Tensor
    counterfactual_ids: torch.Tensor
    attention_mask: torch.Tensor
    correct: tuple[tuple[int, ...], ...]
    wrong: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        shape, b = self.input_ids.shape, len(self.prompts)
        sizes = {len(self.counterfactuals), len(self.correct), len(self.wrong), shape[0]}
        others = {self.counterfactual_ids.shape, self.attention_mask.shape}
        if sizes != {b} or others != {shape} or len(shape) != 2:
            raise ValueError(
                f"Task: {self.name} must have as many counterfactuals, ids and answers as prompts "
                f"({b}), of as many tokens, got {sorted(sizes)} and {sorted(map(list, others))} "
                f"for {list(shape)}"
            )
        changed = (self.input_ids != self.counterfactual_ids) & (self.attention_mask == 1)
        for row, (right, wrong) in enumerate(zip(self.correct, self.wrong, strict=True)):
            if not right or not wrong or set(right) & set(wrong) or not changed[row].any():
                raise ValueError(
                    f"Task: row {row} of {self.name} must have answers and a counterfactual that "
                    f"differ, got {right}, {wrong} for {self.prompts[row]!r}"
                )

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, part: slice) -> Task:
        """Some of the prompts."""
        return Task(
            self.name,
            self.prompts[part],
            self.counterfactuals[part],
            self.input_ids[part],
            self.counterfactual_ids[part],
            self.attention_mask[part],
            self.correct[part],
            self.wrong[part],
        )

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The keywords of a model."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def counterfactual_inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": self.counterfactual_ids, "attention_mask": self.attention_mask}

    @property
    def target(self) -> list[Any]:
        """For `gim_probe`: of each prompt the pair (correct, wrong), of tokens or of sets."""
        sides = (
            [row[0] if len(row) == 1 else frozenset(row) for row in answers]
            for answers in (self.correct, self.wrong)
        )
        return list(zip(*sides, strict=True))


class _Words:
    """What a tokeniser makes of words that stand within a sentence."""

    def __init__(self, where: str, tokenizer: Any, seed: int):
        self.where, self.tokenizer = where, tokenizer
        self.random = random.Random(seed)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def single(self, text: str, least: int) -> dict[str, int]:
        """Word -> its token after a space, of those that are one."""
        words = text.split()
        tokens = {word: self.plain(f" {word}") for word in words}
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        known = {word: ids[0] for word, ids in tokens.items() if len(ids) == 1 and ids != [unknown]}
        if len(known) < least:
            raise ValueError(
                f"{self.where}: tokenizer must have {least} of {', '.join(words[:3])}, ... as one "
                f"token each, got {len(known)}; make prompts of your own (Task)"
            )
        return known


def _task(name: str, words: _Words, n: int, make: Callable[[], _Row]) -> Task:
    """n different rows."""
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"{name}: n must be at least 1, got {n}")
    rows: dict[tuple[int, ...], _Row] = {}
    again = 0
    while len(rows) < n:
        row = make()
        before = len(rows)
        rows.setdefault(tuple(row[0]), row)
        again = again + 1 if len(rows) == before else 0
        # the last of m that are left out by so many draws in a row: once in e^20
        if again > 1000 + 20 * len(rows):
            raise ValueError(f"{name}: n must be at most {len(rows)} different prompts, got {n}")
    clean, other, correct, wrong = zip(*rows.values(), strict=True)
    for a, b in zip(clean, other, strict=True):
        if len(a) != len(b):
            raise ValueError(
                f"{name}: a counterfactual must be aligned with its prompt, got {len(b)} tokens "
                f"for {len(a)}: {words.tokenizer.decode(b)!r}"
            )
    given, ids = pad_left(list(clean)), pad_left(list(other))["input_ids"]
    mask = given.get("attention_mask", torch.ones_like(ids))
    texts, others = (tuple(words.tokenizer.decode(row) for row in side) for side in (clean, other))
    return Task(name, texts, others, given["input_ids"], ids, mask, correct, wrong)


def _after(before: str, template: str) -> str:
    return f"{before} {template}" if before else template


def ioi(
    tokenizer: Any,
    n: int = 100,
    seed: int = 0,
    *,
    counterfactual: str = "abc",
    templates: Sequence[str] = IOI,
    before: str = "",
) -> Task:
    """Indirect objects: two people, of whom one gives; who is given? (Wang et al., 2022)

    Both orders of the names (ABBA and BABA) are as frequent.

    Args:
        tokenizer: with names, places and things as single tokens.
        n: prompts. seed: of the draws.
        counterfactual: "abc": three other names, so that none is repeated; "flip": the other one is
            repeated, so that the answer is the other.
        templates: wordings, with {x}, {y}, {place}, {thing}, and {a}, who gives.
        before: a sentence before each prompt.

    Raises:
        ValueError: for a tokenizer without such words, or more prompts than there are.
    """
    if counterfactual not in ("abc", "flip"):
        raise ValueError(f"ioi: counterfactual must be 'abc' or 'flip', got {counterfactual!r}")
    words = _Words("ioi", tokenizer, seed)
    names, places, things = (
        words.single(*one) for one in ((NAMES, 6), (PLACES, 1), (THINGS, 1))
    )  # fmt: skip
    draw = words.random

    def make() -> _Row:
        template = _after(before, draw.choice(templates))
        a, b, c, d, e = draw.sample(sorted(names), 5)
        fixed = {"place": draw.choice(sorted(places)), "thing": draw.choice(sorted(things))}
        x, y = (a, b) if draw.random() < 0.5 else (b, a)
        other = {"x": c, "y": d, "a": e} if counterfactual == "abc" else {"x": x, "y": y, "a": b}
        clean, swapped = (
            words.ids(template.format(**fixed, **own)) for own in ({"x": x, "y": y, "a": a}, other)
        )
        return clean, swapped, (names[b],), (names[a],)

    return _task("ioi", words, n, make)


def greater_than(
    tokenizer: Any,
    n: int = 100,
    seed: int = 0,
    *,
    templates: Sequence[str] = (YEARS,),
    before: str = "",
) -> Task:
    """Years that end after they begin (Hanna et al., 2023).

    With two digits a token the answers are all later years of the century, and the wrong ones all
    earlier; with one digit a token they are the later and the earlier tens. The counterfactual
    begins in the century's first years, after which all is right.

    Args:
        tokenizer: with events as single tokens.
        n: prompts. seed: of the draws.
        templates: wordings, with {event}, "the year {century}{year}", and "the year {century}" at
            the end.
        before: a sentence before each prompt.

    Raises:
        ValueError: for a tokenizer of other numbers, or more prompts than there are.
    """
    words = _Words("greater_than", tokenizer, seed)
    events = words.single(EVENTS, 1)
    stem = words.plain(" the year 17")
    follows = {d: words.plain(f" the year 17{d}")[len(stem) :] for d in map(str, range(10))}
    pairs = {f"{y:02}": words.plain(f" the year 17{y:02}")[len(stem) :] for y in range(100)}
    by_two = all(len(ids) == 1 for ids in pairs.values())
    answers = pairs if by_two else follows
    if (
        any(len(ids) != 1 for ids in answers.values())
        or len(set(map(tuple, answers.values()))) < 10
    ):
        raise ValueError(
            "greater_than: tokenizer must make tokens of one digit, or of two in a year, got "
            f"{words.plain(' the year 1745')} for ' the year 1745'; make prompts of your own (Task)"
        )
    draw = words.random

    def make() -> _Row:
        century, year = draw.randint(11, 18), draw.randint(20, 79)
        event = draw.choice(sorted(events))
        # one wording takes no draw: these are the prompts that the same seed has always given
        template = _after(before, templates[0] if len(templates) == 1 else draw.choice(templates))
        clean, early = (
            words.ids(template.format(event=event, century=century, year=f"{y:02}"))
            for y in (year, draw.randint(1, 9))
        )
        own = year if by_two else year // 10
        later = tuple(ids[0] for text, ids in answers.items() if int(text) > own)
        earlier = tuple(ids[0] for text, ids in answers.items() if int(text) < own)
        return clean, early, later, earlier

    return _task("greater_than", words, n, make)


def induction(
    tokenizer: Any, n: int = 100, seed: int = 0, *, length: int = 12, before: str = ""
) -> Task:
    """A sequence of random words, repeated up to a word: the next is what followed it before.

    In the counterfactual another word followed it, which is the wrong answer.

    Args:
        tokenizer: with the words of this file as single tokens.
        n: prompts. seed: of the draws.
        length: words before they are repeated.
        before: a sentence before each prompt.

    Raises:
        ValueError: for a tokenizer without the words, or a length that is not in 2..their number.
    """
    words = _Words("induction", tokenizer, seed)
    known = words.single(f"{NAMES} {PLACES} {THINGS} {EVENTS}", 20)
    if not 2 <= length < len(known):
        raise ValueError(f"induction: length must be in 2..{len(known) - 1}, got {length}")
    start = words.ids(before)
    draw = words.random

    def make() -> _Row:
        *drawn, other = draw.sample(sorted(known.values()), length + 1)
        at = draw.randrange(length - 1)
        # the word at `at` is the last of the prompt; the answer followed it
        again = drawn[: at + 1]
        swapped = [*drawn[: at + 1], other, *drawn[at + 2 :]]
        return start + drawn + again, start + swapped + again, (drawn[at + 1],), (other,)

    return _task("induction", words, n, make)


def repeated_name(
    tokenizer: Any,
    n: int = 100,
    seed: int = 0,
    *,
    templates: Sequence[str] = FULL_NAMES,
    before: str = "",
) -> Task:
    """Two people with surnames; when the first is named again, so is the surname, not the other's.

    In the counterfactual the surnames are swapped, and so are the answers.

    Args:
        tokenizer: with names, places and things as single tokens.
        n: prompts. seed: of the draws.
        templates: wordings, with {a} {s} and {b} {t}, {place}, {thing}, and {a} at the end.
        before: a sentence before each prompt.

    Raises:
        ValueError: for a tokenizer without names as single tokens, or more prompts than there are.
    """
    words = _Words("repeated_name", tokenizer, seed)
    names, surnames = words.single(NAMES, 4), words.single(SURNAMES, 4)
    places, things = words.single(PLACES, 1), words.single(THINGS, 1)
    draw = words.random

    def make() -> _Row:
        template = _after(before, draw.choice(templates))
        a, b = draw.sample(sorted(names), 2)
        s, t = draw.sample(sorted(surnames.keys() - {a, b}), 2)
        fixed = {
            "a": a, "b": b, "place": draw.choice(sorted(places)),
            "thing": draw.choice(sorted(things)),
        }  # fmt: skip
        clean, swapped = (
            words.ids(template.format(**fixed, s=first, t=second))
            for first, second in ((s, t), (t, s))
        )
        return clean, swapped, (surnames[s],), (surnames[t],)

    return _task("repeated_name", words, n, make)


TASKS: dict[str, Callable[..., Task]] = {
    "ioi": ioi,
    "greater_than": greater_than,
    "induction": induction,
    "repeated_name": repeated_name,
}
WORDINGS = {"ioi": IOI, "greater_than": (YEARS, *OTHER_YEARS), "repeated_name": FULL_NAMES}


def variations(
    name: str, tokenizer: Any, n: int = 100, seed: int = 0, *, kind: str = "paraphrase"
) -> list[Task]:
    """The same task several times, for `stability`: what is found should not depend on which.

    Args:
        name: of the task.
        tokenizer, n, seed: as for the task. All variations have the same draws.
        kind: "paraphrase": one task for each wording, with the same names and things in all;
            "perturbed": one for each of `SENTENCES`, which stands before the task's own prompts.

    Raises:
        ValueError: for another name or kind, or paraphrases of "induction", which has no wording;
            as the task.

    Example:
        >>> tasks = circuits.tasks.variations("ioi", tokenizer, 4)
        >>> len(tasks) > 1 and all(len(task) == 4 for task in tasks)
        True
    """
    if name not in TASKS:
        raise ValueError(f"variations: name must be one of {', '.join(TASKS)}, got {name!r}")
    if kind == "perturbed":
        return [TASKS[name](tokenizer, n, seed, before=sentence) for sentence in SENTENCES]
    if kind != "paraphrase" or name not in WORDINGS:
        kinds = "'paraphrase' or 'perturbed'" if name in WORDINGS else "'perturbed'"
        raise ValueError(f"variations: kind must be {kinds} for {name}, got {kind!r}")
    return [TASKS[name](tokenizer, n, seed, templates=(one,)) for one in WORDINGS[name]]
