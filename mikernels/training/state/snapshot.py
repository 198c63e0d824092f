# SPDX-License-Identifier: Apache-2.0
"""A trainer's whole state, taken between two steps, and put back.

With it the next step computes the same bits: weights, tokens_since_fired, the optimiser, the
source's position, torch's generator, and the sums of the logging interval that is under way.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mikernels.nn import SAE, SAEConfig
from mikernels.training.batches import BatchSource
from mikernels.training.config import TrainConfig
from mikernels.training.state.checkpoint import (
    FORMER_CONFIG,
    STATE,
    TRAINING,
    check_equal,
    check_names,
    check_weights,
    load_checkpoint,
    modern_config,
    modern_sums,
    read_config,
)
from mikernels.training.state.metrics import History, Means
from mikernels.training.state.optimizer_state import pack_optimizer, unpack_optimizer

if TYPE_CHECKING:
    from mikernels.schema import State, Sums

# what may differ between a run and its continuation. Another total_tokens gives the rest of the run
# the schedule of that length
FREE = ("total_tokens", "log_every", "checkpoint_every", "keep_checkpoints", "cuda_graph")
GENERATOR = "torch_generator"
# settings of an SAE that a Trainer fills in by the length of its run
OPEN = ("dead_after", "threshold_rate")


class Run(Protocol):
    """What a snapshot is of: a Trainer."""

    sae: SAE
    source: BatchSource
    config: TrainConfig
    optimizer: torch.optim.Optimizer
    history: History
    means: Means
    step: int
    tokens: int
    open: dict[str, bool]


def take_snapshot(trainer: Run) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors beside the weights, and the JSON-able rest."""
    tensors, optimizer = pack_optimizer(trainer.optimizer)
    tensors[GENERATOR] = torch.get_rng_state()
    state = {
        "sae": {"architecture": trainer.sae.architecture, **asdict(trainer.sae.config)},
        "config": trainer.config.to_dict(),
        "tokens": trainer.tokens,
        "scale": trainer.history.scale,
        "means": {"sums": trainer.means.read(), "tokens": float(trainer.means.tokens)},
        "parts": trainer.history.parts,
        "optimizer": {"class": type(trainer.optimizer).__name__, **optimizer},
        "source": trainer.source.state_dict(),
    }
    return tensors, state


@dataclass(frozen=True)
class Read:
    """A checkpoint that fits a trainer.

    Attributes:
        step: that it reached. former: the settings under which it was written.
    """

    path: Path
    state: State
    config: TrainConfig
    sae_config: SAEConfig
    former: TrainConfig
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    generator: torch.Tensor
    means: Sums

    @property
    def step(self) -> int:
        return self.state.step


def read_run(trainer: Run, folder: Path) -> Read:
    """A checkpoint, checked against a fresh trainer, of which nothing is changed.

    Raises:
        FileNotFoundError, ValueError: naming the file that is missing, truncated, foreign, or of
            another SAE, configuration or optimiser, and what differs.
    """
    from mikernels.schema import check

    weights, tensors, state = load_checkpoint(folder)
    path = folder / STATE
    fix = f"remove the folder {folder} to resume from the checkpoint before it"
    config = check(TrainConfig, state.config, "resume", path, fix, "config")
    check_names(path, "config", state.config, TrainConfig, FORMER_CONFIG.get(state.version))
    if state.version == 1:
        config = modern_config(config)
    sae_config = read_config(folder, state)
    mine, my_sae = trainer.config, trainer.sae.config
    # what was left open then is a number now, and goes on
    if trainer.open["lr"]:
        mine = replace(mine, lr=config.lr)
    for name in OPEN:
        if trainer.open[name] and hasattr(sae_config, name):
            my_sae = replace(my_sae, **{name: getattr(sae_config, name)})
    check_equal(
        path,
        {"architecture": state.sae["architecture"], **asdict(sae_config)},
        {"architecture": trainer.sae.architecture, **asdict(my_sae)},
    )
    saved, own = (
        {name: value for name, value in settings.to_dict().items() if name not in FREE}
        for settings in (config, mine)
    )
    if state.version == 1:
        check_equal(path, saved, own, f"its version-1 settings mean today {saved}: take these")
    else:
        check_equal(path, saved, own)
    means = modern_sums(state.means, config, state.version)
    _check_counters(path, state, means, config, trainer, fix)
    check_equal(
        path,
        {
            "optimizer.class": state.optimizer.kind,
            "optimizer.param_groups: numbers of params": [
                len(g.params) for g in state.optimizer.param_groups
            ],
        },
        {
            "optimizer.class": type(trainer.optimizer).__name__,
            "optimizer.param_groups: numbers of params": [
                len(g["params"]) for g in trainer.optimizer.param_groups
            ],
        },
    )
    generator = _generator(folder / TRAINING, tensors, fix)
    moments = {name: t for name, t in tensors.items() if name != GENERATOR}
    try:
        optimizer = unpack_optimizer(
            trainer.optimizer,
            moments,
            state.optimizer.state,
            [group.model_dump() for group in state.optimizer.param_groups],
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"resume: {path}: {error}; {fix}") from error
    check_weights(folder, weights, trainer.sae.config, str(trainer.sae.w_dec.dtype))
    return Read(path, state, mine, my_sae, config, weights, optimizer, generator, means)


