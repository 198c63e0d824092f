# SPDX-License-Identifier: Apache-2.0
"""Generated prompts: their answers follow from their text, and counterfactuals are aligned."""

import re
from dataclasses import replace

import pytest
import torch
from decoder_cases import TASK_WORDS, task_words, words_tokenizer

from mikernels.circuits import tasks


@pytest.fixture(scope="module")
def tokenizer():
    return task_words()


def words_of(task, row, side="prompts"):
    return re.findall(r"\w+", getattr(task, side)[row])


def check(task, n, tokenizer):
    again = getattr(tasks, task.name)(tokenizer, n)
    other = getattr(tasks, task.name)(tokenizer, n, seed=1)
    assert len(task) == n == len(set(task.prompts))
    assert torch.equal(task.input_ids, again.input_ids) and task.correct == again.correct
    assert task.prompts != other.prompts
    kept = task.attention_mask == 1
    # padded before the tokens, which are those of the text
    assert kept[:, -1].all()
    for row in range(n):
        for ids, side in (
            (task.input_ids, "prompts"),
            (task.counterfactual_ids, "counterfactuals"),
        ):
            tokens = ids[row][kept[row]].tolist()
            assert tokenizer.decode(tokens) == getattr(task, side)[row]
            assert 0 not in tokens
    return task


@pytest.mark.parametrize("counterfactual", ["abc", "flip"])
def test_ioi(tokenizer, counterfactual):
    task = check(tasks.ioi(tokenizer, 60), 60, tokenizer)
    task = tasks.ioi(tokenizer, 60, counterfactual=counterfactual)
    names = set(tasks.NAMES.split())
    first = 0
    for row in range(60):
        x, y, a = (w for w in words_of(task, row) if w in names)
        answer, wrong = (tokenizer.decode(ids[row]) for ids in (task.correct, task.wrong))
        assert a in (x, y) and wrong == a and answer == (y if a == x else x)
        first += a == x
        u, v, c = (w for w in words_of(task, row, "counterfactuals") if w in names)
        assert len({u, v, c, x, y}) == 5 if counterfactual == "abc" else (u, v, c) == (x, y, answer)
        assert task.target[row] == (task.correct[row][0], task.wrong[row][0])
    assert 15 < first < 45


def test_greater_than(tokenizer):
    task = check(tasks.greater_than(tokenizer, 30), 30, tokenizer)
    for row in range(30):
        digits = re.findall(r"\d", task.prompts[row])
        assert len(digits) == 6 and digits[:2] == digits[4:]
        right, wrong = (
            {int(tokenizer.decode([i])) for i in ids[row]} for ids in (task.correct, task.wrong)
        )
        tens = int(digits[2])
        assert right == set(range(tens + 1, 10)) and wrong == set(range(tens))
        assert re.findall(r"\d", task.counterfactuals[row])[2] == "0"
        sides = zip(task.target[row], (right, wrong), strict=True)
        for side, digits in sides:
            ids = side if isinstance(side, frozenset) else [side]
            assert {int(tokenizer.decode([i])) for i in ids} == digits


def test_induction(tokenizer):
    task = check(tasks.induction(tokenizer, 30), 30, tokenizer)
    for row in range(30):
        clean, other = (words_of(task, row, side) for side in ("prompts", "counterfactuals"))
        at = clean.index(clean[-1])
        assert clean[12:] == clean[: at + 1] and len(set(clean[:12])) == 12
        assert clean[at + 1] == tokenizer.decode(task.correct[row])
        assert other[at + 1] == tokenizer.decode(task.wrong[row])
        assert [i for i, (a, b) in enumerate(zip(clean, other, strict=True)) if a != b] == [at + 1]
    with pytest.raises(ValueError, match="length must be in 2.."):
        tasks.induction(tokenizer, 3, length=1)


def test_repeated_name(tokenizer):
    task = check(tasks.repeated_name(tokenizer, 40), 40, tokenizer)
    for row in range(40):
        clean, other = (words_of(task, row, side) for side in ("prompts", "counterfactuals"))
        for words, ids in ((clean, task.correct), (other, task.wrong)):
            # after the first mention of the last name stands its surname
            assert words[words.index(words[-1]) + 1] == tokenizer.decode(ids[row])


def test_paraphrases_say_the_same_in_one_wording_each(tokenizer):
    known = {w for text in TASK_WORDS[:5] for w in text.split()} | {*"0123456789"}
    for name, wordings in tasks.WORDINGS.items():
        found = tasks.variations(name, tokenizer, 12, seed=3)
        assert [task.name for task in found] == [name] * len(wordings) and len(wordings) > 3
        first = found[0]
        for task, wording in zip(found, wordings, strict=True):
            plain = " ".join(re.findall(r"\w+", re.sub(r"\{\w+\}", "", wording)))
            for row in range(12):
                words = words_of(task, row)
                assert " ".join(w for w in words if w not in known) == plain
                # the same names, things and years
                assert {*words} & known == {*words_of(first, row)} & known
            assert (task.correct, task.wrong) == (first.correct, first.wrong)


def test_perturbed_prompts_are_the_same_after_a_sentence(tokenizer):
    known = {w for text in TASK_WORDS[:5] for w in text.split()}
    for name, make in tasks.TASKS.items():
        plain = make(tokenizer, 12, 3)
        found = tasks.variations(name, tokenizer, 12, 3, kind="perturbed")
        for task, sentence in zip(found, tasks.SENTENCES, strict=True):
            assert not {*re.findall(r"\w+", sentence)} & known
            assert (task.correct, task.wrong) == (plain.correct, plain.wrong)
            for side in ("prompts", "counterfactuals"):
                before = re.findall(r"\w+", sentence)
                for row in range(12):
                    assert words_of(task, row, side) == before + words_of(plain, row, side)


def test_tasks_are_sliced_and_checked(tokenizer):
    task = tasks.repeated_name(tokenizer, 8)
    part = task[2:5]
    assert part.prompts == task.prompts[2:5] and torch.equal(part.input_ids, task.input_ids[2:5])
    for change, message in (
        ({"correct": task.wrong}, "row 0 of repeated_name must have answers"),
        ({"counterfactual_ids": task.input_ids}, "a counterfactual that differ"),
        ({"counterfactual_ids": task.input_ids[:, 1:]}, "of as many tokens"),
        ({"prompts": task.prompts[1:]}, r"as prompts \(7\)"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(task, **change)


def test_tokenizers_without_the_words_are_refused(tokenizer):
    few = words_tokenizer(["Mary", "John"])
    # 8 centuries and 60 years
    one = words_tokenizer(["war", *re.findall("[A-Za-z]+", tasks.YEARS), *"0123456789"])
    for make, message in (
        (lambda: tasks.ioi(few), r"ioi: tokenizer must have 6 of Adam, Alan, Alex, .* got 2"),
        (lambda: tasks.ioi(tokenizer, counterfactual="x"), "must be 'abc' or 'flip', got 'x'"),
        (lambda: tasks.ioi(tokenizer, 0), "n must be at least 1"),
        (lambda: tasks.variations("x", tokenizer), "name must be one of ioi, .* got 'x'"),
        (lambda: tasks.variations("ioi", tokenizer, kind="x"), "'paraphrase' or 'perturbed' for"),
        (lambda: tasks.variations("induction", tokenizer), "must be 'perturbed' for induction"),
        (lambda: tasks.greater_than(one, 481), r"n must be at most 480 different prompts, got 481"),
        (
            lambda: tasks.greater_than(
                words_tokenizer([*tasks.EVENTS.split(), "the", "year", "1"])
            ),
            "must make tokens of one digit, or of two in a year",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
