# SPDX-License-Identifier: Apache-2.0
"""`mikernels bench`: measure, list, plot."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from . import load, names
from .gpu import device as devices
from .harness import harness, results, session
from .harness.spec import DTYPES, FAMILIES, GPU_SHAPES, Benchmark, sizes_of


class _RunByDefault(TyperGroup):
    """`bench encode --shape S1` means `bench run encode --shape S1`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {*self.commands, "--help", "-h"}
        return super().parse_args(ctx, args if args and args[0] in known else ["run", *args])


app = typer.Typer(
    cls=_RunByDefault,
    add_completion=False,
    help="Measure the operators against eager torch, torch.compile and installed peers.",
    epilog="One operator at one shape, in half a minute: `mikernels bench row_topk --shape S1`; "
    "all operators and shapes: `mikernels bench --list`; every option: `mikernels bench run -h`.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def run(
    ops: Annotated[
        list[str] | None,
        typer.Argument(help="Operators to measure, or `all`; none lists them."),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help=f"Comma-separated: {', '.join(dict.fromkeys(chain(*FAMILIES.values())))}; "
            f"with cuda also {', '.join(GPU_SHAPES)}."
        ),
    ] = None,
    mode: Annotated[str | None, typer.Option(help="Comma-separated: fwd, bwd, gim, step.")] = None,
    providers: Annotated[
        str, typer.Option(help="Comma-separated names or globs: ours,eager or '*,!compile'.")
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
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated, with cuda: bf16, fp32, fp16; default: what each operator names."
        ),
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="List operators and shapes.")] = False,
) -> None:
    """Measure operators; `bench plot` draws the results.

    Each provider passes the correctness gate before it is timed; the exit code is 1 when one gives
    wrong results or ours fails.

    Examples:

        mikernels bench row_topk --shape S1

        mikernels bench encode --providers ours,eager --rounds 5 --json encode.json

        mikernels bench all --json all.json --resume
    """
    console = Console()
    if not console.is_terminal:
        # a file or a pipe has no width to fit into
        console.width = 140
    try:
        if list_only or not ops:
            _list(console)
            return
        where = devices.get(device)
        if check and json_file is not None:
            raise ValueError("bench: --check measures nothing to save; leave out it or --json")
        # without a shape of its own an operator is not measured on a GPU
        everything = names(gpu=device != "cpu") if ops == ["all"] else ops
        chosen = [load(name) for name in everything]
        cases = _cases(chosen, shape, mode, dtype, device)
        options = harness.Options(
            providers=tuple(providers.split(",")),
            rounds=rounds,
            budget=budget,
            check=check,
            memory=memory,
            baseline=baseline,
            seed=seed,
            device=where,
        )
        _check_providers(chosen, options.providers, baseline, device)
        if threads is not None:
            torch.set_num_threads(threads)
        with results.written(json_file):
            failed = session.measure_all(cases, options, json_file, resume, console)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    if failed:
        console.print("[bold red]FAIL[/] " + escape("; ".join(failed)))
        raise typer.Exit(1)


@app.command()
def predict(
    devices_named: Annotated[
        list[str] | None, typer.Argument(metavar="[DEVICE]...", help="h200, h100; none is both.")
    ] = None,
) -> None:
    """Write down the times expected on a GPU, from bytes, arithmetic and machine code."""
    from .gpu import predicted
    from .gpu.predict import predictions
    from .harness.rates import DEVICES

    for name in devices_named or DEVICES:
        if name not in DEVICES:
            raise typer.BadParameter(
                f"bench predict: must be of {', '.join(DEVICES)}, got {name!r}"
            )
        results.save(predicted.path(name), predictions(name))
        typer.echo(f"wrote {predicted.path(name).name}")


@app.command()
def host(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
) -> None:
    """Time what a launch costs the host, with a stand-in for the GPU's driver."""
    from .gpu.host import costs

    found = {}
    for name, launches, total, triton in costs():
        found[name] = {"launches": launches, "seconds": total, "seconds_of_triton": triton}
        ours = (total - triton) * 1e6 / launches
        typer.echo(
            f"{name:18} {launches} launches, {total * 1e6:5.1f} us: Triton {triton * 1e6:5.1f}, "
            f"the rest {ours:4.1f} per launch"
        )
    if json_file is not None:
        results.save(json_file, found)


