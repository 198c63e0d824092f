# SPDX-License-Identifier: Apache-2.0
"""What a run is: sizes, schedules and intervals, checked before anything is computed.

Schedules are functions of the step alone (0-based), so that a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

STEPS = ("fused", "autograd", "dense")
DECAYS = ("constant", "linear", "cosine")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; JSON-able through `to_dict`.

    Attributes:
        total_tokens: tokens to train on; the run has ceil(total_tokens / tokens_per_step) steps.
        batch_size: tokens of a micro-batch, as the source gives them.
        accumulation: micro-batches whose gradients are averaged in a step.
        step: "fused" (this library's kernels, no autograd), "autograd" (its operators under
            autograd, any optimiser) or "dense" (plain PyTorch: the baseline).
        lr: peak learning rate.
        warmup_steps: linear warm-up from lr / warmup_steps.
        decay: "constant", "linear" or "cosine" to zero at the end of the run.
        decay_steps: length of the decay; None is everything after the warm-up.
        betas, eps: of Adam.
        clip_norm: limit on the global gradient norm, after the decoder's projection; None is none.
        k_start, k_anneal_steps: k goes linearly from k_start to the SAE's own k.
        dtype: "float32" or "bfloat16" converts the weights; None keeps the SAE's. Adam's state is
            float32 either way. A bfloat16 weight does not move by less than half a unit in its last
            place (2^-9 of its size), so it wants a larger lr.
        init_b_dec: start b_dec at the geometric median of the first batch.
        log_every, checkpoint_every: steps.
        keep_checkpoints: the newest ones that are kept.
        seed: torch's global generator at step 0.
        cuda_graph: record the fused step in a CUDA graph and replay it, to the same bits; for a
            CUDA device and step "fused". Steps with AuxK run eagerly.

    Raises:
        TypeError, ValueError: for a setting outside the above, by name.
    """

    total_tokens: int
    batch_size: int = 4096
    accumulation: int = 1
    step: str = "fused"
    lr: float = 3e-4
    warmup_steps: int = 0
    decay: str = "constant"
    decay_steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    k_start: int | None = None
    k_anneal_steps: int = 0
    dtype: str | None = None
    init_b_dec: bool = True
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    seed: int = 0
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        counts = ("total_tokens", "batch_size", "accumulation", "log_every", "checkpoint_every")
        for name in (*counts, "keep_checkpoints"):
            _check_int(name, getattr(self, name), 1)
        for name in ("warmup_steps", "k_anneal_steps"):
            _check_int(name, getattr(self, name), 0)
        for name in ("decay_steps", "k_start"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        _check_int("seed", self.seed, -(2**63))
        _check_choice("step", self.step, STEPS)
        _check_choice("cuda_graph", self.cuda_graph, (False, True))
        if self.cuda_graph and self.step != "fused":
            raise ValueError(
                f"TrainConfig: cuda_graph needs step='fused', got {self.step!r}; leave it out"
            )
        _check_choice("decay", self.decay, DECAYS)
        _check_choice("dtype", self.dtype, (None, *DTYPES))
        _check_number("lr", self.lr)
        _check_number("eps", self.eps, zero=True)
        if self.clip_norm is not None:
            _check_number("clip_norm", self.clip_norm)
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"TrainConfig: betas must be two numbers in [0, 1), got {list(self.betas)}"
            )
        if (self.k_start is None) != (self.k_anneal_steps == 0):
            raise ValueError(
                f"TrainConfig: k_start and k_anneal_steps must be given together, got "
                f"{self.k_start} and {self.k_anneal_steps}; leave both out for a constant k"
            )
        if self.decay_steps is not None and self.decay == "constant":
            raise ValueError(
                f"TrainConfig: decay_steps must be None with decay='constant', got "
                f"{self.decay_steps}; choose decay='linear' or 'cosine'"
            )
        if self.warmup_steps + (self.decay_steps or 0) > self.total_steps:
            raise ValueError(
                f"TrainConfig: warmup_steps + decay_steps must be at most {self.total_steps} "
                f"(the steps in total_tokens), got {self.warmup_steps} + {self.decay_steps or 0}; "
                f"shorten them or raise total_tokens"
            )
        if self.k_anneal_steps > self.total_steps:
            raise ValueError(
                f"TrainConfig: k_anneal_steps must be at most {self.total_steps} (the steps in "
                f"total_tokens), got {self.k_anneal_steps}; shorten it or raise total_tokens"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulation

    @property
    def total_steps(self) -> int:
        return -(-self.total_tokens // self.tokens_per_step)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step: `lr * warm-up * decay`, each in (0, 1]."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.decay == "constant":
            return self.lr * warm
        length = self.decay_steps or self.total_steps - self.warmup_steps
        done = max(0, step - (self.total_steps - length)) / max(1, length)
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.lr * warm * left

    def k_at(self, step: int, k: int) -> int:
        """Active features of a step, for an SAE whose own k is `k`."""
        if self.k_start is None or step >= self.k_anneal_steps:
            return k
        return round(self.k_start + (k - self.k_start) * step / self.k_anneal_steps)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: for a setting of another name.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(settings.keys() - known):
            raise ValueError(f"TrainConfig: expected settings among {sorted(known)}, got {unknown}")
        return cls(**settings)


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"TrainConfig: {name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"TrainConfig: {name} must be at least {least}, got {value}")


def _check_number(name: str, value: float, zero: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"TrainConfig: {name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        bound = "at least 0" if zero else "above 0"
        raise ValueError(f"TrainConfig: {name} must be finite and {bound}, got {value}")


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"TrainConfig: {name} must be one of {list(choices)}, got {value!r}")
