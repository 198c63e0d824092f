# SPDX-License-Identifier: Apache-2.0
"""Runs one declared case: gate, interleaved rounds, memory. Returns plain data for JSON.

All providers run in one process on the same inputs, in rounds A B C A B C, so that drift of the
machine hits all alike. At least `rounds` rounds, more while the budget lasts. A provider that is
absent, fails or gives wrong results stays in the record with its reason, and has no times.
Where and how calls are timed is device.py's.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import mikernels

from ..gpu.device import Cpu, Meter
from . import machine, stats
from .contender import EAGER, Contender, contenders
from .memory import peak_extra
from .spec import DTYPES, Benchmark, Outputs, Shape, Unavailable, cast

MOST_ROUNDS = 101


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        providers: glob patterns of provider names; the numerical yardstick always joins the gate.
        rounds: the fewest interleaved rounds.
        budget: seconds a case may go on adding rounds.
        check: gate only, no timing.
        memory: measure peak extra memory, on a CPU in one process a provider.
        baseline: overrides the benchmark's own.
        device: where to measure. dtype: of the inputs; a name of DTYPES.
    """

    providers: tuple[str, ...] = ("*",)
    rounds: int = 7
    budget: float = 15.0
    check: bool = False
    memory: bool = True
    baseline: str | None = None
    seed: int = 0
    device: Cpu = field(default_factory=Cpu)
    dtype: str = "fp32"
    notify: Callable[[str], None] = field(default=lambda message: None)


def measure(benchmark: Benchmark, shape: Shape, mode: str, options: Options) -> dict[str, Any]:
    """One case, as the dictionary that goes into the JSON file."""
    device, dtype = options.device, DTYPES[options.dtype]
    everyone = contenders(benchmark, options.providers, device.kind)
    started = machine.facts()
    options.notify(f"{benchmark.name} {shape.name} {mode}: inputs")
    with device.making():
        inputs = cast(benchmark.inputs(shape, mode, options.seed), dtype)
    device.release()
    _gate(benchmark, inputs, mode, everyone, options)
    racing = [e for e in everyone if e.record["status"] == "ok"]
    if device.kind != "cpu":
        # the fp64 truth has served, and a GPU's memory is short
        for name in ("truth", "exact"):
            if hasattr(inputs, name):
                setattr(inputs, name, None)
        device.release()
    if not options.check:
        _race(racing, options)
        if options.memory and device.kind == "cpu":
            # after the race, and without its inputs and optimiser states in this process
            del inputs
            for contender in everyone:
                contender.runner = None
            gc.collect()
            _memory(benchmark, shape, mode, racing, options)
    return {
        "op": benchmark.name,
        "shape": vars(shape),
        "mode": mode,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.kind,
        "baseline": options.baseline or benchmark.baseline,
        "check": options.check,
        "seed": options.seed,
        "flops": benchmark.flops(shape, mode),
        "bytes": benchmark.bytes(shape, mode, dtype.itemsize),
        "facts": {
            key: started[key] for key in ("date", "load", "git", "level", "torch", "torch_threads")
        },
        "providers": [_record(contender, device) for contender in everyone],
    }


def _gate(
    benchmark: Benchmark, inputs: Any, mode: str, everyone: list[Contender], options: Options
) -> None:
    """Builds and calls each provider once, the yardstick first, and judges its outputs."""
    device = options.device
    yardstick: Outputs | None = None
    for contender in sorted(everyone, key=lambda e: e.name != EAGER):
        options.notify(f"{benchmark.name} {mode}: gate, {contender.name}")
        meter = Meter(device)
        outputs: Outputs = {}
        try:
            with contender.at_level(), device.making():
                contender.runner = contender.provider.build(inputs, mode)
            device.poison()
            outputs = contender.call(device)
            contender.settle(device)
            with meter.ignoring():
                if yardstick is None:
                    yardstick = _own_copy(outputs, device)
                verdict = benchmark.check(inputs, mode, outputs, yardstick)
            outputs = {}
            if device.kind != "cpu" and options.memory and verdict.ok:
                _device_memory(contender, device, meter)
        except Unavailable as error:
            contender.record.update(status="absent", reason=str(error))
        except Exception as error:
            # a broken peer must not end the run of the others; the table shows why it is out
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            contender.record.update(status="failed", reason=reason)
            no_memory = isinstance(error, device.OutOfMemory)
            if contender.name == EAGER and (benchmark.yardstick is None or not no_memory):
                raise
        else:
            contender.record.update(
                status="ok" if verdict.ok else "wrong",
                reason=verdict.detail,
                error=verdict.error,
                eager_error=verdict.eager_error,
            )
        if contender.record["status"] != "ok":
            contender.runner = None
            outputs = {}
            device.release()
        if yardstick is None:
            assert benchmark.yardstick is not None
            yardstick = benchmark.yardstick(inputs, mode)


