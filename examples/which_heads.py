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
from contextlib import ExitStack
from pathlib import Path

import torch

from mikernels.circuits import Task, gim_probe, head_scores, tasks
from mikernels.circuits.targets import read_target
from mikernels.models.decoder import find_decoder
from mikernels.models.padding import with_positions
from mikernels.values.intervals import Interval, mean_intervals

Head = tuple[int, int]


def logit_differences(
    model: torch.nn.Module, task: Task, heads: list[Head], means: list[torch.Tensor]
) -> torch.Tensor:
    """`[B]`, with each of the heads' z at each position replaced by the mean."""
    decoder = find_decoder(model, "which_heads", "give a Hugging Face decoder")
    inputs, _ = with_positions("which_heads", model, task.inputs)
    behavior = read_target("which_heads", task.target, len(task))
    size = decoder.heads(decoder.blocks[0]).size

    def replace(layer: int):
        def hook(module, args):
            z = args[0].clone()
            for other, head in heads:
                if other == layer:
                    own = slice(head * size, (head + 1) * size)
                    z[..., own] = means[layer][:, own]
            return (z,)

        return hook

    with torch.no_grad(), ExitStack() as stack:
        for layer in {layer for layer, _ in heads}:
            projection = decoder.blocks[layer].projection
            stack.callback(projection.register_forward_pre_hook(replace(layer)).remove)
        # rows are padded before their tokens, so that the answer comes after the last
        logits = model(**inputs, use_cache=False, logits_to_keep=1).logits
    return behavior(logits, None)


def mean_z(model: torch.nn.Module, task: Task) -> list[torch.Tensor]:
    """Of each layer z `[P, H dh]`, its mean over the counterfactual prompts at each position."""
    decoder = find_decoder(model, "which_heads", "give a Hugging Face decoder")
    inputs, _ = with_positions("which_heads", model, task.counterfactual_inputs)
    weights = task.attention_mask[..., None].float()
    found: list[torch.Tensor] = []

    def keep(module, args):
        found.append((args[0] * weights).sum(0) / weights.sum(0).clamp(min=1))

    with torch.no_grad(), ExitStack() as stack:
        for block in decoder.blocks:
            stack.callback(block.projection.register_forward_pre_hook(keep).remove)
        model(**inputs, use_cache=False, logits_to_keep=1)
    return found


def lost(clean: torch.Tensor, ablated: torch.Tensor) -> Interval:
    """The mean over prompts of how much of the logit difference is gone."""
    return mean_intervals((clean - ablated).double().numpy()[:, None])[0]


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

    heads = [(c.layer, c.head) for c in probe.ranking if c.head is not None]
    means = mean_z(model, task)
    clean = probe.values
    print(f"\nlogit difference         {lost(clean, torch.zeros_like(clean))}; lost without")
    best = logit_differences(model, task, heads[:10], means)
    print(f"the ten strongest heads  {lost(clean, best)}")
    draw = random.Random(0)
    for _ in range(5):
        chosen = draw.sample(sorted(heads[10:]), 10)
        other = logit_differences(model, task, chosen, means)
        print(f"ten random heads         {lost(clean, other)}")


if __name__ == "__main__":
    main()
