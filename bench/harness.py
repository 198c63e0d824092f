# SPDX-License-Identifier: Apache-2.0
"""Runs one declared case: gate, interleaved rounds, memory. Returns plain data for JSON.

All providers run in one process on the same inputs, in rounds A B C A B C, so that drift of the
machine hits all alike. At least `rounds` rounds, more while the budget lasts. A provider that is
absent, fails or gives wrong results stays in the record with its reason, and has no times.
"""

from __future__ import annotations

import fnmatch
import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

import mikernels

from . import machine, stats
from .declare import Benchmark, Outputs, Provider, Runner, Shape, Unavailable
from .memory import peak_extra

MOST_ROUNDS = 101
EAGER = "eager"


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        providers: glob patterns of provider names; the numerical yardstick always joins the gate.
        rounds: the fewest interleaved rounds.
        budget: seconds a case may go on adding rounds.
        check: gate only, no timing.
        memory: measure peak extra memory, one process a provider.
        baseline: overrides the benchmark's own.
    """

    providers: tuple[str, ...] = ("*",)
    rounds: int = 7
    budget: float = 15.0
    check: bool = False
    memory: bool = True
    baseline: str | None = None
    seed: int = 0
    notify: Callable[[str], None] = field(default=lambda message: None)


@dataclass
class Entrant:
    """A provider in one case, at one level."""

    name: str
    provider: Provider
    level: str | None = None
    runner: Runner | None = None
    record: dict[str, Any] = field(default_factory=lambda: {"status": "ok", "reason": ""})
    times: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def at_level(self):
        return mikernels.force_level(self.level) if self.level else nullcontext()

    def call(self) -> Outputs:
        """One call; `seconds` is how long it took."""
        assert self.runner is not None
        with self.at_level():
            if self.runner.before is not None:
                self.runner.before()
            start = time.perf_counter()
            outputs = self.runner.run()
            self.seconds = time.perf_counter() - start
        return outputs


def entrants(benchmark: Benchmark, patterns: tuple[str, ...] = ("*",)) -> list[Entrant]:
    """The providers that match a pattern, and the yardstick; ours at each lower level too."""
    everyone = []
    for provider in benchmark.providers:
        everyone.append(Entrant(provider.name, provider))
        if provider.ours:
            for level in mikernels.supported_levels():
                if level != mikernels.cpu_level():
                    everyone.append(Entrant(f"{provider.name}:{level}", provider, level))
    wanted = (*patterns, EAGER)
    return [e for e in everyone if any(fnmatch.fnmatchcase(e.name, p) for p in wanted)]


def measure(benchmark: Benchmark, shape: Shape, mode: str, options: Options) -> dict[str, Any]:
    """One case, as the dictionary that goes into the JSON file."""
    everyone = entrants(benchmark, options.providers)
    started = machine.facts()
    options.notify(f"{benchmark.name} {shape.name} {mode}: inputs")
    inputs = benchmark.inputs(shape, mode, options.seed)
    _gate(benchmark, inputs, mode, everyone, options)
    racing = [e for e in everyone if e.record["status"] == "ok"]
    if not options.check:
        _race(racing, options)
        if options.memory:
            # after the race, and without its inputs and optimiser states in this process
            del inputs
            for entrant in everyone:
                entrant.runner = None
            gc.collect()
            _memory(benchmark, shape, mode, racing, options)
    return {
        "op": benchmark.name,
        "shape": vars(shape),
        "mode": mode,
        "dtype": "float32",
        "baseline": options.baseline or benchmark.baseline,
        "check": options.check,
        "seed": options.seed,
        "flops": benchmark.flops(shape, mode),
        "bytes": benchmark.bytes(shape, mode),
        "facts": {
            key: started[key] for key in ("date", "load", "git", "level", "torch", "torch_threads")
        },
        "providers": [_record(entrant) for entrant in everyone],
    }


def _gate(
    benchmark: Benchmark, inputs: Any, mode: str, everyone: list[Entrant], options: Options
) -> None:
    """Builds and calls each provider once, the yardstick first, and judges its outputs."""
    yardstick: Outputs | None = None
    for entrant in sorted(everyone, key=lambda e: e.name != EAGER):
        options.notify(f"{benchmark.name} {mode}: gate, {entrant.name}")
        try:
            with entrant.at_level():
                entrant.runner = entrant.provider.build(inputs, mode)
            outputs = entrant.call()
            if yardstick is None:
                yardstick = outputs
            verdict = benchmark.check(inputs, mode, outputs, yardstick)
        except Unavailable as error:
            entrant.record.update(status="absent", reason=str(error))
        except Exception as error:
            # a broken peer must not end the run of the others; the table shows why it is out
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            entrant.record.update(status="failed", reason=reason)
            if entrant.name == EAGER:
                raise
        else:
            entrant.record.update(
                status="ok" if verdict.ok else "wrong",
                reason=verdict.detail,
                error=verdict.error,
                eager_error=verdict.eager_error,
            )
        if entrant.record["status"] != "ok":
            entrant.runner = None


def _race(racing: list[Entrant], options: Options) -> None:
    share = options.budget / max(1, len(racing))
    # the gate's call has compiled and touched everything; quick ones still warm up caches
    for entrant in racing:
        if entrant.seconds < 0.5:
            entrant.call()
            entrant.call()
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
            for entrant in racing:
                if done < wanted[entrant.name] or wanted[entrant.name] >= options.rounds:
                    entrant.call()
                    entrant.times.append(entrant.seconds * 1e3)
    finally:
        gc.enable()


def _memory(
    benchmark: Benchmark, shape: Shape, mode: str, racing: list[Entrant], options: Options
) -> None:
    for entrant in racing:
        if entrant.level:
            continue
        options.notify(f"{benchmark.name} {shape.name} {mode}: memory, {entrant.name}")
        answer = peak_extra(benchmark.name, shape.name, mode, entrant.name, torch.get_num_threads())
        entrant.record["extra_bytes"] = answer.get("bytes")
        if "reason" in answer:
            entrant.record["extra_reason"] = answer["reason"]


def _record(entrant: Entrant) -> dict[str, Any]:
    record = {"name": entrant.name, "screens": entrant.provider.screens, **entrant.record}
    ours = entrant.name.startswith("ours")
    record["level"] = entrant.level or (mikernels.cpu_level() if ours else None)
    record["times_ms"] = [round(t, 6) for t in entrant.times]
    if entrant.times:
        record["ms"] = stats.summary(entrant.times)
    return record
