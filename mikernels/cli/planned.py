# SPDX-License-Identifier: Apache-2.0
"""How a plan of a training run is shown."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mikernels.cli.figures import write_figures

if TYPE_CHECKING:
    from mikernels.training import Plan


@dataclass(frozen=True)
class Planned:
    """Instead of a run: says what it would take, and ends with exit code 1 if it does not fit."""

    dead: float = 0.1

    def show(
        self,
        sae: Any,
        source: Any,
        config: Any,
        optimizer: Callable[..., Any] | None,
        out: Path,
        json_file: Path | None,
    ) -> None:
        from mikernels.training import plan

        own = None
        if optimizer is not None:
            make, rate = optimizer, config.peak_lr(sae.config.n_features)
            own = lambda parameters: make(parameters, lr=rate)  # noqa: E731
        found = plan(sae, source, config, out_dir=out, optimizer=own, dead=self.dead)
        print("\n".join(_lines(found, out)))
        write_figures("plan", json_file, asdict(found))
        raise typer.Exit(1 if found.warnings else 0)


def _lines(found: Plan, out: Path) -> list[str]:
    lines = [f"{found.steps:,} steps, {found.tokens:,} tokens"]
    if not math.isnan(found.seconds):
        lines.append(f"time    {_time(found.seconds)}: {_parts(found)}")
        lines.append(f"        a step takes {1e3 * found.step_seconds:,.0f} ms{_dead(found)}")
        rate = found.tokens / found.seconds
        lines.append(f"        {rate:,.0f} tokens/s")
    if found.extra_bytes is not None and found.total_bytes is not None:
        lines.append(
            f"memory  {_size(found.total_bytes)}: {_size(found.extra_bytes)} above weights and "
            f"activations{_of(found.available_bytes)}"
        )
    if found.checkpoint_bytes:
        lines.append(
            f"disk    {_size(found.disk_bytes)} in {out}: checkpoints of "
            f"{_size(found.checkpoint_bytes)}{_of(found.free_bytes)}"
        )
    return lines + [f"warning {warning}" for warning in found.warnings]


def _parts(found: Plan) -> str:
    named = {"auxk": "AuxK", "source": "activations"}
    return ", ".join(
        f"{named.get(name, name)} {_time(seconds)}"
        for name, seconds in found.parts.items()
        if seconds >= 0.01 * found.seconds
    )


def _dead(found: Plan) -> str:
    if found.dead_step_seconds is None:
        return ""
    return (
        f", {1e3 * found.dead_step_seconds:,.0f} ms with {found.dead:.0%} of the features dead, as "
        f"is assumed of the end; the run takes {_time(found.seconds_without_dead)} if none die"
    )


def _of(available: int | None) -> str:
    return "" if available is None else f"; {_size(available)} are free"


def _size(number: int) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
