# SPDX-License-Identifier: Apache-2.0
"""Runs the cases of one command, shows each, and merges it into the results file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from ..gpu import predicted
from . import harness, machine, report, results
from .spec import Benchmark, Shape


class Case(NamedTuple):
    """What is measured; dtype is a name of spec.DTYPES."""

    bench: Benchmark
    shape: Shape
    mode: str
    dtype: str


def measure_all(
    cases: list[Case],
    options: harness.Options,
    json_file: Path | None,
    resume: bool,
    console: Console,
) -> list[str]:
    """Runs the cases, prints and saves each; returns what failed the gate."""
    device = options.device
    facts = machine.facts(device)
    kept = None
    if json_file is not None and json_file.exists():
        kept = results.load(json_file)
        results.same_machine(json_file, kept, facts)
    # the gate alone compares with no ceiling
    peaks = {} if options.check else machine.peaks(device)
    file = {**(kept or results.new(facts, peaks)), "machine": facts, "peaks": peaks}
    _show_machine(facts, peaks, options.check, console)
    have = {results.key(case) for case in file["cases"]}
    failed = []
    for bench, shape, mode, dtype in cases:
        name = f"{bench.name} {mode} {shape.name}" + (f" {dtype}" if device.kind != "cpu" else "")
        if resume and results.key_of(bench.name, shape.name, mode, dtype, device.kind) in have:
            console.print(f"{name}: kept from {json_file}")
            continue
        with Status(name, console=console) as status:
            timed = replace(options, notify=status.update, dtype=dtype)
            try:
                case = harness.measure(bench, shape, mode, timed)
            except Exception as error:
                if device.kind == "cpu":
                    raise
                # lent GPUs are dear: one case without a yardstick must not cost the others
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                console.print(f"{name}: [bold red]error[/] {escape(reason)}", highlight=False)
                failed.append(f"{name}: {reason}")
                device.release()
                continue
        if not options.check:
            case["peaks"] = peaks
            predicted.attach(case, facts)
            report.derive(case)
        report.show(case, console)
        failed += [
            f"{name}: {p['name']} ({p['reason']})"
            for p in case["providers"]
            if p["status"] == "wrong" or (p["status"] == "failed" and p["name"].startswith("ours"))
        ]
        if json_file is not None:
            results.merge(file, case)
            results.save(json_file, file)
    return failed


def _show_machine(
    facts: dict[str, Any], peaks: dict[str, Any], check: bool, console: Console
) -> None:
    gpu = facts.get("gpu")
    head = f"{gpu['name']} ({gpu['sms']} SMs, driver {gpu['driver']}), " if gpu else ""
    console.print(
        f"{head}{facts['cpu']}, {facts['torch_threads']} threads, level {facts['level']}, load "
        f"{facts['load'] and round(facts['load'][0], 1)}"
        + (f"; ceilings {json.dumps(_rounded(peaks))}" if peaks else ""),
        highlight=False,
    )
    if facts["load"] and facts["load"][0] > facts["cores"] / 2 and not check:
        console.print(
            f"[yellow]busy[/]: load {facts['load'][0]:.1f} on {facts['cores']} cores before the "
            f"start; times will be noise"
        )


def _rounded(peaks: dict[str, dict[str, float | None]]) -> dict[str, dict[str, float]]:
    return {
        threads: {name: round(value, 1) for name, value in values.items() if value}
        for threads, values in peaks.items()
    }
