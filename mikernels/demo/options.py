# SPDX-License-Identifier: Apache-2.0
"""What the demo is asked to do: options, checked, and the two runs' configurations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mikernels.training import TrainConfig


@dataclass(frozen=True)
class DemoOptions:
    """What the demo does.

    Attributes:
        data: "smollm2" or "mnist". tokens: activations collected. layer: of SmolLM2, 0..29.
        expansion: F / d. k: active features a token. batch_size: tokens a step.
        steps: of every fused run. baseline_steps: of the plain one, at most those before the decay.
        variants: whether other variants are trained beside TopK.
        lr: of Adam, None by TrainConfig's rule. seed: of everything.
    """

    data: str = "smollm2"
    tokens: int = 49_152
    layer: int = 14
    expansion: int = 16
    k: int = 32
    batch_size: int = 1024
    steps: int = 180
    baseline_steps: int = 40
    variants: bool = True
    lr: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.data not in ("smollm2", "mnist"):
            raise ValueError(f"demo: data must be 'smollm2' or 'mnist', got {self.data!r}")
        for name in ("expansion", "k", "batch_size", "steps", "baseline_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"demo: {name} must be at least 1, got {getattr(self, name)}")
        if self.data == "smollm2" and self.tokens < self.batch_size:
            raise ValueError(
                f"demo: tokens must be at least {self.batch_size} (a batch), got {self.tokens}"
            )
        before = self.steps - self.config.decay_length
        if self.baseline_steps > before:
            raise ValueError(
                f"demo: baseline_steps must be at most {before} (the steps "
                f"before the learning rate decays), got {self.baseline_steps}; lower it or raise "
                f"steps"
            )

    @property
    def config(self) -> TrainConfig:
        """The fused run: the recipe of TrainConfig."""
        return TrainConfig(
            total_tokens=self.steps * self.batch_size,
            batch_size=self.batch_size,
            lr=self.lr,
            log_every=1,
            checkpoint_every=self.steps,
        )

    def baseline_config(self, n_features: int) -> TrainConfig:
        """The plain run: the same rates, and an end before they decay."""
        return replace(
            self.config,
            step="dense",
            total_tokens=self.baseline_steps * self.batch_size,
            lr=self.config.peak_lr(n_features),
            warmup_steps=min(self.config.warmup, self.baseline_steps),
            decay="constant",
        )

    @classmethod
    def for_data(cls, data: str, *, quick: bool = False, **given: Any) -> DemoOptions:
        """The defaults for a data set, with what is given and not None in their place."""
        options = cls(data=data)
        if data == "mnist":
            options = replace(options, tokens=5000, expansion=2, k=20, batch_size=500, steps=300)
        if quick:
            steps = options.steps // 3
            options = replace(
                options, tokens=options.tokens // 4, steps=steps, baseline_steps=steps // 8
            )
        return replace(options, **{name: v for name, v in given.items() if v is not None})
