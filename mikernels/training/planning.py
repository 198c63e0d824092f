# SPDX-License-Identifier: Apache-2.0
"""What a training run will take, measured on a few steps of it: memory, disk and time.

The steps are those of a Trainer, on the run's own source, SAE and settings, shortened: once as the
run begins, and once with features that are dead, for AuxK makes its steps longer. A checkpoint is
written beside the run's, for its bytes and its time, and removed. So

    time   = start + steps x step + steps with dead features x what AuxK adds + checkpoints
             + tokens x the source's time for each
    disk   = (checkpoints kept + 1, for the next one is written before the oldest goes) x bytes
    memory = resident with the activations and weights + the peak of steps and checkpoint above it

How many features will be dead nobody knows before: `dead` is the share at the end that is assumed,
reached evenly from 2 `dead_after` on, and `seconds_without_dead` is what the run takes with none.
On this the time hangs most: five runs of 10 to 50 s on two cores were within 9 % where the share
was known, and one of them 21 % too short with the default (docs/plan.md).
Steps of variants without a k take as long as they have active features, which change as they learn;
then the plan holds for the beginning.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from mikernels.activations import ModelSource
from mikernels.files import explained
from mikernels.machine import available_memory, reset_peak, resident_bytes
from mikernels.nn import SAE
from mikernels.nn.sae import DEAD_AFTER
from mikernels.training.batches import BatchSource
from mikernels.training.config import TrainConfig
from mikernels.training.state.checkpoint import checkpoints
from mikernels.training.trainer import METRICS, Trainer
from mikernels.values.batch import Batch, as_batch

# seconds of steps to measure, and how many steps that may be
SECONDS, FEWEST, MOST = 3.0, 3, 300
# of the dead features: AuxK takes half as long with some as with many, for it uses k_aux of them
FEW = 0.25
# tokens that no run has: no feature is dead before
NEVER = 10**15
# weights, two moments and a gradient, the last three in float32
PER_PARAMETER = 12
OptimizerOf = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        steps, tokens: of the run.
        seconds: of the run in all, and of its parts: start, source, steps (AuxK's share
            aside), auxk, checkpoints.
        step_seconds: of one step without its source; dead_step_seconds: of one with AuxK, None if
            no step has dead features.
        dead: the share of features that is assumed to be dead at the end.
        extra_bytes: peak of what is resident above the activations and weights, None where the
            system does not tell. total_bytes: with those. available_bytes: that may be taken now.
        checkpoint_bytes: of one. disk_bytes: at most, metrics included. free_bytes: on that disk.
        warnings: why the run does not fit; none if it does.
    """

    steps: int
    tokens: int
    seconds: float
    parts: dict[str, float]
    step_seconds: float
    dead_step_seconds: float | None
    dead: float
    extra_bytes: int | None
    total_bytes: int | None
    available_bytes: int | None
    checkpoint_bytes: int
    disk_bytes: int
    kept_bytes: int
    free_bytes: int
    warnings: list[str] = field(default_factory=list)

    @property
    def seconds_without_dead(self) -> float:
        """Of the run in all, if no feature dies."""
        return self.seconds - self.parts.get("auxk", 0.0)


