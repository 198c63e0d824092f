# SPDX-License-Identifier: Apache-2.0
"""`mikernels replay`: a call that the call log saved, run again and compared."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mikernels.cli.figures import Json, check_json, write_figures


def replay(
    file: Annotated[Path, typer.Argument(help='A call saved by mikernels.log("save", FOLDER).')],
    impl: Annotated[
        str, typer.Option(help="Compared with: reference, cpp, triton or cuda.")
    ] = "reference",
    json_file: Json = None,
) -> None:
    """Run a saved operator call again: the same bits, and as accurate as eager torch?

    The implementation that ran then runs with the same threads and at the same instruction-set
    level. Its bits are compared with those saved, and every result with float64: its error may be
    twice that of the reference in the call's dtype, plus a rounding. Exit code 1 if anything
    differs.

    Examples:

        mikernels replay calls/000001-encode.safetensors

        mikernels replay calls/000001-encode.safetensors --impl cpp --json found.json
    """
    from mikernels.calls.replay import replay as run

    check_json("replay", json_file)
    found = run(file, impl)
    print(f"{found.operator} by {found.implementation} ({found.reason})")
    for kind, told in (
        ("warning", found.warnings),
        ("ok", found.findings),
        ("differs", found.differences),
    ):
        for text in told:
            print(f"{kind:>8}  {text}")
    write_figures("replay", json_file, asdict(found))
    raise typer.Exit(1 if found.differences else 0)
