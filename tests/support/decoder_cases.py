# SPDX-License-Identifier: Apache-2.0
"""Tiny random decoders, token ids and padded batches for them, and tokenisers."""

import re

import pytest
import torch

from mikernels.circuits import gradient_components, tasks

KINDS = ("llama", "gpt2", "gpt_neox")
SHAPE = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "max_position_embeddings": 32}
IDS = torch.tensor([[3, 14, 15, 9, 2], [6, 5, 35, 8, 9]])
GROUPED = {"num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 8}
EXPERTS = {**GROUPED, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 4}
# the grouped product of the others has no double precision
EAGER = {"_experts_implementation": "eager"}
# by name, which is the kind and perhaps, after a comma, what is special about it
OPTIONS = {
    "llama": WIDE,
    "qwen2": GROUPED,
    "qwen3": WIDE,
    "olmo": GROUPED,
    "phi3": GROUPED,
    "mixtral": {**GROUPED, "num_local_experts": 4, **EAGER},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16, **EAGER},
    "qwen3_moe": {**EXPERTS, "head_dim": 8, **EAGER},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_neox, serial": {"use_parallel_residual": False},
    "gptj": {"rotary_dim": 4},
    "cohere": GROUPED,
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 24},
    "gemma2": {**WIDE, "final_logit_softcapping": None},
    "gemma3_text": WIDE,
    "olmo2": WIDE,
}
MIXED = {
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
WINDOWED = {"use_sliding_window": True, **MIXED}
PARTIAL = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.7,
    }
}
# the kinds with backward rules, and what makes each hard: windows shorter than a text, soft-caps
# that matter, a rotation of a part of a head, a block without experts among those with them
HARD = {
    "llama": {},
    "qwen2": WINDOWED,
    "qwen3": WINDOWED,
    "phi3": {"sliding_window": 3, **PARTIAL},
    "mixtral": {"sliding_window": 3},
    "qwen2_moe": {**WINDOWED, "mlp_only_layers": [1]},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 3, "norm_topk_prob": True},
    "gpt2": {},
    "gpt_neox": PARTIAL,
    "gpt_neox, serial": {},
    "opt": {},
    "gemma2": {**MIXED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": MIXED,
    "olmo2": {},
}
# what the generated tasks choose from
TASK_WORDS = (tasks.NAMES, tasks.SURNAMES, tasks.PLACES, tasks.THINGS, tasks.EVENTS, tasks.YEARS)
ROWS = ([3, 14, 15, 9], [6, 5, 35, 8, 9, 7], [11, 2])


def tiny(kind, dtype=torch.float64, **options):
    """A random model whose weights are large enough that every layer matters."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind in ("llama", "gemma2", "olmo2", "granite"):
        options = {"num_key_value_heads": 2, "head_dim": 6, **options}
    config = transformers.AutoConfig.for_model(
        kind, num_attention_heads=4, **{**SHAPE, **TOKENS, **options}
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.2 * torch.randn_like(p))
    return model.to(dtype).eval()


def made(name, dtype=torch.float64, **options):
    return tiny(name.split(",")[0], dtype, **{**OPTIONS[name], **options})


def parts(model, layer):
    """Attention, its projection, MLP."""
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    names = {"self_attn": "o_proj", "attn": "c_proj", "attention": "dense"}
    name = next(name for name in names if hasattr(blocks[layer], name))
    attention = getattr(blocks[layer], name)
    return attention, getattr(attention, names[name]), blocks[layer].mlp


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def padded(layout, **mask):
    """The rows with padding before, after, on both sides, or before and after in turn."""
    ids, kept = [], []
    for number, row in enumerate(ROWS):
        free = 8 - len(row)
        before = {"left": free, "right": 0, "both": free // 2, "mixed": free * (number % 2)}[layout]
        after = free - before
        ids.append([40] * before + row + [41] * after)
        kept.append([0] * before + [1] * len(row) + [0] * after)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(kept, **mask)}


def check_rows(model, batch, limit=1e-11, **options):
    found = gradient_components(model, batch, 7, **options)
    for row, tokens in enumerate(ROWS):
        kept = batch["attention_mask"][row] == 1
        alone = gradient_components(model, torch.tensor([tokens]), 7, **options)
        assert alone.keys() == found.keys()
        for name, expected in alone.items():
            assert expected.abs().max() > 1e-6
            scale = expected.abs().max()
            assert (found[name][row, kept] - expected[0]).abs().max() <= limit * scale, name
            assert not found[name][row, ~kept].any()


class Characters:
    """A tokeniser of one token a character."""

    all_special_ids = [0]
    eos_token_id = 0
    bos_token_id = None

    def __call__(self, text, **options):
        return {"input_ids": [1 + ord(c) % 90 for c in text]}


def words_tokenizer(words, **special):
    """A tokeniser of one token a word, number or sign; digits one by one."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {word: i for i, word in enumerate(["<s>", *words])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<s>"))
    split = tokenizers.pre_tokenizers
    raw.pre_tokenizer = split.Sequence([split.Whitespace(), split.Digits(individual_digits=True)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<s>", clean_up_tokenization_spaces=False, **special
    )


def task_words():
    """One that knows the words of the generated tasks."""
    texts = (*TASK_WORDS, *tasks.IOI, *tasks.FULL_NAMES, *tasks.OTHER_YEARS, *tasks.SENTENCES)
    known = sorted(set(re.findall(r"[A-Za-z]+|[,.]|\d", " ".join(texts))))
    return words_tokenizer([*known, *"0123456789"])


def letters():
    """One that knows the letters."""
    return words_tokenizer([chr(97 + i) for i in range(26)])


def saved_tokenizer(folder):
    """A tokeniser of one token a word, which knows the letters, beside a model."""
    letters().save_pretrained(folder)
