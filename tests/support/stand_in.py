# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M's stand-in: its blocks and heads, 36 wide, with random weights, in 0.1 s.

What is written for the model runs on it, component names and all; what it prints is of no account.
"""

import contextlib
import functools
import re
from collections import Counter

import pytest
import torch
from decoder_cases import words_tokenizer

from mikernels.circuits import tasks
from mikernels.demo import data
from mikernels.models import load

LAYERS, HEADS, GROUPS, WIDTH = 30, 9, 3, 4
COMMON = 600


@functools.cache
def tokenizer():
    """One token a word: of the tasks' prompts, and of Python's documentation."""
    texts = (tasks.NAMES, tasks.PLACES, tasks.THINGS, *tasks.IOI)
    words = re.findall(r"\w+|[^\w\s]", " ".join(texts) + " When The capital of is Anna to 0")
    some = Counter(re.findall(r"\w+", " ".join(data.python_documentation()[:20])))
    words += [word for word, _ in some.most_common(COMMON)]
    return words_tokenizer(sorted(set(words)), bos_token="<s>")


@functools.cache
def model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer()), hidden_size=HEADS * WIDTH, intermediate_size=48,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
        head_dim=WIDTH, max_position_embeddings=256, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    made = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made.eval()


class Local:
    """A LocalModel of it, whatever the folder."""

    def __init__(self, folder, gguf_file=None):
        self.folder = folder

    def reading(self):
        return contextlib.nullcontext()

    def tokenizer(self):
        return tokenizer()

    def model(self, dtype=torch.float32, head=False):
        return model() if head else model().model


def in_place_of_smollm2(monkeypatch, folder):
    """Whatever loads a model loads this one."""
    transformers = pytest.importorskip("transformers")
    for auto, make in (("AutoModelForCausalLM", model), ("AutoTokenizer", tokenizer)):
        found = functools.partial(lambda made, *args, **options: made, make())
        monkeypatch.setattr(getattr(transformers, auto), "from_pretrained", found)
    monkeypatch.setattr(data, "smollm2_folder", lambda: folder)
    monkeypatch.setattr(load, "LocalModel", Local)