def plan(
    sae: SAE,
    source: BatchSource,
    config: TrainConfig,
    *,
    out_dir: str | Path | None = None,
    optimizer: OptimizerOf | None = None,
    dead: float = 0.1,
) -> Plan:
    """Measure what `Trainer(sae, source, config, out_dir=out_dir).run()` will take.

    A copy of the SAE is trained for some seconds. The SAE, the position of the source and torch's
    generator are as before; what is written goes to a folder beside out_dir, and is removed.

    Args:
        sae, source, config, out_dir: as for a Trainer; out_dir None writes nothing.
        optimizer: makes the Trainer's optimizer from parameters; None is the step's own Adam.
        dead: the share of features that is assumed to be dead at the end, 0..1: a former run's
            metrics have it as `dead_fraction`. It matters while it is small: AuxK takes hardly
            longer with half of the features than with a tenth.

    Returns:
        A Plan. Its `warnings` say why the run does not fit; where the memory is too small by
        arithmetic alone, nothing is measured and times are NaN.

    Raises:
        TypeError, ValueError: as a Trainer's, before anything is trained; a share outside 0..1.
        NotADirectoryError: out_dir, or what is above it, is a file.

    Example:
        >>> from mikernels.activations import TensorSource
        >>> from mikernels.nn import TopKSAE
        >>> from mikernels.training import TrainConfig, plan
        >>> source = TensorSource(torch.randn(1000, 8), 100)
        >>> plan(TopKSAE(8, n_features=16, k=2), source, TrainConfig(1000, 100)).steps
        10
    """
    if isinstance(dead, bool) or not isinstance(dead, int | float) or not 0 <= dead <= 1:
        raise ValueError(f"plan: dead must be a share of the features in 0..1, got {dead!r}")
    out = None if out_dir is None else _existing(Path(out_dir).absolute())
    free = shutil.disk_usage(out or Path.cwd()).free
    available = _available(sae)
    least = sum(p.numel() * PER_PARAMETER for p in sae.parameters())
    if available is not None and least > available:
        warning = (
            f"memory: the gradients and moments of {least / 1e9:,.1f} GB must fit, got "
            f"{available / 1e9:,.1f} GB; lower features, or d"
        )
        return _unmeasured(config, dead, least, available, free, warning)
    written = sum(p.numel() * (p.element_size() + 8) for p in sae.parameters())
    if out is not None and written > free:
        warning = (
            f"disk: a checkpoint of {written / 1e9:,.1f} GB must fit on the disk of {out}, got "
            f"{free / 1e9:,.1f} GB; choose another"
        )
        return _unmeasured(config, dead, least, available, free, warning)
    resident, position = _resident(sae), source.state_dict()
    try:
        with torch.random.fork_rng(devices=[]):
            found = _measure(copy.deepcopy(sae), source, config, out, optimizer, dead)
    except KeyboardInterrupt:
        # a Trainer's tells how to go on with a checkpoint, which is removed here
        raise KeyboardInterrupt("plan: interrupted; nothing is left of it") from None
    finally:
        source.load_state_dict(position)
    return _summed(found, config, dead, resident, available, free)


@dataclass(frozen=True)
class _Measured:
    """Seconds and bytes of a few steps. row: of the source, a token."""

    start: float
    step: float
    dead_steps: list[float]
    dead_from: int
    row: float
    rows: int
    save: float
    extra: int | None
    held: int
    checkpoint: int
    line: int


