# SPDX-License-Identifier: Apache-2.0
"""`mikernels replay`: a call that the call log saved, run again and compared."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def replay(
    file: Annotated[Path, typer.Argument(help='A call saved by mikernels.log("save", FOLDER).')],
    impl: Annotated[
        str, typer.Option(help="Compared with: reference, cpp, triton or cuda.")
    ] = "reference",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Run a saved operator call again: the same bits, and as accurate as eager torch?

    The implementation that ran then runs with the same threads and at the same instruction-set
    level. Its bits are compared with those saved, and every result with float64: its error may be
    twice that of the reference in the call's dtype, plus a rounding. Exit code 1 if anything
    differs.

    Examples:

        mikernels replay calls/000001-encode.safetensors

        mikernels replay calls/000001-encode.safetensors --impl cpp --json
    """
    from mikernels.calls.replay import replay as run

    found = run(file, impl)
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        print(f"{found.operator} by {found.implementation} ({found.reason})")
        for kind, told in (
            ("warning", found.warnings),
            ("ok", found.findings),
            ("differs", found.differences),
        ):
            for text in told:
                print(f"{kind:>8}  {text}")
    raise typer.Exit(1 if found.differences else 0)
