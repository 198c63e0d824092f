# SPDX-License-Identifier: Apache-2.0
"""`--json FILE`: what a command prints, for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

FIX = "choose another --json"

Json = Annotated[
    Path | None,
    typer.Option(
        "--json", help="Also write the figures as JSON to this file.", rich_help_panel="Output"
    ),
]


def check_json(command: str, path: Path | None) -> None:
    """A place for the file, before minutes are spent on what goes there.

    Raises:
        FileNotFoundError: its folder does not exist, or it is a folder.
    """
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise FileNotFoundError(
            f"{command}: --json must be a file of an existing folder, got {path}; make the folder"
        )


def write_figures(command: str, path: Path | None, values: dict[str, Any]) -> None:
    """Whole or not at all; NaN and inf, which JSON has not, become null."""
    if path is None:
        return
    from mikernels.files import explained, finite, write_json

    with explained(command, "figures", path, FIX):
        write_json(path, finite(values))
    print(f"wrote {path}")
