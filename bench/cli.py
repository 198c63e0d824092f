# SPDX-License-Identifier: Apache-2.0
"""`mikernels bench`: measure, list, plot."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.status import Status
from typer.core import TyperGroup

from . import NAMES, harness, load, machine, report, results
from .declare import SHAPES, Benchmark


class _RunByDefault(TyperGroup):
    """`bench encode --shape S1` means `bench run encode --shape S1`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {*self.commands, "--help"}
        return super().parse_args(ctx, args if args and args[0] in known else ["run", *args])


app = typer.Typer(
    cls=_RunByDefault,
    add_completion=False,
    help="Measure the operators against eager torch, torch.compile and installed peers.",
)


@app.command()
def run(
    ops: Annotated[
        list[str] | None,
        typer.Argument(help="Operators to measure, or `all`; none lists them."),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help=f"Comma-separated: {', '.join(SHAPES)}.")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="Comma-separated: fwd, bwd, step.")] = None,
    providers: Annotated[
        str, typer.Option(help="Comma-separated names or globs: ours,eager or 'ours*'.")
    ] = "*",
    baseline: Annotated[
        str | None, typer.Option(help="Provider that ratios refer to; default: the operator's own.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: torch's.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Fewest interleaved rounds.")] = 7,
    budget: Annotated[
        float, typer.Option(min=0.0, help="Seconds that a case may go on adding rounds.")
    ] = 15.0,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    check: Annotated[bool, typer.Option("--check", help="Correctness gate only.")] = False,
    memory: Annotated[bool, typer.Option(help="Measure peak extra memory as well.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Merge each finished case into this file.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip cases that --json already holds.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu; cuda once there are kernels for it.")] = "cpu",
    list_only: Annotated[bool, typer.Option("--list", help="List operators and shapes.")] = False,
) -> None:
    """Measure operators; `bench plot` draws the results.

    Each provider passes the correctness gate before it is timed; the exit code is 1 when one gives
    wrong results or ours fails.

    Everything that is reported, case by case: bench all --json FILE --resume
    """
    console = Console()
    if not console.is_terminal:
        # a file or a pipe has no width to fit into
        console.width = 140
    try:
        if list_only or not ops:
            _list(console)
            return
        _check_device(device)
        if check and json_file is not None:
            raise ValueError("bench: --check measures nothing to save; leave out it or --json")
        chosen = [load(name) for name in (NAMES if ops == ["all"] else ops)]
        cases = _cases(chosen, shape, mode)
        options = harness.Options(
            providers=tuple(providers.split(",")),
            rounds=rounds,
            budget=budget,
            check=check,
            memory=memory,
            baseline=baseline,
            seed=seed,
        )
        _check_providers(chosen, options.providers, baseline)
        if threads is not None:
            torch.set_num_threads(threads)
        failed = _measure_all(cases, options, json_file, resume, console)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    if failed:
        console.print("[bold red]FAIL[/] " + "; ".join(failed))
        raise typer.Exit(1)


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(help="A results file of `bench --json`.")],
    out: Annotated[Path, typer.Option(help="Picture to write: .svg or .png.")],
) -> None:
    """Draw a results file."""
    from .plot import draw

    try:
        draw(results.load(file), out)
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"wrote {out}")


def _list(console: Console) -> None:
    for name in NAMES:
        bench = load(name)
        entries = ", ".join(provider.name for provider in bench.providers)
        cases = ", ".join(f"{mode}: {' '.join(names)}" for mode, names in bench.shapes.items())
        console.print(f"[bold]{name}[/]  {bench.summary}")
        console.print(f"  modes {', '.join(bench.modes)}; `all` measures {cases}")
        console.print(f"  providers {entries}; baseline {bench.baseline}")
    for s in SHAPES.values():
        console.print(f"{s.name}: N={s.n} d={s.d} F={s.f} k={s.k}", highlight=False)


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench: device must be cpu or cuda, got {device!r}")
    if device == "cuda":
        why = (
            "no CUDA kernels are written yet" if torch.cuda.is_available() else "torch sees no GPU"
        )
        raise ValueError(f"bench: device cuda is not available: {why}; use --device cpu")


def _cases(chosen: list[Benchmark], shape: str | None, mode: str | None) -> list[tuple]:
    """(benchmark, shape, mode) of all that was asked for; an op without a mode is skipped."""
    modes = {m for bench in chosen for m in bench.modes}
    _known("mode", mode, modes)
    _known("shape", shape, SHAPES)
    cases = []
    for bench in chosen:
        # without --shape: what `all` measures; a mode that is not part of it at S1
        for m in mode.split(",") if mode else (bench.modes if shape else bench.shapes):
            names = shape.split(",") if shape else bench.shapes.get(m, ("S1",))
            cases += [(bench, SHAPES[name], m) for name in names if m in bench.modes]
    return cases


def _known(option: str, words: str | None, choices: Iterable[str]) -> None:
    for word in words.split(",") if words else ():
        if word not in choices:
            raise ValueError(
                f"bench: --{option} must be one of {', '.join(sorted(choices))}, got {word!r}"
            )


def _check_providers(
    chosen: list[Benchmark], patterns: tuple[str, ...], baseline: str | None
) -> None:
    names = {e.name: None for bench in chosen for e in harness.entrants(bench)}
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"bench: --providers must match some of {', '.join(names)}, got {pattern!r}"
            )
    for bench in chosen if baseline else ():
        own = [provider.name for provider in bench.providers]
        if baseline not in own:
            raise ValueError(
                f"bench {bench.name}: --baseline must be one of {', '.join(own)}, got {baseline!r}"
            )


def _measure_all(
    cases: list[tuple],
    options: harness.Options,
    json_file: Path | None,
    resume: bool,
    console: Console,
) -> list[str]:
    """Runs the cases, prints and saves each; returns what failed the gate."""
    facts = machine.facts()
    kept = None
    if json_file is not None and json_file.exists():
        kept = results.load(json_file)
        results.same_machine(json_file, kept, facts)
    # the gate alone compares with no ceiling
    peaks = {} if options.check else machine.peaks()
    file = {**(kept or results.new(facts, peaks)), "machine": facts, "peaks": peaks}
    console.print(
        f"{facts['cpu']}, {facts['torch_threads']} threads, level {facts['level']}, load "
        f"{facts['load'] and round(facts['load'][0], 1)}"
        + (f"; ceilings {json.dumps(_rounded(peaks))}" if peaks else ""),
        highlight=False,
    )
    if facts["load"] and facts["load"][0] > facts["cores"] / 2 and not options.check:
        console.print(
            f"[yellow]busy[/]: load {facts['load'][0]:.1f} on {facts['cores']} cores before the "
            f"start; times will be noise"
        )
    have = {results.key(case) for case in file["cases"]}
    failed = []
    for bench, shape, mode in cases:
        name = f"{bench.name} {mode} {shape.name}"
        if resume and (bench.name, shape.name, mode, facts["torch_threads"]) in have:
            console.print(f"{name}: kept from {json_file}")
            continue
        with Status(name, console=console) as status:
            timed = replace(options, notify=status.update)
            case = harness.measure(bench, shape, mode, timed)
        if not options.check:
            case["peaks"] = peaks
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


def _rounded(peaks: dict[str, dict[str, float | None]]) -> dict[str, dict[str, float]]:
    return {
        threads: {name: round(value, 1) for name, value in values.items() if value}
        for threads, values in peaks.items()
    }
