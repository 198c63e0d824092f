# SPDX-License-Identifier: Apache-2.0
"""Take parts of a model away, and see what it loses.

Heads, MLPs, neurons and positions are taken away by name, in whatever calls the model, and replaced
by their mean over other prompts, by zero, or by what they are on a counterfactual.
"""

from options import options
from smollm2 import smollm2

from mikernels import circuits

o = options(__doc__, prompts=24)

# %% Prompts whose answer is one of two names, and others for the mean at each position
model, tokenizer = smollm2()
task = circuits.tasks.ioi(tokenizer, o.prompts)
other = {"reference": task.counterfactual_inputs, "per_position": True}


# %% In your own code: a `with` block, in which all calls of the model are without them
def difference() -> float:
    logits = model(**task.inputs).logits[:, -1]
    right, wrong = ([ids[0] for ids in side] for side in (task.correct, task.wrong))
    rows = range(len(task))
    return (logits[rows, right] - logits[rows, wrong]).mean().item()


print(f"logit difference of the model as it is: {difference():.3f}")
with circuits.ablate(model, ["L23.h3", "L29.h1"], "mean", **other):
    print(f"without L23.h3 and L29.h1: {difference():.3f}")
with circuits.ablate(model, "L0.mlp", "zero"):
    print(f"with zeros for the first MLP: {difference():.3f}")
print(f"afterwards: {difference():.3f}", end="\n\n")

# %% As a table, with intervals over prompts: alone, by groups, and all together
heads = ["L23.h3", "L29.h1", "L24.h4", "L20.h0"]
parts = {head: head for head in heads} | {"the four heads": heads, "block 12": "L12.*"}
effect = circuits.ablation_effect(model, task.inputs, task.target, parts, "mean", **other)
print(effect, end="\n\n")

# %% And of a ranking of heads: what is lost without the first so many, and with them alone
probe = circuits.gim_probe(
    model, task.inputs, task.target, counterfactual=task.counterfactual_inputs
)
names = [component.name for component in probe.ranking if component.head is not None]
for measure in (circuits.comprehensiveness, circuits.sufficiency):
    print(measure(model, task.inputs, task.target, names, "mean", **other), end="\n\n")
