# SPDX-License-Identifier: Apache-2.0
"""The statistics: published values, other libraries', and raters whose answers are known."""

import json
import math
import random

import numpy as np
import pytest
from rate_cases import rated, some_items
from scipy import stats

from mikernels.files import finite
from mikernels.rate.agreement import agreement, kappa
from mikernels.rate.report import read, report
from mikernels.values.intervals import mean_difference

# Cohen's kappa of tables whose values are known: Wikipedia's three, and irr's data `anxiety`, of
# which its kappa2 gives 0.119, and 0.297 with squared weights
ANXIETY = (
    [3, 3, 3, 4, 5, 5, 2, 3, 5, 2, 2, 6, 1, 5, 2, 2, 1, 2, 4, 3],
    [3, 6, 4, 6, 2, 4, 2, 4, 3, 3, 2, 3, 3, 3, 2, 2, 1, 3, 3, 4],
)


@pytest.mark.parametrize(
    "table, value",
    [
        ([[20, 5], [10, 15]], 0.4),
        ([[45, 15], [25, 15]], 0.1304),
        ([[25, 35], [5, 35]], 0.2593),
        ([[3, 0, 0], [0, 4, 0], [0, 0, 5]], 1.0),
        ([[0, 5], [5, 0]], -1.0),
    ],
)
def test_kappa_of_known_tables(table, value):
    assert kappa(np.array(table)) == pytest.approx(value, abs=5e-5)


def test_kappa_of_ratings_weighs_how_far_they_are_apart():
    pairs = [[(a - 1, b - 1)] for a, b in zip(*ANXIETY, strict=True)]
    assert agreement(pairs, 6).value == pytest.approx(0.119, abs=5e-4)
    found = agreement(pairs, 6, weighted=True)
    assert found.value == pytest.approx(0.297, abs=5e-4)
    # with these weights kappa is 1 less the mean square, over that of all pairs
    a, b = np.array(ANXIETY)
    by_hand = 1 - ((a - b) ** 2).mean() / ((a[:, None] - b) ** 2).mean()
    assert found.value == pytest.approx(by_hand, abs=1e-14)
    # the interval is that of items drawn again
    drawn = np.random.default_rng(1).integers(0, 20, (2000, 20))
    again = [1 - ((a[i] - b[i]) ** 2).mean() / ((a[i][:, None] - b[i]) ** 2).mean() for i in drawn]
    assert found[1:] == pytest.approx(np.quantile(again, [0.025, 0.975]), abs=0.05)


def test_kappa_is_not_defined_where_all_is_one_category():
    assert math.isnan(kappa(np.array([[4, 0], [0, 0]])))
    found = agreement([[(1, 1)], [(1, 1)]], 2)
    assert all(map(math.isnan, found))


def test_difference_of_means_is_welchs():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 2, 9), rng.normal(0, 0.3, 4)
    found = mean_difference(a, b)
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert found == pytest.approx((a.mean() - b.mean(), interval.low, interval.high), rel=1e-12)
    assert mean_difference(np.ones(3), np.zeros(2)) == (1, 1, 1)
    assert math.isnan(mean_difference(a, b[:1]).low)
    assert math.isnan(mean_difference(a, b[:0]).value)