def _own_copy(outputs: Outputs, device: Cpu) -> Outputs:
    """On a GPU a copy: what eager allocated is measured when its outputs are gone."""
    if device.kind == "cpu":
        return outputs
    return {name: tensor.clone() for name, tensor in outputs.items()}


def _device_memory(contender: Contender, device: Cpu, meter: Meter) -> None:
    meter.built()
    meter.watch()
    contender.call(device, meter)
    contender.settle(device)
    contender.record["extra_bytes"] = max(0, meter.extra())


def _race(racing: list[Contender], options: Options) -> None:
    device = options.device
    share = options.budget / max(1, len(racing))
    # the gate's call has compiled and touched everything; quick ones still warm up caches
    for contender in racing:
        if contender.seconds < 0.5:
            for _ in range(2):
                if contender.runner is not None:
                    _call_or_drop(contender, device)
    device.settle()
    racing[:] = [contender for contender in racing if contender.runner is not None]
    for contender in racing:
        contender.seconds = device.seconds(contender.span)
        contender.lead = 1.5 * contender.host_ms / 1e3
    # lower levels of ours are for information: a slow one takes no more than its share
    wanted = {
        e.name: max(1, min(options.rounds, int(share / max(e.seconds, 1e-9))))
        if e.level
        else options.rounds
        for e in racing
    }
    began = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for done in range(max(options.rounds, MOST_ROUNDS)):
            if done >= options.rounds and time.perf_counter() - began > options.budget:
                break
            options.notify(f"round {done + 1}")
            running = [
                e for e in racing if done < wanted[e.name] or wanted[e.name] >= options.rounds
            ]
            for contender in running:
                _call_or_drop(contender, device)
            device.settle()
            for contender in running:
                if contender.runner is not None:
                    contender.times.append(device.seconds(contender.span) * 1e3)
            racing[:] = [contender for contender in racing if contender.runner is not None]
    finally:
        gc.enable()


def _call_or_drop(contender: Contender, device: Cpu) -> None:
    """A provider that finds no memory beside what all the others keep leaves the race."""
    try:
        contender.call(device)
    except device.OutOfMemory as error:
        reason = f"in the race, {type(error).__name__}: {error}".splitlines()[0]
        contender.record.update(status="failed", reason=reason)
        contender.runner, contender.times = None, []
    if contender.runner is None:
        device.release()


def _memory(
    benchmark: Benchmark, shape: Shape, mode: str, racing: list[Contender], options: Options
) -> None:
    for contender in racing:
        if contender.level:
            continue
        options.notify(f"{benchmark.name} {shape.name} {mode}: memory, {contender.name}")
        answer = peak_extra(
            benchmark.name, shape.name, mode, contender.name, torch.get_num_threads()
        )
        contender.record["extra_bytes"] = answer.get("bytes")
        if "reason" in answer:
            contender.record["extra_reason"] = answer["reason"]


def _record(contender: Contender, device: Cpu) -> dict[str, Any]:
    record = {"name": contender.name, "screens": contender.provider.screens, **contender.record}
    ours = contender.name.startswith("ours") and device.kind == "cpu"
    record["level"] = contender.level or (mikernels.cpu_level() if ours else None)
    record["times_ms"] = [round(t, 6) for t in contender.times]
    if contender.times and device.kind != "cpu":
        # what the host spends on a call; above ms, the launches are the bottleneck
        record["host_ms"] = round(contender.host_ms, 6)
    if contender.times:
        record["ms"] = stats.summary(contender.times)
    return record
