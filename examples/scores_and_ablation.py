# SPDX-License-Identifier: Apache-2.0
"""Does a head's score say what the model loses without that head?

One forward and one backward pass score all 270 heads of SmolLM2-135M; taking each away by itself
takes 270 runs. Here both are done on the same prompts, and correlated over the heads. Intervals
are of the prompts (1,000 bootstrap samples). 100 prompts take ten minutes on two cores.
"""

import numpy as np
from options import options
from smollm2 import smollm2

from mikernels import circuits
from mikernels.values.intervals import bootstrap

o = options(__doc__, prompts=4, kind="mean")

# %% Who is given something, and counterfactuals in which no name is repeated
model, tokenizer = smollm2()
task = circuits.tasks.ioi(tokenizer, o.prompts)
other = task.counterfactual_inputs
how = {
    "mean": {"reference": other, "per_position": True},
    "counterfactual": {"counterfactual": other},
}

# %% Each head alone, replaced by its mean over the counterfactuals: what is lost, [prompts, heads]
heads = [f"L{layer}.h{head}" for layer in range(30) for head in range(9)]
effect = circuits.ablation_effect(
    model, task.inputs, task.target, heads, o.kind, **how.get(o.kind, {})
)
lost = (effect.clean - effect.alone).T.numpy()


# %% Scores of all heads: against the counterfactual, and sums of gradient times activation
def probed(rules: str) -> np.ndarray:
    found = circuits.gim_probe(model, task.inputs, task.target, counterfactual=other, rules=rules)
    totals = found.scores.sum(1)
    return totals[:, [found.names.index(name) for name in heads]].numpy()


def summed(rules: str) -> np.ndarray:
    with circuits.rules(model, rules):
        found = circuits.gradient_components(
            model, task.inputs, task.target, heads=True, attribution=True
        )
    return np.stack([found[name].float().sum((1, 2)).numpy() for name in heads], 1)


# %% Correlations over the heads, of means over the prompts
def pearson(units: np.ndarray) -> np.ndarray:
    a, b = np.split(units.mean(-2), 2, axis=-1)
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def spearman(units: np.ndarray) -> np.ndarray:
    ranks = [x.argsort(-1).argsort(-1) for x in np.split(units.mean(-2), 2, axis=-1)]
    return pearson(np.concatenate(ranks, -1)[..., None, :].astype(float))


def shared(units: np.ndarray) -> np.ndarray:
    """How many of the ten heads with the largest scores are among the ten with the largest loss."""
    a, b = (abs(x).argsort(-1)[..., -10:] for x in np.split(units.mean(-2), 2, axis=-1))
    return (a[..., :, None] == b[..., None, :]).sum((-1, -2)).astype(float)


print(f"{effect.label}: {effect.clean.mean():.3f}, mean of {o.prompts} prompts; {o.kind} ablation")
print(f"{'':<36}{'Pearson':<20}{'Spearman':<20}of the first 10")
for rules in ("gim", "plain"):
    for name, scores in (("gim_probe", probed), ("sums of gradient_components", summed)):
        units = np.concatenate([scores(rules), lost], 1).astype(float)
        row = f"{name + ', ' + rules:<36}"
        for measure, digits in ((pearson, 2), (spearman, 2), (shared, 0)):
            value, *ends = (f"{x:.{digits}f}" for x in bootstrap(measure, units))
            row += f"{value} [{', '.join(ends)}]".ljust(20)
        print(row.rstrip())
