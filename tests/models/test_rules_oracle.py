# SPDX-License-Identifier: Apache-2.0
"""The oracle of backward rules is transformers' model without them, and with them what they say."""

from contextlib import ExitStack

import pytest
import torch
from decoder_cases import IDS, made, padded
from doubles import Doubles
from rules_algebra import Rules, activated, gated, normed, pattern, scaled
from rules_oracle import oracle
from torch.nn import functional as F

MIXED = {
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
WINDOWED = {"use_sliding_window": True, **MIXED}
CAPPED = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
# name -> options beyond those of the other tests
CASES = {
    "llama": {},
    "qwen2": WINDOWED,
    "qwen3": WINDOWED,
    "phi3": {"sliding_window": 3},
    "mixtral": {"sliding_window": 3},
    "qwen2_moe": {**WINDOWED, "norm_topk_prob": False, "mlp_only_layers": [1]},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 3, "norm_topk_prob": True},
    "gpt2": {},
    "gpt_neox": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.7}
    },
    "gpt_neox, serial": {},
    "opt": {},
    "gemma2": {**MIXED, **CAPPED},
    "gemma3_text": MIXED,
    "olmo2": {},
}


def close(found, expected):
    """In double precision: nothing but the order of sums differs."""
    scale = expected.abs().max()
    assert scale > 1e-3
    assert (found - expected).abs().max() <= 1e-11 * scale


def score(logits, kept):
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    return (logits * weights)[kept].sum()


def theirs(model, batch):
    """Logits, and the gradients at the embeddings and at what each block reads."""
    reads = []

    def embed(module, args, output):
        reads.append(output.detach().requires_grad_())
        return reads[-1]

    def read(module, args):
        reads.append(args[0])

    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    with ExitStack() as stack:
        embedding = model.get_input_embeddings()
        stack.callback(embedding.register_forward_hook(embed).remove)
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(read).remove)
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = (
            stack.enter_context(Doubles())
            and model(**batch, position_ids=positions, use_cache=False).logits
        )
    kept = batch["attention_mask"] == 1
    return logits[kept], torch.autograd.grad(score(logits, kept), reads)


def check(model, batch, rules=None, **options):
    logits, grads = theirs(model, batch)
    kept = batch["attention_mask"] == 1
    found = oracle(model, batch, rules, **options)
    assert torch.equal(found.logits[kept].isfinite(), torch.ones_like(logits, dtype=torch.bool))
    close(found.logits[kept], logits)
    reads = [found.x0, *found.stream[:-1]]
    for mine, expected in zip(
        torch.autograd.grad(score(found.logits, kept), reads), grads, strict=True
    ):
        close(mine, expected)
        assert not mine[~kept].any()


def batches():
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, padded("left")
