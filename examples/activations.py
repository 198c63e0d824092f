# SPDX-License-Identifier: Apache-2.0
"""What the examples train on: SmolLM2-135M's residual stream after layer 14, written once.

Nothing is downloaded: model and text come from installed packages.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from mikernels.activations import ShardSource
from mikernels.demo.data import smollm2_shards

K, BATCH = 32, 1_024


def arguments(description: str) -> argparse.Namespace:
    """The options that all examples have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=30_000, help="of activations, read again")
    parser.add_argument("--features", type=int, default=9_216)
    parser.add_argument("--folder", type=Path, default=Path("out/examples"), help="for activations")
    parser.add_argument("--plain", action="store_true", help="without mikernels, to compare")
    return parser.parse_args()


def batches(options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """`[BATCH, 576]` activations of norm about sqrt(576), without end."""
    shards = smollm2_shards(options.folder, 14, options.tokens, 0, Console(stderr=True))
    source = ShardSource(shards, batch_size=BATCH)
    # not the first token of a text, whose norm is 100 times that of others
    norm = source.next_batch().norm(dim=-1).median()
    while True:
        x = source.next_batch()
        yield (x / norm).clamp(-1, 1) * x.shape[-1] ** 0.5


def tell(name: str, losses: list[float], began: float) -> None:
    """One line: what was trained, how far, how fast."""
    seconds = (time.perf_counter() - began) / len(losses)
    print(f"{name}: loss {losses[0]:.4g} -> {losses[-1]:.4g}, {1e3 * seconds:.0f} ms a step")
