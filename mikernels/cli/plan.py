# SPDX-License-Identifier: Apache-2.0
"""`mikernels plan`: memory, disk and time of a training run, before it starts.

It takes the options of `mikernels train`, by its signature, so that none is written twice.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Any, get_type_hints

import typer

from mikernels.cli.planned import Planned
from mikernels.cli.train import train

# of train alone
LEFT = ("plan", "resume", "export_saelens")


def plan(**options: Any) -> None:
    """Say what `mikernels train` with these options would take: memory, disk and time.

    Some steps of the run are trained, at its own sizes, for some seconds each without and with dead
    features; a checkpoint is written beside --out and removed. Exit code 1, with a warning, if the
    run does not fit into the memory or on the disk.

    Examples:

        mikernels plan --activations acts/ --expansion 32 --tokens 100M

        mikernels plan --model gpt2 --layer 6 --text corpus.txt --tokens 10M --json plan.json
    """
    train(plan=Planned(options.pop("dead")), **options)  # type: ignore[arg-type]


def _signature() -> inspect.Signature:
    hints = get_type_hints(train, include_extras=True)
    kept = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(train).parameters.items()
        if name not in LEFT
    ]
    dead = Annotated[
        float,
        typer.Option(help="Share of the features that is dead at the end, a guess.", min=0, max=1),
    ]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([*kept, inspect.Parameter("dead", kind, default=0.1, annotation=dead)])


plan.__signature__ = _signature()  # type: ignore[attr-defined]
plan.__annotations__ = {name: p.annotation for name, p in _signature().parameters.items()}
