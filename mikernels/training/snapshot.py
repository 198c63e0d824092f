# SPDX-License-Identifier: Apache-2.0
"""A trainer's whole state, taken between two steps, and put back.

With it the next step computes the same bits: weights, tokens_since_fired, the optimiser, the
source's position, torch's generator, and the sums of the logging interval that is under way.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mikernels.training.checkpoint import (
    STATE,
    check_equal,
    check_weights,
    load_checkpoint,
    pack_optimizer,
    unpack_optimizer,
)
from mikernels.training.config import TrainConfig
from mikernels.training.metrics import Means

if TYPE_CHECKING:
    from mikernels.training.trainer import Trainer

# what may differ between a run and its continuation. Another total_tokens gives the rest of the run
# the schedule of that length
FREE = ("total_tokens", "log_every", "checkpoint_every", "keep_checkpoints", "cuda_graph")
GENERATOR = "torch_generator"


def take_snapshot(trainer: Trainer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors beside the weights, and the JSON-able rest."""
    tensors, optimizer = pack_optimizer(trainer.optimizer)
    tensors[GENERATOR] = torch.get_rng_state()
    state = {
        "sae": asdict(trainer.sae.config),
        "config": trainer.config.to_dict(),
        "tokens": trainer.tokens,
        "scale": trainer.history.scale,
        "means": {"sums": trainer.means.read(), "tokens": trainer.means.tokens},
        "parts": trainer.history.parts,
        "optimizer": {"class": type(trainer.optimizer).__name__, **optimizer},
        "source": trainer.source.state_dict(),
    }
    return tensors, state


def restore(trainer: Trainer, folder: Path) -> None:
    """Put a checkpoint's state into a fresh trainer; it is all checked before any of it is used.

    Raises:
        FileNotFoundError, ValueError: naming the file that is missing, truncated, foreign, or of
            another SAE, configuration, optimiser or source, and what differs.
    """
    weights, tensors, state = load_checkpoint(folder)
    path = folder / STATE
    try:
        step, tokens, means = state["step"], state["tokens"], state["means"]
        sae_config, config = dict(state["sae"]), TrainConfig.from_dict(state["config"])
        scale = state["scale"]
        optimizer, source, generator = state["optimizer"], state["source"], tensors.pop(GENERATOR)
        groups = [len(group["params"]) for group in optimizer["param_groups"]]
        parts = {name: float(state["parts"][name]) for name in trainer.history.parts}
        mine, my_sae = trainer.config, trainer.sae.config
        # what was left open then is a number now, and goes on
        if trainer.open["lr"]:
            mine = replace(mine, lr=config.lr)
        if trainer.open["dead_after"]:
            my_sae = replace(my_sae, dead_after=sae_config["dead_after"])
        fixed = [
            {name: value for name, value in settings.to_dict().items() if name not in FREE}
            for settings in (config, mine)
        ]
        check_equal(path, sae_config, asdict(my_sae))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"resume: {path} must hold the state of a run, got {type(error).__name__}: {error}; "
            f"remove the folder {folder} to resume from the checkpoint before it"
        ) from error
    check_equal(path, *fixed)
    my_groups = [len(group["params"]) for group in trainer.optimizer.param_groups]
    check_equal(
        path,
        {"optimizer": optimizer["class"], "parameters a group": groups},
        {"optimizer": type(trainer.optimizer).__name__, "parameters a group": my_groups},
    )
    check_weights(folder, weights, trainer.sae)
    trainer.source.load_state_dict(source)
    trainer.sae.load_state_dict(weights)
    torch.set_rng_state(generator)
    unpack_optimizer(trainer.optimizer, tensors, optimizer)
    trainer.config, trainer.sae.config = mine, my_sae
    trainer.history.scale = scale
    trainer.step, trainer.tokens = step, tokens
    trainer.means = Means(**means)
    trainer.history.parts.update(parts)
