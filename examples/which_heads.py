# SPDX-License-Identifier: Apache-2.0
"""Which heads of SmolLM2-135M say who was given something, and whether taking them away matters.

    python examples/which_heads.py [prompts] [rules]

Finds the ten strongest heads on indirect-object prompts with `gim_probe`, replaces what they
compute by its mean over other prompts, and compares the logit difference with that without ten
random heads. Writes out/which_heads.html.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch

from mikernels.circuits import (
    AblationEffect,
    Probe,
    Task,
    ablation_effect,
    gim_probe,
    head_scores,
    tasks,
)

BEST = "the ten strongest heads"


def without_heads(model: torch.nn.Module, task: Task, probe: Probe, draws: int) -> AblationEffect:
    """What is lost without the ten strongest heads, and without ten random others: their z at each
    position replaced by its mean there over the counterfactual prompts."""
    heads = [c.name for c in probe.ranking if c.head is not None]
    others = sorted(heads[10:], key=probe.names.index)
    groups, draw = {BEST: heads[:10]}, random.Random(0)
    for number in range(1, draws + 1):
        groups[f"ten random heads ({number})"] = draw.sample(others, 10)
    return ablation_effect(
        model, task.inputs, task.target, groups, "mean",
        reference=task.counterfactual_inputs, per_position=True,
    )  # fmt: skip


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mikernels.demo.data import smollm2_folder

    folder, file = smollm2_folder(), "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file).eval()
    prompts, rules = (*sys.argv[1:], *("100", "gim")[len(sys.argv) - 1 :])[:2]
    task = tasks.ioi(tokenizer, int(prompts))
    probe = gim_probe(
        model, task.inputs, task.target, tokenizer=tokenizer,
        counterfactual=task.counterfactual_inputs, rules=rules,
    )  # fmt: skip
    print(probe, probe.rules, sep="\n\n")
    found = head_scores(model, tokenizer=tokenizer)
    Path("out").mkdir(exist_ok=True)
    probe.to_html("out/which_heads.html", found)

    print("", without_heads(model, task, probe, 5), sep="\n")


if __name__ == "__main__":
    main()
