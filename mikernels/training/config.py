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
WARMUP_SHARE, DECAY_SHARE = 0.05, 0.2


def default_lr(n_features: int, steps: int) -> float:
    """The peak learning rate of a run: `4e-3 (100 / steps)^(1/3) (4608 / F)^(1/4)`, at most 8e-3.

    Fitted to runs of this recipe (scaled activations, 5 % warm-up, decay over the last 20 %) on
    SmolLM2-135M's layer 14 (d 576, k 32, 1,024 tokens per step, one seed), by the fraction of
    variance unexplained of 7,854 held-out tokens and, where two rates explain about as much, by the
    share of features that are dead at the end (in brackets):

    |     F | steps |     lr 1e-3 |     lr 2e-3 |     lr 4e-3 |     lr 8e-3 |    rule |
    |-------|-------|-------------|-------------|-------------|-------------|---------|
    |  2304 |   100 | 0.268 (0 %) | 0.221 (0 %) | 0.196 (3 %) | 0.194 (23 %) | 4.8e-03 |
    |  2304 |  1600 | 0.131 (0 %) | 0.125 (0 %) | 0.122 (1 %) | 0.135 (7 %) | 1.9e-03 |
    |  4608 |    30 | 0.453 (0 %) | 0.364 (0 %) | 0.317 (0 %) | 0.289 (29 %) | 6.0e-03 |
    |  4608 |   100 | 0.260 (0 %) | 0.212 (0 %) | 0.188 (10 %) | 0.192 (53 %) | 4.0e-03 |
    |  4608 |   400 | 0.149 (0 %) | 0.132 (1 %) | 0.130 (14 %) | 0.144 (45 %) | 2.5e-03 |
    |  9216 |   100 | 0.260 (0 %) | 0.208 (1 %) | 0.186 (20 %) | 0.192 (74 %) | 3.4e-03 |
    |  9216 |   400 | 0.139 (0 %) | 0.125 (4 %) | 0.127 (35 %) | 0.145 (68 %) | 2.1e-03 |
    | 18432 |    30 | 0.539 (1 %) | 0.450 (2 %) | 0.388 (6 %) | 0.327 (36 %) | 4.2e-03 |
    | 18432 |   100 | 0.271 (0 %) | 0.213 (5 %) | 0.188 (39 %) | 0.195 (89 %) | 2.8e-03 |

    Continued to 200,000 steps and F = 16,384 it gives 2.4e-4, where dictionary_learning's rule of
    long runs, 2e-4 / sqrt(F / 2^14), has 2e-4.
    """
    rate = 4e-3 * (100 / max(1, steps)) ** (1 / 3) * (4608 / n_features) ** (1 / 4)
    return min(8e-3, rate)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; JSON-able through `to_dict`.

    Attributes:
        total_tokens: tokens to train on; the run has ceil(total_tokens / tokens_per_step) steps.
        batch_size: tokens of a micro-batch, as the source gives them.
        accumulation: micro-batches whose gradients are averaged in a step.
        step: "fused" (this library's kernels, no autograd), "autograd" (its operators under
            autograd, any optimiser) or "dense" (plain PyTorch: the baseline).
        lr: peak learning rate; None is `default_lr` of the SAE's features and the run's steps.
        warmup_steps: linear warm-up from lr / warmup_steps; None is 5 % of the steps.
        decay: "constant", "linear" or "cosine" to zero at the end of the run.
        decay_steps: length of the decay; None is the last 20 % of the steps (what the warm-up
            leaves of them).
        betas, eps: of Adam.
        clip_norm: limit on the global gradient norm, after the decoder's projection; None is none.
        k_start, k_anneal_steps: k goes linearly from k_start to the SAE's own k.
        sparsity_warmup_steps: a variant's penalty on its codes grows linearly from 0.
        dtype: "float32" or "bfloat16" converts the weights; None keeps the SAE's. Adam's state is
            float32 either way. A bfloat16 weight does not move by less than half a unit in its last
            place (2^-9 of its size), so it wants a larger lr.
        init_b_dec: start b_dec at the geometric median of the first batch, if it is still all 0 as
            in a new SAE; one that was trained is a better start.
        scale_activations: train on activations times the power of two that brings the mean norm of
            the first step's tokens nearest to sqrt(d), so that one learning rate fits every layer
            of every model. Outside of `Trainer.run`, and in checkpoints, the SAE is one of the
            activations as they are: folding a power of two into the biases and back is exact.
        log_every, checkpoint_every: steps.
        keep_checkpoints: the newest ones that are kept.
        seed: torch's global generator at step 0.
        cuda_graph: record the fused step in a CUDA graph and replay it, to the same bits; for a
            CUDA device, step "fused" and variants with a k. Steps with AuxK run eagerly.

    Raises:
        TypeError, ValueError: for a setting outside the above, by name.
    """

    total_tokens: int
    batch_size: int = 4096
    accumulation: int = 1
    step: str = "fused"
    lr: float | None = None
    warmup_steps: int | None = None
    decay: str = "linear"
    decay_steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    k_start: int | None = None
    k_anneal_steps: int = 0
    sparsity_warmup_steps: int = 0
    dtype: str | None = None
    init_b_dec: bool = True
    scale_activations: bool = True
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    seed: int = 0
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        counts = ("total_tokens", "batch_size", "accumulation", "log_every", "checkpoint_every")
        for name in (*counts, "keep_checkpoints"):
            _check_int(name, getattr(self, name), 1)
        for name in ("k_anneal_steps", "sparsity_warmup_steps"):
            _check_int(name, getattr(self, name), 0)
        if self.warmup_steps is not None:
            _check_int("warmup_steps", self.warmup_steps, 0)
        for name in ("decay_steps", "k_start"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        _check_int("seed", self.seed, -(2**63))
        _check_choice("step", self.step, STEPS)
        for name in ("cuda_graph", "init_b_dec", "scale_activations"):
            _check_choice(name, getattr(self, name), (False, True))
        if self.cuda_graph and self.step != "fused":
            raise ValueError(
                f"TrainConfig: cuda_graph needs step='fused', got {self.step!r}; leave it out"
            )
        _check_choice("decay", self.decay, DECAYS)
        _check_choice("dtype", self.dtype, (None, *DTYPES))
        if self.lr is not None:
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
        if self.warmup + (self.decay_steps or 0) > self.total_steps:
            raise ValueError(
                f"TrainConfig: warmup_steps + decay_steps must be at most {self.total_steps} "
                f"(the steps in total_tokens), got {self.warmup} + {self.decay_steps or 0}; "
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

    def peak_lr(self, n_features: int) -> float:
        """`lr`, or `default_lr` where it is None, for an SAE of so many features."""
        return default_lr(n_features, self.total_steps) if self.lr is None else self.lr

    def weights_dtype(self, own: torch.dtype) -> torch.dtype:
        """Of the weights while they are trained, for an SAE of the dtype `own`."""
        return own if self.dtype is None else DTYPES[self.dtype]

    @property
    def warmup(self) -> int:
        """Steps of the warm-up."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        fits = self.total_steps - (self.decay_steps or 0)
        return max(0, min(round(WARMUP_SHARE * self.total_steps), fits))

    @property
    def decay_length(self) -> int:
        """Steps of the decay, at the end of the run."""
        if self.decay == "constant":
            return 0
        if self.decay_steps is not None:
            return self.decay_steps
        return min(max(1, round(DECAY_SHARE * self.total_steps)), self.total_steps - self.warmup)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step: `lr * warm-up * decay`, each in (0, 1].

        Raises:
            ValueError: while lr is None; a Trainer has filled it in.
        """
        if self.lr is None:
            raise ValueError("TrainConfig: lr must be a number for lr_at, got None; pass one")
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        length = self.decay_length
        done = max(0, step - (self.total_steps - length)) / max(1, length)
        left = (1 + math.cos(math.pi * done)) / 2 if self.decay == "cosine" else 1 - done
        return self.lr * warm * left

    def k_at(self, step: int, k: Any) -> Any:
        """Active features of a step, for an SAE whose own k is `k`; None for one without."""
        if k is None or self.k_start is None or step >= self.k_anneal_steps:
            return k
        at = self.k_start + (k - self.k_start) * step / self.k_anneal_steps
        return at if isinstance(k, float) else round(at)

    def sparsity_at(self, step: int) -> float:
        """What a variant's penalty is multiplied by at a step, in (0, 1]."""
        if not self.sparsity_warmup_steps:
            return 1.0
        return min(1.0, (step + 1) / self.sparsity_warmup_steps)

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