def test_report_of_raters_who_are_known(tmp_path):
    """Ada is right on features and always says yes to controls; Bob errs by his own dice."""
    items = some_items(tmp_path, features=6, controls=4, repeats=3, questions=4)
    dice = random.Random(7)
    bob = {item.id: [dice.random() < 0.5 for _ in item.questions] for item in items.items}
    score = {item.id: dice.randint(1, 5) for item in items.items}

    def ada(item, turn):
        right = [question.right for question in item.questions]
        return (right, 5, "a & b") if item.control is None else ([True] * 4, 2, "")

    def other(item, turn):
        # the second time the opposite
        wrong = bob[item.id]
        return ([not a for a in wrong] if turn.repeat else wrong), score[item.id], ""

    rated(tmp_path, "ada", ada)
    rated(tmp_path, "bob", other)
    found = report(*read(tmp_path))
    assert found.finished == {"ada": (13, 13), "bob": (13, 13)}
    own = {item.id: [q.right for q in item.questions] for item in items.items}
    features = [i.id for i in items.items if i.control is None]
    controls = [i.id for i in items.items if i.control]
    hits = {i: np.mean([a == b for a, b in zip(bob[i], own[i], strict=True)]) for i in own}
    by_item = np.array([(1 + hits[i]) / 2 for i in features])
    of_controls = np.array([(0.5 + hits[i]) / 2 for i in controls])
    group = found.groups["rated"]
    assert (group.items, found.groups["controls"].items) == (6, 4)
    assert (found.groups["mismatched"].items, found.groups["random"].items) == (2, 2)
    reach = stats.t.ppf(0.975, 5) * by_item.std(ddof=1) / math.sqrt(6)
    expected = (by_item.mean() + np.array([0, -reach, reach])).clip(max=1)
    assert group.accuracy == pytest.approx(expected, rel=1e-12)
    interval = stats.ttest_ind(by_item, of_controls, equal_var=False).confidence_interval()
    assert found.gain[1:] == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert (group.recall.value + group.specificity.value) / 2 == pytest.approx(expected[0])
    yes = {i: np.mean([a for a, b in zip(bob[i], own[i], strict=True) if b]) for i in own}
    assert group.recall.value == pytest.approx(np.mean([(1 + yes[i]) / 2 for i in features]))
    shares = [found.groups[name].specificity for name in ("mismatched", "random")]
    assert all(0 <= share.low <= share.value <= share.high <= 1 for share in shares)
    assert group.rating.value == pytest.approx(np.mean([(5 + score[i]) / 2 for i in features]))
    for item in found.items:
        n = 8 * item.accuracy.value
        right = 4 * (0.5 if item.control else 1) + 4 * hits[item.id]
        assert (n, item.raters) == (pytest.approx(right), 2)
        wilson = stats.binomtest(round(right), 8).proportion_ci(method="wilson")
        assert item.accuracy[1:] == pytest.approx((wilson.low, wilson.high))
        assert item.descriptions == ({} if item.control else {"ada": "a & b"})
    assert [i.control is None for i in found.items] == [True] * 6 + [False] * 4
    # quarters: ada finds all, bob what his dice say
    asked = {item.id: item.questions for item in items.items}
    for quarter in range(4):
        of_item = [
            [(1 + said) / 2 for q, said in zip(asked[i], bob[i], strict=True)
             if q.right and q.quarter == quarter]
            for i in features
        ]  # fmt: skip
        means = [np.mean(x) for x in of_item if x]
        value = found.quarters[quarter].value
        assert value == pytest.approx(np.mean(means)) if means else math.isnan(value)
    pairs = {pair.raters: pair for pair in found.agreement}
    assert {k: p.items for k, p in pairs.items()} == {
        ("ada", "bob"): 6,
        ("ada", "ada"): 3,
        ("bob", "bob"): 3,
    }
    a = np.concatenate([own[i] for i in features])
    b = np.concatenate([bob[i] for i in features])
    luck = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    value = ((a == b).mean() - luck) / (1 - luck)
    assert pairs["ada", "bob"].answers.value == pytest.approx(value, abs=1e-12)
    assert pairs["ada", "ada"].answers == (1, 1, 1)
    assert pairs["bob", "bob"].answers.value < 0
    assert math.isnan(pairs["ada", "ada"].ratings.value)  # always 5
    json.dumps(finite(found.to_dict()), allow_nan=False)


def test_what_is_not_finished_does_not_count(tmp_path):
    items = some_items(tmp_path, features=3, controls=0, repeats=1, questions=4)
    with pytest.raises(FileNotFoundError, match="must hold ratings, got none; rate the items"):
        read(tmp_path)
    rated(tmp_path, "ada", lambda item, turn: ([True] * 4, 3, ""), turns=0)
    with pytest.raises(ValueError, match="at least one item must be rated, got none"):
        report(*read(tmp_path))
    rated(tmp_path, "ada", lambda item, turn: ([True] * 4, 3, ""), turns=1)
    found = report(*read(tmp_path))
    assert (found.finished, len(found.items)) == ({"ada": (1, 4)}, 1)
    assert found.groups["rated"].accuracy.value == 0.5
    assert math.isnan(found.groups["controls"].accuracy.value)
    assert found.agreement == []
    # of other items
    text = (tmp_path / "items.json").read_text()
    (tmp_path / "items.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match=r"ada.json must be of the items in .*, got ratings of"):
        read(tmp_path)
    assert items.seed == 0
