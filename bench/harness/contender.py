# SPDX-License-Identifier: Apache-2.0
"""One provider in one case: called, timed, recorded."""

from __future__ import annotations

import fnmatch
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import mikernels

from ..gpu.device import Cpu, Meter
from .spec import Benchmark, Outputs, Provider, Runner

EAGER = "eager"


@dataclass
class Contender:
    """A provider in one case, at one level."""

    name: str
    provider: Provider
    level: str | None = None
    runner: Runner | None = None
    record: dict[str, Any] = field(default_factory=lambda: {"status": "ok", "reason": ""})
    times: list[float] = field(default_factory=list)
    host_ms: float = 0.0
    lead: float = 0.0
    seconds: float = 0.0
    span: Any = None

    def at_level(self):
        return mikernels.force_level(self.level) if self.level else nullcontext()

    def call(self, device: Cpu, meter: Meter | None = None) -> Outputs:
        """One call; its span is known after `device.settle`."""
        assert self.runner is not None
        with self.at_level():
            if self.runner.before is not None:
                self.runner.before()
            if meter is not None:
                meter.watch_peak()
            mark = device.begin(self.lead)
            began = time.perf_counter()
            outputs = self.runner.run()
            took = time.perf_counter() - began
            self.span = device.end(mark)
        if not self.lead:
            # with a lead, a provider that waits for the device waits for the lead as well
            self.host_ms = took * 1e3
        return outputs

    def settle(self, device: Cpu) -> None:
        """`seconds` of the last call."""
        device.settle()
        self.seconds = device.seconds(self.span)


def contenders(
    benchmark: Benchmark, patterns: tuple[str, ...] = ("*",), kind: str = "cpu"
) -> list[Contender]:
    """The providers that match a pattern and none with a leading "!", and the yardstick; on a CPU
    ours at lower levels too."""
    everyone = []
    for provider in benchmark.providers:
        if kind not in provider.devices:
            continue
        everyone.append(Contender(provider.name, provider))
        if provider.ours and kind == "cpu":
            for level in mikernels.supported_levels():
                if level != mikernels.cpu_level():
                    everyone.append(Contender(f"{provider.name}:{level}", provider, level))
    unwanted = [p[1:] for p in patterns if p.startswith("!")]
    wanted = [*(p for p in patterns if not p.startswith("!")), EAGER]

    def chosen(name: str) -> bool:
        named, barred = (
            any(fnmatch.fnmatchcase(name, p) for p in group) for group in (wanted, unwanted)
        )
        return name == EAGER or (named and not barred)

    return [e for e in everyone if chosen(e.name)]
