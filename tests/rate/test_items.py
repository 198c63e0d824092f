# SPDX-License-Identifier: Apache-2.0
"""What raters are shown is what the feature does, half of it right, and controls are wrong."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from decoder_cases import IDS, tiny
from rate_cases import WINDOW, number, truth, world

from mikernels.circuits import gim_probe
from mikernels.circuits.attribution import attribute
from mikernels.evaluate.excerpts import Excerpts, Shown
from mikernels.evaluate.firing import encode_all
from mikernels.nn import BatchTopKSAE, JumpReLUSAE
from mikernels.rate import save_evidence
from mikernels.rate.components import component_materials, load_evidence
from mikernels.rate.features import FeatureMaterials
from mikernels.rate.items import Plan, compose, load_items, save_items, wrong_scores


@pytest.fixture(scope="module")
def known():
    sae, rows, pieces = world()
    return encode_all(sae, rows["activations"]), rows, pieces


def rows_of(passages, feature=0):
    return {row for passage in passages for row, _ in truth(passage, feature)}


@pytest.mark.parametrize(
    "sae, settings", [(BatchTopKSAE, {"k": 3}), (JumpReLUSAE, {"target_l0": 3})]
)
def test_codes_of_any_form_fire_where_they_are(sae, settings):
    torch.manual_seed(0)
    judged = sae(8, 20, **settings).eval()
    x = torch.randn(100, 8)
    firing = encode_all(judged, x, batch=32)
    dense = torch.cat([judged.encode(part).to_dense() for part in x.split(32)])
    assert int((dense > 0).sum()) > 100
    for feature in range(20):
        assert torch.equal(firing.strength(feature), dense[:, feature].detach().clamp(min=0))
        assert firing.counts[feature] == (dense[:, feature] != 0).sum()


def test_a_phrase_is_shown_once():
    ids = torch.tensor([1, 2, 3, 4, 5, 9] * 20)
    rows = {"token_ids": ids, "windows": torch.arange(120) // 60}
    excerpts = Excerpts(rows, {str(i): f"w{i}" for i in range(10)})
    shown = Shown()
    assert shown.take(excerpts.candidates(np.array([4, 34, 100])), 9) == [4]
    # the start of a window has nothing before it; beside 100 stands what was shown before
    assert shown.take(excerpts.candidates(np.array([101, 60, 28])), 9) == [60]


def test_a_window_in_two_places_is_refused():
    rows = {"token_ids": torch.arange(6), "windows": torch.tensor([4, 4, 5, 5, 4, 4])}
    with pytest.raises(ValueError, match="excerpts: rows must be .* got window 4 in several"):
        Excerpts(rows, {})


def test_questions_of_the_detection_game_are_half_active(known):
    firing, rows, pieces = known
    plan = Plan(examples=5, questions=8)
    materials = list(FeatureMaterials(firing, rows, pieces, plan))
    assert sorted(number(m.name) for m in materials) == list(range(12))
    windows_shown, windows_asked = set(), set()
    for material in materials:
        feature = number(material.name)
        assert len(material.evidence) == len(material.placebo) == 5
        assert len(material.questions) == 8
        windows_shown |= {row // WINDOW for row in rows_of(material.evidence + material.placebo)}
        windows_asked |= {row // WINDOW for row in rows_of(material.questions)}
        for question in material.questions:
            active = [on for _, on in truth(question, feature)]
            assert active == [score > 0 for score in question.scores]
            assert question.right == any(active)
        quarters = Counter(q.quarter for q in material.questions if q.right)
        assert quarters == {0: 1, 1: 1, 2: 1, 3: 1}
        by_quarter = sorted((q.quarter, -max(q.scores)) for q in material.questions if q.right)
        assert by_quarter == sorted(by_quarter, key=lambda pair: pair[1])
        for passage, placebo in zip(material.evidence, material.placebo, strict=True):
            assert [on for _, on in truth(passage, feature)] == [s > 0 for s in passage.scores]
            assert not any(on for _, on in truth(placebo, feature))
            kept = sorted(s for s in passage.scores if s)[-len(placebo.tokens) :]
            assert sorted(s for s in placebo.scores if s) == kept
    assert not windows_shown & windows_asked
    shown = torch.isin(rows["windows"], torch.tensor(sorted(windows_shown)))
    for material in materials:
        best = [max(passage.scores) for passage in material.evidence]
        assert best == sorted(best, reverse=True)
        assert best[0] == firing.strength(number(material.name))[shown].max()
    again = list(FeatureMaterials(firing, rows, pieces, plan))
    assert materials == again
    other = FeatureMaterials(firing, rows, pieces, Plan(seed=1, examples=5, questions=8))
    assert [m.name for m in other] != [m.name for m in again]


def test_wrong_tokens_of_the_fuzzing_game_are_not_active(known):
    material = next(iter(FeatureMaterials(*known, Plan(questions=6), "fuzzing")))
    feature = number(material.name)
    assert sum(q.right for q in material.questions) == 3
    for question in material.questions:
        active = [on for _, on in truth(question, feature)]
        shown = [score > 0 for score in question.scores]
        assert sum(active) == sum(shown) > 0
        assert active == shown if question.right else not any(map(min, active, shown))
        assert question.quarter is None or question.right


def test_features_without_enough_text_are_left_out(known):
    firing, rows, pieces = known
    # some 60 excerpts of each feature in a half
    materials = FeatureMaterials(firing, rows, pieces, Plan(questions=300))
    assert list(materials) == [] and materials.drawn == 12
    with pytest.raises(ValueError, match="must come with token_ids and windows, got no windows"):
        FeatureMaterials(firing, {"token_ids": rows["token_ids"]}, pieces, Plan())


@pytest.mark.parametrize("scores", [[1.0, -3.0, 2.0, 0.5], [0.0, 2.0], [5.0, 0.0, 0.0]])
def test_wrong_scores_are_the_same_elsewhere(scores):
    for seed in range(50):
        found = wrong_scores(scores, random.Random(seed))
        assert sorted(found) == sorted(scores)
        peak = max(map(abs, scores))
        assert abs(found[[abs(s) for s in scores].index(peak)]) < peak


def test_controls_are_wrong_and_no_feature_is_in_two_items(known, tmp_path):
    plan = Plan(features=5, controls=3, repeats=2)
    materials = list(FeatureMaterials(*known, plan))
    items = compose("feature", "detection", materials, plan, {"sae": "x"})
    assert Counter(i.control for i in items.items) == {None: 5, "mismatched": 2, "random": 1}
    of = {}
    for item in items.items:
        feature = number(item.name)
        active = [[f for f in range(12) if any(on for _, on in truth(p, f))] for p in item.evidence]
        shaded = [[t for t, s in zip(p.tokens, p.scores, strict=True) if s] for p in item.evidence]
        if item.control == "random":
            assert not any(feature in fs for fs in active)
            owners = {feature}
        else:
            (owner,) = {t.split("@")[0] for tokens in shaded for t in tokens}
            assert (owner == f" f{feature}") == (item.control is None)
            owners = {feature, int(owner[2:])}
        for owner in owners:
            assert of.setdefault(owner, item.id) == item.id
    by_id = {item.id: item for item in items.items}
    assert len(items.repeats) == 2 and not any(by_id[i].control for i in items.repeats)
    save_items(tmp_path, items)
    assert load_items(tmp_path) == items
    with pytest.raises(ValueError, match="5 features with 3 controls must be made of 10 features"):
        compose("feature", "detection", materials[:9], plan, {})
    text = (tmp_path / "items.json").read_text().replace('"right": true', '"right": false', 1)
    (tmp_path / "items.json").write_text(text)
    with pytest.raises(ValueError, match=r"items.0.*half of 10 questions right, got 4"):
        load_items(tmp_path)


@pytest.mark.parametrize(
    "numbers, message",
    [
        ({"features": 0}, "features must be at least 1, got 0"),
        ({"controls": -1}, "controls must be at least 0, got -1"),
        ({"examples": 0}, "examples must be at least 1, got 0"),
        ({"features": 3, "repeats": 4}, r"repeats must be at most 3 \(features\), got 4"),
        ({"questions": 7}, "questions must be an even number of at least 2, got 7"),
    ],
)
def test_plans_that_cannot_be(numbers, message):
    with pytest.raises(ValueError, match=f"rate: {message}"):
        Plan(**numbers)


def test_components_by_their_scores_at_the_tokens_of_prompts(tmp_path):
    model = tiny("llama", torch.float32)
    prompts = torch.randint(2, 50, (8, 6), generator=torch.Generator().manual_seed(1))
    probe = gim_probe(model, prompts, 7)
    save_evidence(probe, tmp_path / "probe.json")
    evidence = load_evidence(tmp_path / "probe.json")
    assert [unit.name for unit in evidence.units] == [c.name for c in probe.ranking]
    scores = {c: probe.scores[:, :, i] for i, c in enumerate(probe.names)}
    for unit in evidence.units:
        assert torch.equal(torch.tensor([t.scores for t in unit.texts]), scores[unit.name])
        assert [t.tokens for t in unit.texts] == probe.tokens
    plan = Plan(features=2, controls=2, repeats=1, examples=4, questions=4)
    materials = component_materials(evidence, plan)
    assert [m.name for m in materials] == [unit.name for unit in evidence.units]
    texts = {tuple(tokens): i for i, tokens in enumerate(probe.tokens)}
    for material in materials:
        asked = [texts[tuple(q.tokens)] for q in material.questions]
        shown = [texts[tuple(p.tokens)] for p in material.evidence]
        assert sorted(asked + shown) == list(range(8))
        for question, row in zip(material.questions, asked, strict=True):
            own = scores[material.name][row].tolist()
            assert (question.scores == own) == question.right
            assert sorted(question.scores) == sorted(own)
    assert compose("component", "fuzzing", materials, plan, {}).kind == "component"
    assert component_materials(evidence, Plan(examples=5, questions=4)) == []
    save_evidence(attribute(model, IDS, 7), tmp_path / "all.json")
    (unit,) = load_evidence(tmp_path / "all.json").units
    assert unit.name == "all" and len(unit.texts) == 2