def put_back(trainer: Run, read: Read) -> None:
    """Give a fresh trainer the state of a checkpoint that fits it.

    Raises:
        ValueError: the source or the optimiser refuses its part. The trainer, its SAE, optimiser
            and source, and torch's generator are as before.
    """
    state = read.state
    _load_source_and_optimizer(trainer, read.path, state, read.optimizer)
    trainer.sae.load_state_dict(read.weights)
    torch.set_rng_state(read.generator)
    trainer.step, trainer.tokens = state.step, state.tokens
    trainer.config, trainer.sae.config = read.config, read.sae_config
    trainer.history.scale = state.scale
    trainer.means = Means(read.means.sums, read.means.tokens)
    trainer.history.parts.update(state.parts)


def _check_counters(
    path: Path, state: State, means: Sums, config: TrainConfig, trainer: Run, fix: str
) -> None:
    if math.frexp(state.scale)[0] != 0.5:
        raise ValueError(
            f"resume: {path} must hold scale: a power of two, got {state.scale}; {fix}"
        )
    micro = state.step * config.accumulation
    bounds = {
        "step": (state.step, 0, config.total_steps),
        "tokens": (state.tokens, micro, None if state.step else 0),
    }
    for name, (value, least, most) in bounds.items():
        if value < least or (most is not None and value > most):
            limit = f"at least {least}" if most is None else f"in {least}..{most}"
            raise ValueError(f"resume: {path} must hold {name} {limit}, got {value}; {fix}")
    for name, got, expected in (
        ("means.sums", means.sums, trainer.means.sums),
        ("parts", state.parts, trainer.history.parts),
    ):
        if got.keys() != expected.keys():
            raise ValueError(
                f"resume: {path} must hold {name} of {sorted(expected)}, got {sorted(got)}; {fix}"
            )
    if state.step > trainer.config.total_steps:
        raise ValueError(
            f"resume: total_tokens must be at least {state.tokens:,} (as far as {path} has come), "
            f"got {trainer.config.total_tokens:,}; raise it (--tokens), or use load_sae"
        )


def _generator(path: Path, tensors: dict[str, torch.Tensor], fix: str) -> torch.Tensor:
    """The state of torch's generator, tried out on another one."""
    try:
        torch.Generator().set_state(tensors[GENERATOR])
    except (KeyError, RuntimeError, TypeError) as error:
        reason = "nothing" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise ValueError(
            f"resume: {path} must hold {GENERATOR}: a state of torch's generator, got {reason}; "
            f"{fix}"
        ) from error
    return tensors[GENERATOR]


def _load_source_and_optimizer(
    trainer: Run, path: Path, state: State, optimizer: dict[str, Any]
) -> None:
    """Both or neither: their `load_state_dict` may be anybody's, and fail half-way."""
    source, former = trainer.source, trainer.source.state_dict()
    held = dict(vars(trainer.optimizer))
    try:
        source.load_state_dict(state.source)
        trainer.optimizer.load_state_dict(optimizer)
    except Exception as error:
        vars(trainer.optimizer).update(held)
        with suppress(Exception):  # the first failure is the one that tells
            source.load_state_dict(former)
        raise ValueError(
            f"resume: {path} must hold a source position and optimiser state that fit, got "
            f"{type(error).__name__}: {error}; resume with the data and optimiser of the first run"
        ) from error
