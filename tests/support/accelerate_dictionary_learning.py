# SPDX-License-Identifier: Apache-2.0
"""dictionary_learning's trainers at a small size, and what 20 steps of their own `update` leave.

The oracle is the library itself in fp64, where what it casts to fp32 stays fp64 too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate_cases import assert_as_accurate
from accelerate_rounded import assert_as_accurate_in_bf16
from oracle import randn

D, F, K, N, STEPS = 16, 64, 4, 32, 20


class _StandIn(types.ModuleType):
    """A module any name of which is a class that nothing is an instance of."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def library(name: str = "dictionary_learning") -> Any:
    """A module of dictionary_learning; the test is skipped where it is not installed.

    Nothing that is tested uses nnsight, whose import replaces parts of torch.
    """
    there = "nnsight" in sys.modules
    sys.modules.setdefault("nnsight", _StandIn("nnsight"))
    try:
        pytest.importorskip("dictionary_learning", reason="dictionary-learning is not installed")
        return importlib.import_module(name)
    finally:
        if not there:
            del sys.modules["nnsight"]


_TOPK: dict[str, Any] = dict(k=K, threshold_start_step=2)
_ANNEALED: dict[str, Any] = dict(
    # near p = 0 the gradient of a small activation is any number
    sparsity_warmup_steps=5,
    anneal_start=6,
    p_end=0.6,
    n_sparsity_updates=5,
)
# trainer -> module, settings beside COMMON
TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "TopKTrainer": ("top_k", _TOPK),
    "BatchTopKTrainer": ("batch_top_k", _TOPK),
    "MatryoshkaBatchTopKTrainer": (
        "matryoshka_batch_top_k",
        dict(**_TOPK, group_fractions=[0.125, 0.25, 0.625], group_weights=[0.5, 0.3, 0.2]),
    ),
    "JumpReluTrainer": ("jumprelu", dict(bandwidth=0.5, target_l0=3.0, sparsity_warmup_steps=5)),
    "GatedSAETrainer": ("gdm", dict(sparsity_warmup_steps=5)),
    "GatedAnnealTrainer": ("gated_anneal", _ANNEALED),
    "StandardTrainer": ("standard", dict(sparsity_warmup_steps=5)),
    "StandardTrainerAprilUpdate": ("standard", dict(sparsity_warmup_steps=5)),
    "PAnnealTrainer": ("p_anneal", _ANNEALED),
}
SELECTING = ("TopKTrainer", "BatchTopKTrainer", "MatryoshkaBatchTopKTrainer")
COMMON: dict[str, Any] = dict(
    steps=STEPS,
    activation_dim=D,
    dict_size=F,
    layer=0,
    lm_name="none",
    lr=3e-3,
    warmup_steps=3,
    decay_start=14,
    device="cpu",
)


def make(name: str, **settings: Any) -> Any:
    """A trainer, its features seldom active from the beginning."""
    module, own = TRAINERS[name]
    given = {**COMMON, **own, **settings}
    if given.get("resample_steps"):
        # the library has one of them at a time
        given["decay_start"] = None
    torch.manual_seed(1)
    kind = getattr(library(f"dictionary_learning.trainers.{module}"), name)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = kind(**given)
    sparse(trainer.ae)
    for group in trainer.optimizer.param_groups:
        # of a gradient of rounding size Adam's own 1e-8 would make a step of full length
        group["eps"] = 1e-3
    if hasattr(trainer, "auxk_alpha"):
        # dead is what did not fire in this step
        trainer.dead_feature_threshold = N
    return trainer


def sparse(ae: Any) -> None:
    """Biases and thresholds with which few features are active."""
    generator = torch.Generator().manual_seed(5)
    some = torch.rand(F, generator=generator)
    with torch.no_grad():
        for name, p in ae.named_parameters():
            if name == "threshold":
                p.copy_(1.2 + some * 0.2)
            elif name == "gate_bias":
                p.copy_(-1.2 - some * 0.2)
            elif name == "r_mag":
                p.copy_(some * 0.2)
            elif name == "encoder.bias" and not hasattr(ae, "k"):
                # the encoder's rows begin with a norm of 0.1
                p.copy_(-0.12 - some * 0.02)


def batches(dtype: torch.dtype = torch.float32, strided: bool = False) -> list[torch.Tensor]:
    """Activations of every step, the same numbers in every dtype and layout."""
    mix, offset = randn(D, D, seed=3) / 4, randn(D, seed=4)
    found = []
    for step in range(STEPS):
        x = (randn(N, D, seed=10 + step) @ mix + offset).bfloat16().to(dtype)
        found.append(x.T.contiguous().T if strided else x)
    return found


@contextlib.contextmanager
def recorded() -> Iterator[list[torch.Tensor]]:
    """The losses that `backward` is called of, which not every `update` returns."""
    losses: list[torch.Tensor] = []
    backward = torch.Tensor.backward

    def record(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(self.detach().double())
        backward(self, *args, **kwargs)

    with mock.patch.object(torch.Tensor, "backward", record):
        yield losses


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """What the library casts to fp32 on its way stays fp64."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


STATISTICS = ("num_tokens_since_fired", "steps_since_active")


@dataclass
class Run:
    """What steps left.

    Attributes:
        numbers: losses, parameters and buffers. counts: [steps, F], of steps or tokens since each
            feature fired. said: what the trainer reports after each step.
    """

    numbers: dict[str, torch.Tensor]
    counts: torch.Tensor
    said: list[dict[str, Any]]


Each = Callable[[int, Any], object]


def train(
    trainer: Any,
    data: list[torch.Tensor],
    *,
    first: int = 0,
    autocast: bool = False,
    each: Each = lambda step, trainer: None,
) -> Run:
    """Steps from `first` on; `each(step, trainer)` is called before each."""
    counts, said = [], []
    quiet = contextlib.redirect_stdout(io.StringIO())
    cast = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with quiet, recorded() as losses, cast:
        for step, x in enumerate(data[first:], first):
            # which tokens dead features become is drawn
            torch.manual_seed(step)
            each(step, trainer)
            trainer.update(step, x)
            found = [getattr(trainer, name, None) for name in STATISTICS]
            counts += [c.clone() for c in found if c is not None]
            said.append(trainer.get_logging_parameters())
    state = {n: t.detach().clone() for n, t in trainer.ae.state_dict().items()}
    numbers = {"losses": torch.stack(losses), **state}
    return Run(numbers, torch.stack(counts) if counts else torch.zeros(0), said)


def exactly(name: str, *, autocast: bool = False, each: Each | None = None, **settings: Any) -> Run:
    """The library in fp64."""
    trainer = make(name, **settings)
    trainer.ae.double()
    more = {"each": each} if each else {}
    with in_double():
        return train(trainer, batches(torch.float64), autocast=autocast, **more)


@functools.cache
def unaccelerated(name: str) -> tuple[Run, Run]:
    """All steps of the library as it is, in fp64 and in fp32."""
    return exactly(name), train(make(name), batches())


def assert_same_training(found: Run, exact: Run, eager: Run, *, low: bool = False) -> None:
    """Numbers by the error-ratio rule; firing statistics equal, or where the library computes in
    bf16, about as often other than in fp64 as its own."""
    if low:
        runs = [(run.numbers, run.counts > 0) for run in (found, exact, eager)]
        assert_as_accurate_in_bf16(*runs)
        return
    assert_as_accurate(found.numbers, exact.numbers, eager.numbers)
    assert torch.equal(found.counts, eager.counts)
