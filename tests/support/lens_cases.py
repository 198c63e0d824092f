# SPDX-License-Identifier: Apache-2.0
"""Tiny random HookedTransformers of every kind of block, in double precision."""

import pytest
import torch

SHAPE = {"n_layers": 2, "d_model": 24, "n_ctx": 32, "d_head": 6, "n_heads": 4, "d_vocab": 50}
COMMON = {"d_mlp": 40, "act_fn": "gelu", "normalization_type": "LN", "device": "cpu", "seed": 0}
GROUPED = {"n_key_value_heads": 2, "positional_embedding_type": "rotary"}
LLAMA = {**GROUPED, "normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu"}
PARALLEL = {"parallel_attn_mlp": True, "positional_embedding_type": "rotary", "rotary_dim": 4}
SPLIT = {"use_split_qkv_input": True, "use_attn_result": True, "use_hook_mlp_in": True}
KINDS = {
    "gpt2": {},
    "gpt2, folded": {"normalization_type": "LNPre", "final_rms": True, **SPLIT},
    "llama": LLAMA,
    "llama, folded": {**LLAMA, "normalization_type": "RMSPre"},
    "llama, split": {**LLAMA, **SPLIT},
    "llama, ungrouped": {**LLAMA, **SPLIT, "ungroup_grouped_query_attention": True},
    "qwen3": {**LLAMA, "use_qk_norm": True},
    "gemma2": {
        **LLAMA,
        "use_normalization_before_and_after": True,
        "attn_scores_soft_cap": 5.0,
        "output_logits_soft_cap": 3.0,
        "use_local_attn": True,
        "attn_types": ["global", "local"],
        "window_size": 3,
    },
    "olmo2": {**LLAMA, "original_architecture": "Olmo2ForCausalLM"},
    "pythia": PARALLEL,
    "pythia, split": {**PARALLEL, **SPLIT},
    "mixtral": {**LLAMA, "num_experts": 4, "experts_per_token": 2},
    "bloom": {"positional_embedding_type": "alibi", "post_embedding_ln": True},
    "shortformer": {"positional_embedding_type": "shortformer", "normalization_type": None},
    "solu": {"act_fn": "solu_ln"},
    "attn only": {"attn_only": True},
    "attn only, bare": {"attn_only": True, "normalization_type": None},
}


def lens(kind, dtype=torch.float64, **options):
    """A HookedTransformer whose weights are large enough that every layer matters."""
    package = pytest.importorskip("transformer_lens", reason="transformer-lens is not installed")
    config = {**SHAPE, **COMMON, **KINDS[kind], "dtype": dtype, **options}
    torch.manual_seed(0)
    model = package.HookedTransformer(package.HookedTransformerConfig(**config)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn_like(p))
        for name, p in model.named_parameters():
            if name.endswith("ln1.w") or "norm.w" in name or name.endswith("ln2.w"):
                p.add_(1)
    return model
