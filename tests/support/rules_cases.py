# SPDX-License-Identifier: Apache-2.0
"""What transformers makes of a decoder and a batch, and rules that are told apart in it."""

from contextlib import ExitStack

import torch
from decoder_cases import IDS, padded
from doubles import Doubles
from rules_algebra import Rules

PLAIN_MLP = "gpt2", "gpt_neox", "gpt_neox, serial", "opt"
# no factor is another's, and no product of theirs
ALL = Rules("frozen", 3.0, query=0.3, key=0.7, value=0.6, gate=0.4, up=0.9, activation="secant")


def score(logits, kept):
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    return (logits * weights)[kept].sum()


def theirs(model, batch, modes=None):
    """Logits of transformers' model, its gradients at the embeddings and before each block."""
    reads, kept = [], batch["attention_mask"] == 1

    def embed(module, args, output):
        reads.append(output.detach().requires_grad_())
        return reads[-1]

    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    with ExitStack() as stack:
        for mode in (Doubles(),) if modes is None else modes:
            stack.enter_context(mode)
        stack.callback(model.get_input_embeddings().register_forward_hook(embed).remove)
        for block in blocks:
            read = block.register_forward_pre_hook(lambda module, args: reads.append(args[0]))
            stack.callback(read.remove)
        positions = (kept.cumsum(-1) - 1).clamp(min=0)
        logits = model(**batch, position_ids=positions, use_cache=False).logits
    return logits[kept], torch.autograd.grad(score(logits, kept), reads)


def batches():
    # without padding and with it; both longer than the windows
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, padded("left")