@app.command()
def crossover(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Check that `auto` is at most 5 % slower than the better of sparse and dense."""
    from .gpu import tune

    try:
        slow = tune.slow_choices(devices.get(device))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if slow:
        typer.echo(f"FAIL {len(slow)} choices; `mikernels tune --device {device}` measures anew")
        raise typer.Exit(1)


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(help="A results file of `bench --json`.")],
    out: Annotated[Path, typer.Option(help="Picture to write: .svg or .png.")],
    op: Annotated[
        list[str] | None, typer.Option(help="Of this operator alone; may be repeated.")
    ] = None,
) -> None:
    """Draw a results file."""
    from .harness.plot import draw

    try:
        found = results.load(file)
        measured = sorted({case["op"] for case in found["cases"]})
        if unknown := sorted(set(op or ()) - set(measured)):
            raise ValueError(f"bench plot: --op must be of {measured}, got {unknown}")
        draw({**found, "cases": [c for c in found["cases"] if not op or c["op"] in op]}, out)
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"wrote {out}")


@app.command()
def quality(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TASK]...", help="synthetic, smollm2; none is both."),
    ] = None,
    contenders: Annotated[
        list[str] | None,
        typer.Option(
            "--contender",
            help="library:setting=value,... of mikernels, saelens or dictionary_learning; may be "
            "repeated, the first is what CPU time is set equal to.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of everyone.")] = 3,
    share: Annotated[
        float, typer.Option(min=0.001, help="Of the task's steps; 1 is what is reported.")
    ] = 1.0,
    equal_cpu: Annotated[
        bool, typer.Option(help="Train the others once more, for our CPU time.")
    ] = True,
    json_folder: Annotated[
        Path | None, typer.Option("--json", help="Keep finished runs in quality-TASK.json here.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="For activations and samples.")] = Path("out/quality"),
) -> None:
    """Train the same SAE by several libraries on the same batches: quality and CPU time.

    Variance unexplained, known features found (synthetic), cross-entropy recovered (smollm2) and
    dead features, at equal tokens and at equal CPU time, one thread.

    A quick look: bench quality synthetic --share 0.02 --seeds 2
    """
    from .quality import session, tables
    from .quality.tasks import TASKS

    console = Console()
    if not console.is_terminal:
        console.width = 240
    threads = torch.get_num_threads()
    try:
        for name in tasks or TASKS:
            if name not in TASKS:
                raise ValueError(
                    f"bench quality: a task must be one of {', '.join(TASKS)}, got {name!r}"
                )
            torch.set_num_threads(1)
            file = None if json_folder is None else json_folder / f"quality-{name}.json"
            with results.written(file):
                task = TASKS[name](cache, console).of(share)
                chosen = contenders or list(session.DEFAULT)
                found = session.measure(task, chosen, seeds, file, equal_cpu, console)
            tables.show(found, console)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    finally:
        torch.set_num_threads(threads)


def _list(console: Console) -> None:
    for name in names():
        bench = load(name)
        entries = ", ".join(provider.name for provider in bench.providers)
        cases = ", ".join(f"{mode}: {' '.join(s)}" for mode, s in bench.shapes.items())
        console.print(f"[bold]{name}[/]  {bench.summary}")
        console.print(f"  modes {', '.join(bench.modes)}; `all` measures {cases}")
        console.print(f"  providers {entries}; baseline {bench.baseline}")
        for m, shapes in bench.gpu_shapes.items():
            dtypes = ", ".join(bench.gpu_dtypes)
            console.print(f"  cuda, {m}: {' '.join(shapes)} in {dtypes}", highlight=False)
    for s in chain(*(family.values() for family in (*FAMILIES.values(), GPU_SHAPES))):
        console.print(f"{s.name}: {sizes_of(vars(s))}", highlight=False)


def _cases(
    chosen: list[Benchmark], shape: str | None, mode: str | None, dtype: str | None, device: str
) -> list[session.Case]:
    """All that was asked for; an op without a mode or a dtype is skipped."""
    modes = {m for bench in chosen for m in bench.modes}
    more = {} if device == "cpu" else GPU_SHAPES
    _known("mode", mode, modes)
    known = {name for bench in chosen for name in FAMILIES[bench.family]}
    _known("shape", shape, known | set(more))
    _known("dtype", dtype, DTYPES if device == "cuda" else ("fp32",))
    cases = []
    for bench in chosen:
        own, dtypes = bench.shapes, ["fp32"]
        if device != "cpu":
            # fp16 is bf16's twin: on request
            own, dtypes = bench.gpu_shapes, [t for t in bench.gpu_dtypes if t != "fp16"]
            dtypes = dtype.split(",") if dtype else dtypes
        # without --shape: what `all` measures; a mode that is not part of it at its first shape
        for m in mode.split(",") if mode else (bench.modes if shape else own):
            if m not in bench.modes:
                continue
            fallback = next(iter((own or bench.shapes).values()))[:1]
            for name in shape.split(",") if shape else own.get(m, fallback):
                shapes = FAMILIES[bench.family] | (more if bench.family == "sae" else {})
                if name not in shapes:
                    continue
                for kind in dtypes:
                    low = kind in bench.gpu_dtypes and m not in bench.fp32_modes
                    if kind == "fp32" or low:
                        cases.append(session.Case(bench, shapes[name], m, kind))
    if not cases:
        raise ValueError(
            f"bench: none of {', '.join(b.name for b in chosen)} is measured in --dtype {dtype}; "
            f"leave it out"
        )
    return cases


def _known(option: str, words: str | None, choices: Iterable[str]) -> None:
    for word in words.split(",") if words else ():
        if word not in choices:
            raise ValueError(
                f"bench: --{option} must be one of {', '.join(sorted(choices))}, got {word!r}"
            )


def _check_providers(
    chosen: list[Benchmark], patterns: tuple[str, ...], baseline: str | None, device: str
) -> None:
    here = {e.name: None for bench in chosen for e in harness.contenders(bench, kind=device)}
    # what is left out need not be there, but must have a name that some operator knows
    every = {e.name for name in names() for e in harness.contenders(load(name), kind=device)}
    for pattern in patterns:
        known = every if pattern.startswith("!") else here
        if not fnmatch.filter(known, pattern.removeprefix("!")):
            raise ValueError(
                f"bench: --providers must match some of {', '.join(here)}, got {pattern!r}"
            )
    for bench in chosen if baseline else ():
        own = [provider.name for provider in bench.providers if device in provider.devices]
        if baseline not in own:
            raise ValueError(
                f"bench {bench.name}: --baseline must be one of {', '.join(own)}, got {baseline!r}"
            )
