# SPDX-License-Identifier: Apache-2.0
"""Items of components, from what each adds at the tokens of prompts (the fuzzing game).

A component acts on every prompt of a behaviour, so that there is no prompt in which it would have
to be detected; the question is whether its scores are at the right tokens.
"""

from __future__ import annotations

import random
from pathlib import Path

from mikernels.circuits.attribution import TokenAttribution
from mikernels.circuits.probe import Probe
from mikernels.files import explained, read_json, write_json
from mikernels.rate.items import Material, Plan, wrong_scores
from mikernels.schema import Evidence, Passage, Question, check


def save_evidence(found: Probe | TokenAttribution, path: str | Path) -> None:
    """What `mikernels rate PATH` shows: the scores at each token of each prompt.

    Args:
        found: a probe, whose `ranking` are the components; or an attribution, of all together.
        path: a JSON file.

    Raises:
        OSError: it cannot be written.

    Example:
        >>> task = circuits.tasks.ioi(tokenizer, 30)
        >>> probe = circuits.gim_probe(model, task.inputs, task.target, tokenizer=tokenizer)
        >>> save_evidence(probe, "probe.json")
    """
    path = Path(path)
    if isinstance(found, Probe):
        scores = {c.name: found.scores[..., found.names.index(c.name)] for c in found.ranking}
    else:
        scores = {"all": found.scores}
    units = [
        {
            "name": name,
            "texts": [
                {"tokens": tokens, "scores": row[kept].tolist()}
                for tokens, row, kept in zip(found.tokens, rows, found.kept, strict=True)
            ],
        }
        for name, rows in scores.items()
    ]
    value = {"format": "mikernels-evidence", "version": 1, "label": found.label, "units": units}
    with explained("save_evidence", "the evidence", path, "free space or choose another path"):
        write_json(path, value)


def load_evidence(path: Path) -> Evidence:
    """Raises FileNotFoundError, ValueError: naming the file and the field."""
    fix = "write it with mikernels.rate.save_evidence"
    raw = read_json(path, "rate", "evidence of components", fix)
    return check(Evidence, raw, "rate", path, fix)


def component_materials(evidence: Evidence, plan: Plan) -> list[Material]:
    """Of each component with enough prompts on which it does anything, the strongest first."""
    examples, found = plan.examples, []
    for unit in evidence.units:
        rng = random.Random(f"{plan.seed}:{unit.name}")
        # at a single token there is no other place
        texts = [t for t in unit.texts if any(t.scores) and len(t.tokens) > 1]
        if len(texts) < examples + plan.questions:
            continue
        rng.shuffle(texts)
        shown, asked = texts[:examples], texts[examples : examples + plan.questions]
        found.append(
            Material(
                unit.name,
                shown,
                [Passage(tokens=t.tokens, scores=wrong_scores(t.scores, rng)) for t in shown],
                [
                    Question(
                        tokens=t.tokens,
                        scores=wrong_scores(t.scores, rng) if number % 2 else t.scores,
                        right=not number % 2,
                    )
                    for number, t in enumerate(asked)
                ],
            )
        )
    return found
