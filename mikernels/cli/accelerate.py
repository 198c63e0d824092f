# SPDX-License-Identifier: Apache-2.0
"""`mikernels accelerate`: what `mikernels.accelerate` would do with a saved SAE."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mikernels.cli.figures import Json, check_json, write_figures


def accelerate(
    check: Annotated[
        Path,
        typer.Option(
            help="Folder of an SAE that SAELens, sparsify or dictionary_learning saved.",
            show_default=False,
        ),
    ],
    json_file: Json = None,
) -> None:
    """Say what `mikernels.accelerate` would replace in a saved SAE, tried on a small one.

    Nothing is written. Exit code 1 if it would be refused, with the reason.

    Example:

        mikernels accelerate --check checkpoints/final_1000000
    """
    check_json("accelerate", json_file)
    from mikernels.integrations.accelerate import check as say
    from mikernels.integrations.accelerate.saved import load_saved

    saved = load_saved(check)
    console = Console(soft_wrap=True)
    try:
        said = say(saved)
    except (TypeError, ValueError) as error:
        console.print(f"[bold red]refused[/] {escape(str(error))}")
        write_figures("accelerate", json_file, {"accelerated": False, "reason": str(error)})
        raise typer.Exit(1) from error
    console.print(f"[bold green]yes[/] {escape(said)}")
    write_figures("accelerate", json_file, {"accelerated": True, "reason": said})
