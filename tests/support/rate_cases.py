# SPDX-License-Identifier: Apache-2.0
"""Features whose activations can be read off the text: the token `f7@120!` is of row 120, and
feature 7 alone is active there; `-@121<` is of a row without any."""

import re

import torch

from mikernels.evaluate.firing import encode_all
from mikernels.nn import TopKSAE
from mikernels.rate.features import FeatureMaterials
from mikernels.rate.items import Plan, compose, save_items
from mikernels.rate.session import Session
from mikernels.schema import Entry

F, WINDOW, ROWS = 12, 40, 12_000


def world():
    """An SAE, rows and pieces; a row in 8 has a feature, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    sae = TopKSAE(F, F, 1).eval()
    with torch.no_grad():
        sae.w_enc.copy_(torch.eye(F))
        sae.w_dec.copy_(torch.eye(F))
    feature = torch.randint(0, F, (ROWS,), generator=generator)
    silent = torch.rand(ROWS, generator=generator) > 1 / 8
    strength = torch.rand(ROWS, 1, generator=generator) + 0.1
    rows = {
        "activations": (torch.eye(F)[feature] * strength).masked_fill(silent[:, None], 0),
        "token_ids": torch.arange(ROWS),
        "windows": torch.arange(ROWS) // WINDOW,
    }
    # signs that a page must not take for its own
    pieces = {str(i): f" -@{i}<" if silent[i] else f" f{int(feature[i])}@{i}&" for i in range(ROWS)}
    return sae, rows, pieces


def truth(passage, feature):
    """Of each token: its row, and whether the feature is active there."""
    tokens = [token if isinstance(token, str) else token["text"] for token in passage.tokens]
    return [(int(token.split("@")[1][:-1]), token.startswith(f" f{feature}@")) for token in tokens]


def number(name):
    return int(re.fullmatch(r"feature (\d+)", name)[1])


def some_items(folder, questions=6, **numbers):
    """Items of the world's features, saved in a folder."""
    sae, rows, pieces = world()
    plan = Plan(questions=questions, **numbers)
    materials = list(FeatureMaterials(encode_all(sae, rows["activations"]), rows, pieces, plan))
    items = compose("feature", "detection", materials, plan, {})
    save_items(folder, items)
    return items


def rated(folder, rater, play, turns=None):
    """A rater's session: `play(item, turn)` gives answers in the item's order, a rating and words.

    Args:
        turns: how many are finished; None is all.
    """
    session = Session(folder, rater)
    for number, turn in list(enumerate(session.ratings.turns))[:turns]:
        answers, rating, words = play(session.item(turn), turn)
        session.save(
            Entry(
                turn=number,
                answers=[answers[i] for i in turn.order],
                rating=rating,
                description=words,
                finish=True,
            )
        )
    return session
