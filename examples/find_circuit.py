# SPDX-License-Identifier: Apache-2.0
"""Find the circuit of a behaviour, and ask whether it is the circuit.

The behaviour: which of two people is given something. Every edge between heads' q, k and v, MLPs,
input and logits is scored in two forward passes and a backward pass; then the model runs on the
best edges alone, with all others cut.
"""

from options import options
from smollm2 import OUT, smollm2

from mikernels import circuits

o = options(__doc__, prompts=12, edges=200)

# %% Prompts with known answers, and counterfactuals in which no name is repeated
model, tokenizer = smollm2()
task = circuits.tasks.ioi(tokenizer, o.prompts)
question = task.inputs, task.counterfactual_inputs, task.target

# %% Score all edges; with prompts as a sample, each score has an interval
found = circuits.find_circuit(model, *question, "gim")
print(found, end="\n\n")
print(circuits.stability(found, k=o.edges), end="\n\n")

# %% The best edges that all lie on paths from the input to the logits
best = found.select(o.edges, "greedy")
print(f"{len(best.names)} of {found.graph.n_edges:,} edges kept")

# %% Does the model still answer with so few? Beside: as many edges, drawn at random
sizes = [0, 0.002, 0.01, 0.05, 0.2, 1]
ours, chance = circuits.faithfulness_curve(
    model, *question, [found, circuits.random_circuit(found.graph)], fractions=sizes
)
print(ours, chance, sep="\n\n")

# %% A page: graph, heat maps, curves, in one file
circuits.write_report([found], OUT / "circuit.html", curves=[ours])
