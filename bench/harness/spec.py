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


@dataclass(frozen=True)
class PairShape:
    """n rows against m others, d numbers each, in `batch` examples of `positions`; k kept pairs."""

    name: str
    batch: int
    positions: int
    n: int
    m: int
    d: int
    k: int = 0


@dataclass(frozen=True)
class AttentionShape:
    """`queries` of `heads` against as many keys of `groups` heads, causal, `width` numbers each."""

    name: str
    batch: int
    heads: int
    groups: int
    queries: int
    width: int
    softcap: float = 0.0


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("smoke", 64, 64, 640, 8),
        Shape("S0", 4096, 576, 18432, 32),
        Shape("S1", 4096, 768, 24576, 32),
        Shape("S2", 1024, 2304, 65536, 64),
    )
}
PAIR_SHAPES = {
    shape.name: shape
    for shape in (
        PairShape("smoke", 2, 3, 40, 24, 64, 8),
        # EAP at layer 6 of GPT-2 and 16 of Llama-3.1-8B: n writers before m readers of one hook
        PairShape("gpt2", 20, 20, 79, 12, 768),
        PairShape("gpt2-layer", 20, 20, 79, 37, 768),
        PairShape("llama", 4, 20, 529, 32, 4096),
        # SAE features of a 2304 wide model, all against all
        PairShape("features", 1, 1, 16384, 16384, 2304, 1000),
        PairShape("features-64k", 1, 1, 65536, 65536, 2304, 1000),
        # an attribution graph: m gradients (rows of the graph) at 128 positions, n active features
        PairShape("graph", 1, 128, 4000, 64, 2304),
        # per-sample gradients of a 768 x 768 layer
        PairShape("samples", 1, 1, 1024, 1024, 768, 1000),
        PairShape("gradients", 8, 1, 2048, 2048, 768),
        # 144 heads of GPT-2
        PairShape("composition", 1, 64, 144, 144, 768),
        PairShape("scores", 1, 1, 1, 30_000_000, 1),
        PairShape("tokens", 1, 1, 8192, 1, 2048),
    )
}
ATTENTION_SHAPES = {
    shape.name: shape
    for shape in (
        AttentionShape("smoke", 2, 4, 2, 70, 16),
        # a layer of SmolLM2-135M, of GPT-2, of Gemma 2 2B, of Llama-3.1-8B
        AttentionShape("smollm2", 1, 9, 3, 512, 64),
        AttentionShape("gpt2-heads", 1, 12, 12, 1024, 64),
        AttentionShape("gpt2-512", 1, 12, 12, 512, 64),
        AttentionShape("gemma2", 1, 8, 4, 512, 256, 50.0),
        AttentionShape("llama-heads", 1, 32, 8, 2048, 128),
        # prompts of a task, for SmolLM2's heads
        AttentionShape("prompts", 8, 9, 3, 16, 64),
        # the last two with long prompts, on a GPU
        AttentionShape("gemma2-4k", 1, 8, 4, 4096, 256, 50.0),
        AttentionShape("llama-4k", 1, 32, 8, 4096, 128),
    )
}
# what an operator is measured on; each has a "smoke"
FAMILIES: dict[str, dict[str, Any]] = {
    "sae": SHAPES,
    "pairs": PAIR_SHAPES,
    "attention": ATTENTION_SHAPES,
}
FIELDS = {"n": "N", "f": "F"}
# of a GPU; row_topk at G2 is the 8192 x 131072 of its target
GPU_SHAPES = {
    shape.name: shape
    for shape in (
        Shape("G1", 4096, 768, 32768, 32),
        Shape("G2", 8192, 2304, 131072, 64),
        Shape("G3", 8192, 4096, 131072, 128),
        Shape("G4", 8192, 4096, 1048576, 64),
    )
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU, CUDA = "cpu", "cuda"


def sizes_of(shape: dict[str, Any]) -> str:
    """A recorded shape's sizes in words."""
    return " ".join(f"{FIELDS.get(k, k)}={v}" for k, v in shape.items() if k != "name" and v > 1)


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
        screens: its ceiling is the narrow unit (AMX tiles, products of bytes or int16; on a GPU the
            bf16 matrix unit) rather than fp32 FMA.
        devices: where it takes part.
    """

    name: str
    build: Callable[[Any, str], Runner]
    ours: bool = False
    screens: bool = False
    devices: tuple[str, ...] = (CPU, CUDA)


@dataclass(frozen=True)
class Verdict:
    """The gate's answer. Errors are max |out - fp64| / max |fp64|, of the worst output."""

    ok: bool
    error: float
    eager_error: float
    detail: str = ""


@dataclass(frozen=True)
class Target:
    """A speed to reach: ours at least `ratio` times `baseline`, extra memory at most `extra_mb`.

    With floor: at most that many times the least traffic at the measured copy rate. dtype "":
    any.
    """

    shape: str
    mode: str
    baseline: str
    ratio: float
    extra_mb: float | None = None
    floor: float | None = None
    dtype: str = ""


@dataclass(frozen=True)
class Benchmark:
    """One operator's benchmark.

    Attributes:
        ops: the registered operators whose speed it answers for; each belongs to one benchmark, and
            what is built on others' operators, such as a whole layer, has none.
        modes: the first is the default; "fwd", "bwd" (backward alone), "gim" (the same by GIM's
            rule) or "step".
        shapes: what `all` measures, per mode. gpu_shapes: the same with --device cuda.
        gpu_dtypes: what it is measured in there; on a CPU everything is fp32. fp32_modes: modes
            that only fp32 judges, because 16-bit scores tie and each side selects for itself.
        inputs: (shape, mode, seed) -> anything; random normal, never zeros.
        check: (inputs, mode, outputs, eager's outputs) -> Verdict, run before any timing.
        flops: (shape, mode) -> arithmetic.
        bytes: (shape, mode, bytes of an element) -> the least traffic that the operator needs.
        yardstick: eager in small pieces, for shapes at which eager itself runs out of memory.
        baseline: the provider that ratios refer to, unless the caller names another.
        family: whose shapes it takes, of FAMILIES.
    """

    name: str
    summary: str
    ops: tuple[str, ...]
    modes: tuple[str, ...]
    shapes: dict[str, tuple[str, ...]]
    inputs: Callable[[Any, str, int], Any]
    providers: tuple[Provider, ...]
    check: Callable[[Any, str, Outputs, Outputs], Verdict]
    flops: Callable[[Any, str], float]
    bytes: Callable[[Any, str, int], float]
    baseline: str = "eager"
    targets: tuple[Target, ...] = field(default=())
    gpu_shapes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gpu_dtypes: tuple[str, ...] = ("bf16", "fp32", "fp16")
    fp32_modes: tuple[str, ...] = ()
    yardstick: Callable[[Any, str], Outputs] | None = None
    family: str = "sae"

    def provider(self, name: str) -> Provider:
        """The provider of that name; a level suffix (`ours:avx2`) is ignored."""
        for wanted in (name, name.split(":", 1)[0]):
            for provider in self.providers:
                if provider.name == wanted:
                    return provider
        raise KeyError(name)


def generator(seed: int) -> torch.Generator:
    """On torch's default device, which the harness sets while it makes inputs."""
    return torch.Generator(device=torch.get_default_device()).manual_seed(seed)


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """The inputs with their floating tensors in `dtype`."""
    for name, value in vars(inputs).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(inputs, name, value.to(dtype))
    return inputs


def need(op: Any, impl: str) -> None:
    """Raises Unavailable with the reason where an operator lacks this implementation."""
    state = op.backends()[impl]
    if state != "ready":
        raise Unavailable(state)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for fixed shapes; the first call (the gate's) pays for the compilation."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)
