# SPDX-License-Identifier: Apache-2.0
"""The data of a comparison: what is trained on, what is held out, and what is judged at the end.

Everything that takes time to make is kept in a folder, so a second command reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mikernels.activations.shards import load_rows
from mikernels.demo.data import held_out, smollm2_shards
from mikernels.evaluate import synthetic
from mikernels.files import explained
from mikernels.tensor_files import read_tensors, write_tensors

from .contenders import ROWS, Sizes

LAYER = 14
TOKENS = 120_000
# of the synthetic world; 3,000 steps of 1,024 see each about three times
SAMPLES = 1_048_576
HELD = 32_768
# rows of the training data in which a feature that lives must fire
ALIVE_IN = 32_768


@dataclass(frozen=True)
class Task:
    """What is given to everyone.

    Attributes:
        train, held: `[n, d]`, disjoint. judge: more figures of a trained SAE's view.
        note: what the figures are of, for the table and the file.
    """

    name: str
    sizes: Sizes
    train: torch.Tensor
    held: torch.Tensor
    judge: Callable[[Any], dict[str, float]]
    note: str

    def of(self, share: float) -> Task:
        """The same with a share of the steps."""
        steps = max(1, round(share * self.sizes.steps))
        return replace(self, sizes=replace(self.sizes, steps=steps))


@torch.no_grad()
def dead(view: Any, x: torch.Tensor) -> float:
    """Share of features that fire on none of the rows."""
    alive = None
    for part in x.split(ROWS):
        fired = (view.encode(part) != 0).any(0)
        alive = fired if alive is None else alive | fired
    assert alive is not None
    return float((~alive).double().mean())


def synthetic_task(folder: Path, console: Console, size: str = "small") -> Task:
    """SAELens' synthetic features: F1 and MCC are known. See `mikernels.evaluate.synthetic`."""
    world = synthetic.world(size)
    d = synthetic.SIZES[size].d
    path = folder / f"synthetic-{size}-{SAMPLES}.safetensors"
    if not path.exists():
        with console.status(f"{SAMPLES:,} samples of the synthetic world"), torch.no_grad():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                parts = [world.sample(8192) for _ in range((SAMPLES + HELD) // 8192)]
            with explained("bench quality", "samples", path, "free space"):
                folder.mkdir(parents=True, exist_ok=True)
                write_tensors(path, {"x": torch.cat(parts)})
    x = read_tensors(path)["x"]
    train, held = x[HELD:], x[:HELD]

    def judge(view: Any) -> dict[str, float]:
        found = synthetic.judge(view, world, HELD, seed=2)
        return {name: found[name] for name in ("f1", "precision", "recall", "mcc", "uniqueness")}

    return Task(
        f"synthetic-{size}",
        Sizes(d, 512, 8, 1024, 3000),
        train,
        held,
        judge,
        f"{synthetic.SIZES[size].features:,} known features in {d} dimensions",
    )


def smollm2_task(folder: Path, console: Console) -> Task:
    """Activations after layer 14 of SmolLM2-135M over Python's documentation."""
    from .spliced import Spliced

    shards = smollm2_shards(folder, LAYER, TOKENS, 0, console)
    rows, _ = load_rows(shards)
    held = held_out(rows, 0)
    x = rows["activations"].float()
    train = x[~held]
    model = Spliced(LAYER, TOKENS, rows["windows"][held].unique(), train.mean(0))

    def judge(view: Any) -> dict[str, float]:
        return {"ce_recovered": model.recovered(lambda part: view.decode(view.encode(part)))}

    return Task(
        "smollm2",
        Sizes(x.shape[1], 4096, 32, 1024, 100),
        train,
        x[held],
        judge,
        f"SmolLM2-135M, residual stream after layer {LAYER}; cross-entropy on "
        f"{model.windows} held-out windows",
    )


TASKS = {"synthetic": synthetic_task, "smollm2": smollm2_task}
