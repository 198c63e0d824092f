# SPDX-License-Identifier: Apache-2.0
"""Which heads of SmolLM2-135M say who was given something, and whether taking them away matters.

Finds the ten strongest heads on indirect-object prompts with `gim_probe`, replaces what they
compute by its mean over other prompts, and compares the logit difference with that without ten
random heads. `--rules plain` ranks by the model's own gradients.
"""

import random

from options import options
from smollm2 import OUT, smollm2

from mikernels import circuits

o = options(__doc__, prompts=100, rules="gim", draws=5)

# %% Prompts in which one of two people gives, and the other is given
model, tokenizer = smollm2()
task = circuits.tasks.ioi(tokenizer, o.prompts)

# %% What each head and MLP adds to the logit difference, by one forward and one backward pass
probe = circuits.gim_probe(
    model,
    task.inputs,
    task.target,
    tokenizer=tokenizer,
    counterfactual=task.counterfactual_inputs,
    rules=o.rules,
)
print(probe, probe.rules, sep="\n\n", end="\n\n")

# %% A page, with what heads look at in general (previous token, same token, induction)
found = circuits.head_scores(model, tokenizer=tokenizer)
OUT.mkdir(parents=True, exist_ok=True)
probe.to_html(OUT / "which_heads.html", found)

# %% What is lost without the ten strongest, and without ten random others
heads = [component.name for component in probe.ranking if component.head is not None]
others, draw = sorted(heads[10:], key=probe.names.index), random.Random(0)
groups = {"the ten strongest heads": heads[:10]}
for number in range(1, o.draws + 1):
    groups[f"ten random heads ({number})"] = draw.sample(others, 10)
effect = circuits.ablation_effect(
    model,
    task.inputs,
    task.target,
    groups,
    "mean",
    reference=task.counterfactual_inputs,
    per_position=True,
)
print(effect)