def _measure(
    sae: SAE,
    source: BatchSource,
    config: TrainConfig,
    out: Path | None,
    optimizer: OptimizerOf | None,
    dead: float,
) -> _Measured:
    after = sae.config.dead_after
    if after is None:
        after = max(1, min(DEAD_AFTER, config.total_tokens // 6))
    sae.config = replace(sae.config, dead_after=NEVER)
    loaded = _resident(sae)
    fed, row, rows, held = _source(source, config)
    if held is None:
        held = max(0, (_resident(sae) or 0) - (loaded or 0))
    before = _reset(sae)
    nobody = torch.empty(0, dtype=torch.int64)

    def run(steps: int, kept: torch.Tensor, folder: Path | None) -> _Run:
        return _Run(sae, fed, config, steps, kept, folder, optimizer)

    # pages are touched for the first time, and the first batch sets b_dec
    first = run(2, nobody, None)
    steps = min(MOST, config.total_steps, int(SECONDS / max(first.steps[1], 1e-6)))
    steps = max(FEWEST, steps) + 2
    with _scratch(out) as folder:
        clean = run(steps, nobody, folder)
        made = [] if folder is None else checkpoints(folder)
        size = sum(f.stat().st_size for path in made for f in path.iterdir())
        line = 0 if folder is None else (folder / METRICS).stat().st_size // clean.logged
    step = mean(clean.steps[1:-1])
    features = len(sae.tokens_since_fired)
    # what a run loses stops firing while its rate is highest, and is dead so many tokens later
    dead_from = -(-2 * after // config.tokens_per_step)
    dead_steps = []
    if sae.config.aux_coefficient and dead_from < config.total_steps:
        for share in (FEW * dead, dead):
            kept = torch.randperm(features)[: round(share * features)].to(sae.w_enc.device)
            dead_steps.append(mean(run(steps, kept, None).steps[1:-1]))
    peak = _peak(sae)
    return _Measured(
        start=max(0.0, first.seconds - 2 * step) + clean.opening,
        step=step,
        dead_steps=dead_steps,
        dead_from=dead_from,
        row=row,
        rows=rows,
        save=max(0.0, clean.closing - step),
        extra=None if before is None or peak is None else max(0, peak - before),
        held=held,
        checkpoint=size,
        line=line,
    )


class _Run:
    """A short run of a Trainer, and what took how long.

    Attributes:
        steps: seconds of each. seconds: of the run without its source. opening: before the first
            batch was asked for. closing: from the last batch on, its step included.
    """

    def __init__(
        self,
        sae: SAE,
        source: Any,
        config: TrainConfig,
        steps: int,
        kept: torch.Tensor,
        folder: Path | None,
        optimizer: OptimizerOf | None,
    ):
        short = replace(
            config,
            total_tokens=steps * config.tokens_per_step,
            lr=config.peak_lr(sae.config.n_features),
            warmup_steps=None,
            decay_steps=None,
            k_start=None,
            k_anneal_steps=0,
            checkpoint_every=steps,
        )
        timed = _Timed(source, sae, kept)
        timed.keep_dead()
        begin = time.perf_counter()
        own = None if optimizer is None else optimizer(sae.parameters())
        trainer = Trainer(sae, timed, short, optimizer=own, out_dir=folder, quiet=True)
        self.logged = max(1, len(trainer.run().rows))
        end = time.perf_counter()
        self.steps = timed.steps(config.accumulation, end)
        self.opening = timed.asked[0] - begin
        self.closing = end - timed.given[-1]
        self.seconds = end - timed.given[0] + self.opening


class _Timed:
    """A source for a few steps, which knows when each began.

    Args:
        kept: indices of features that are made dead before each step.
    """

    def __init__(self, source: Any, sae: SAE, kept: torch.Tensor):
        self._source, self._sae, self._kept = source, sae, kept
        self.asked: list[float] = []
        self.given: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def next_batch(self) -> torch.Tensor | Batch:
        if self._sae.w_enc.is_cuda:
            torch.cuda.synchronize(self._sae.w_enc.device)
        self.asked.append(time.perf_counter())
        batch = self._source.next_batch()
        self.keep_dead()
        self.given.append(time.perf_counter())
        return batch

    def expect(self, rows: int) -> None:
        """Those of the whole run were announced."""

    def keep_dead(self) -> None:
        if len(self._kept):
            self._sae.tokens_since_fired[self._kept] = 2 * NEVER

    def steps(self, accumulation: int, end: float) -> list[float]:
        """Seconds of each step, the source's aside; the last one ends at `end`."""
        ends = [*self.asked[1:], end]
        each = [stop - start for start, stop in zip(self.given, ends, strict=True)]
        return [sum(each[i : i + accumulation]) for i in range(0, len(each), accumulation)]


class _Again:
    """The same batches, again and again: those of a model, whose first block may take minutes."""

    def __init__(self, source: ModelSource, batches: list[Batch]):
        self._source, self._batches, self._next = source, batches, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def next_batch(self) -> Batch:
        self._next += 1
        return self._batches[self._next % len(self._batches)]


def _source(source: Any, config: TrainConfig) -> tuple[Any, float, int, int | None]:
    """What to train on, seconds of a row, rows read in the run, and bytes of those held, None where
    they are by now."""
    if not isinstance(source, ModelSource):
        return source, _row_seconds(source), config.total_tokens, None
    if iter(source.texts) is source.texts:
        raise ValueError(
            "plan: texts must be a list, or what can be iterated again, got an iterator, which the "
            "plan would read away; make the source anew from one"
        )
    source.expect(config.total_steps * config.tokens_per_step)
    parts: list[dict[str, torch.Tensor]] = []
    rows = windows = 0
    start = time.perf_counter()
    for part in source.read():
        if not parts:
            start = time.perf_counter()  # the first one is checked, too
        parts.append(part)
        rows += len(part["activations"])
        windows += len(part["windows"].unique())
        if rows >= config.batch_size and time.perf_counter() - start > SECONDS:
            break
    if not rows:
        raise ValueError(
            "plan: source must give activations, got none from its texts; give it longer ones"
        )
    # that of the first one is from before the clock started
    counted = rows - len(parts[0]["activations"]) or rows
    seconds = (time.perf_counter() - start) / counted
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    repeat = -(-config.batch_size // rows)
    batches = []
    for at in range(0, max(1, rows - config.batch_size + 1), config.batch_size):
        x, y = (
            None if t is None else t.repeat(repeat, 1)[at : at + config.batch_size].float()
            for t in (joined["activations"], joined.get("targets"))
        )
        assert x is not None
        batches.append(Batch(x, y))
    per_block = sum(1 for _ in islice(source.token_windows(), source._windows_per_block))
    block = per_block * rows / windows
    whole = math.ceil(config.total_tokens / block) * block
    # a block is put together from its parts
    held = 2 * block * sum(t[0].numel() * t.element_size() for t in joined.values())
    return _Again(source, batches), seconds, round(whole), round(held)


def _row_seconds(source: Any) -> float:
    """Seconds of a row over a whole block, for a block is loaded at once: the second, since the
    first one finds nothing warm. Over less where blocks are too long."""
    begin = start = time.perf_counter()
    rows, borders = 0, 0
    place = _block(source)
    while borders < 2 and time.perf_counter() - begin < SECONDS:
        rows += len(as_batch(source.next_batch()))
        if _block(source) != place:
            borders, place = borders + 1, _block(source)
            if borders == 1:
                start, rows, last = time.perf_counter(), 0, (time.perf_counter() - start) / rows
    return (time.perf_counter() - start) / rows if rows else last


def _block(source: Any) -> tuple[Any, Any]:
    state = source.state_dict()
    return state.get("epoch"), state.get("block")


def _summed(
    found: _Measured,
    config: TrainConfig,
    dead: float,
    resident: int | None,
    available: int | None,
    free: int,
) -> Plan:
    steps = config.total_steps
    saves = -(-steps // config.checkpoint_every) if found.checkpoint else 0
    added = 0.0
    if found.dead_steps:
        few, many = (max(0.0, seconds - found.step) for seconds in found.dead_steps)
        # the mean of a line through both, over shares from none to all of them
        added = FEW * few / 2 + (1 - FEW) * (few + many) / 2
    parts = {
        "start": found.start,
        "source": found.row * found.rows,
        "steps": steps * found.step,
        "auxk": added * max(0, steps - found.dead_from),
        "checkpoints": saves * found.save,
    }
    metrics = -(-steps // config.log_every) * found.line
    kept, disk = (
        min(saves, most) * found.checkpoint + metrics
        for most in (config.keep_checkpoints, config.keep_checkpoints + 1)
    )
    total = None
    if found.extra is not None and resident is not None:
        total = resident + found.extra + found.held
    warnings = []
    if found.extra is not None and available is not None and found.extra + found.held > available:
        warnings.append(
            f"memory: {(found.extra + found.held) / 1e9:,.1f} GB more must fit, got "
            f"{available / 1e9:,.1f} GB; lower features, batch_size or d"
        )
    if disk > free:
        warnings.append(
            f"disk: {disk / 1e9:,.1f} GB must fit, got {free / 1e9:,.1f} GB; free space, choose "
            f"another out_dir or lower keep_checkpoints"
        )
    return Plan(
        steps=steps,
        tokens=config.total_tokens,
        seconds=sum(parts.values()),
        parts=parts,
        step_seconds=found.step,
        dead_step_seconds=found.dead_steps[1] if found.dead_steps else None,
        dead=dead,
        extra_bytes=found.extra,
        total_bytes=total,
        available_bytes=available,
        checkpoint_bytes=found.checkpoint,
        disk_bytes=disk,
        kept_bytes=kept,
        free_bytes=free,
        warnings=warnings,
    )


def _unmeasured(
    config: TrainConfig,
    dead: float,
    least: int,
    available: int | None,
    free: int,
    warning: str,
) -> Plan:
    return Plan(
        steps=config.total_steps,
        tokens=config.total_tokens,
        seconds=math.nan,
        parts={},
        step_seconds=math.nan,
        dead_step_seconds=None,
        dead=dead,
        extra_bytes=least,
        total_bytes=None,
        available_bytes=available,
        checkpoint_bytes=0,
        disk_bytes=0,
        kept_bytes=0,
        free_bytes=free,
        warnings=[warning],
    )


def _existing(path: Path) -> Path:
    """The folder that is there already, on whose disk `path` will be."""
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise NotADirectoryError(f"plan: out_dir must be a folder, got {there}; choose another")
    return there


@contextmanager
def _scratch(out: Path | None) -> Iterator[Path | None]:
    if out is None:
        yield None
        return
    with (
        explained("plan", "a checkpoint", out, "choose an out_dir that can be written"),
        tempfile.TemporaryDirectory(prefix=".mikernels-plan-", dir=out) as folder,
    ):
        yield Path(folder)


def _reset(sae: SAE) -> int | None:
    """Start the peak anew; what is taken now, or None where nobody tells."""
    device = sae.w_enc.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # matmul's own buffers and thread stacks are there before the peak starts
    sae.w_enc.detach() @ sae.w_enc.detach()[0]
    return resident_bytes("VmRSS") if reset_peak() else None


def _peak(sae: SAE) -> int | None:
    device = sae.w_enc.device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes("VmHWM")


def _resident(sae: SAE) -> int | None:
    device = sae.w_enc.device
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resident_bytes("VmRSS")


def _available(sae: SAE) -> int | None:
    device = sae.w_enc.device
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
