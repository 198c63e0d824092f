# SPDX-License-Identifier: Apache-2.0
"""What the examples work on: SmolLM2-135M, and its residual stream after layer 14, written once.

Nothing is downloaded: model and text come from installed packages.
"""

from __future__ import annotations

import runpy
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mikernels.activations import ShardSource
from mikernels.demo.data import smollm2_folder, smollm2_shards
from mikernels.models.load import LocalModel
from mikernels.nn import SAE
from mikernels.training import load_sae

LAYER, K, BATCH = 14, 32, 1_024
OUT = Path("out/examples")


def smollm2() -> tuple[torch.nn.Module, Any]:
    """Model and tokenizer. Of a hub: `AutoModelForCausalLM.from_pretrained("gpt2").eval()` and
    `AutoTokenizer.from_pretrained("gpt2")`."""
    local = LocalModel(smollm2_folder())
    with local.reading():
        return local.model(head=True), local.tokenizer()


def batches(tokens: int) -> Iterator[torch.Tensor]:
    """`[BATCH, 576]` activations of norm about sqrt(576), without end."""
    shards = smollm2_shards(OUT, LAYER, tokens, 0, Console(stderr=True))
    source = ShardSource(shards, batch_size=BATCH)
    # not the first token of a text, whose norm is 100 times that of others
    norm = source.next_batch().norm(dim=-1).median()
    while True:
        x = source.next_batch()
        yield (x / norm).clamp(-1, 1) * x.shape[-1] ** 0.5


def trained_sae() -> SAE:
    """What train_text.py leaves, which is run if it has not been."""
    if not list((OUT / "sae").glob("checkpoint-*")):
        with redirect_stdout(sys.stderr):
            runpy.run_path(str(Path(__file__).with_name("train_text.py")))
    return load_sae(max((OUT / "sae").glob("checkpoint-*")))


def tell(name: str, losses: list[float], began: float) -> None:
    """One line: what was trained, how far, how fast."""
    seconds = (time.perf_counter() - began) / len(losses)
    print(f"{name}: loss {losses[0]:.4g} -> {losses[-1]:.4g}, {1e3 * seconds:.0f} ms a step")
