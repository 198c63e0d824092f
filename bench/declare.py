# SPDX-License-Identifier: Apache-2.0
"""What a benchmark file declares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """N tokens, d model width, F features, k active."""

    name: str
    n: int
    d: int
    f: int
    k: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("smoke", 64, 64, 640, 8),
        Shape("S0", 4096, 576, 18432, 32),
        Shape("S1", 4096, 768, 24576, 32),
        Shape("S2", 1024, 2304, 65536, 64),
    )
}


class Unavailable(Exception):
    """Raised by a provider's build: it cannot run here, and the message says why."""


@dataclass(frozen=True)
class Runner:
    """One provider, ready to be timed.

    Attributes:
        run: the timed call; returns what the gate checks.
        before: untimed, before every run (the forward pass of a backward benchmark).
    """

    run: Callable[[], Outputs]
    before: Callable[[], object] | None = None


@dataclass(frozen=True)
class Provider:
    """One way to compute the operator.

    Attributes:
        name: as shown; "eager" is the numerical yardstick of every benchmark.
        build: (inputs, mode) -> Runner; raises Unavailable with the reason.
        ours: also run at each instruction-set level below the one in use.
        screens: its ceiling is the 16-bit unit (AMX tiles, int16 products) rather than fp32 FMA.
    """

    name: str
    build: Callable[[Any, str], Runner]
    ours: bool = False
    screens: bool = False


@dataclass(frozen=True)
class Verdict:
    """The gate's answer. Errors are max |out - fp64| / max |fp64|, of the worst output."""

    ok: bool
    error: float
    eager_error: float
    detail: str = ""


@dataclass(frozen=True)
class Target:
    """A speed to reach: ours at least `ratio` times `baseline`, extra memory at most `extra_mb`."""

    shape: str
    mode: str
    baseline: str
    ratio: float
    extra_mb: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """One operator's benchmark.

    Attributes:
        modes: the first is the default; "fwd", "bwd" (backward alone) or "step".
        shapes: what `all` measures, per mode.
        inputs: (shape, mode, seed) -> anything; random normal, never zeros.
        check: (inputs, mode, outputs, eager's outputs) -> Verdict, run before any timing.
        flops, bytes: (shape, mode) -> arithmetic, and the least traffic that the operator needs.
        baseline: the provider that ratios refer to, unless the caller names another.
    """

    name: str
    summary: str
    modes: tuple[str, ...]
    shapes: dict[str, tuple[str, ...]]
    inputs: Callable[[Shape, str, int], Any]
    providers: tuple[Provider, ...]
    check: Callable[[Any, str, Outputs, Outputs], Verdict]
    flops: Callable[[Shape, str], float]
    bytes: Callable[[Shape, str], float]
    baseline: str = "eager"
    targets: tuple[Target, ...] = field(default=())

    def provider(self, name: str) -> Provider:
        """The provider of that name; a level suffix (`ours:avx2`) is ignored."""
        stem = name.split(":", 1)[0]
        return next(provider for provider in self.providers if provider.name == stem)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for fixed shapes; the first call (the gate's) pays for the compilation."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)
