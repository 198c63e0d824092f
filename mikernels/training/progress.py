# SPDX-License-Identifier: Apache-2.0
"""The console: a progress bar on a terminal, a line per logged step elsewhere, nothing if quiet."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


def summary(row: dict[str, Any]) -> str:
    """The numbers that are looked at, e.g. `FVU 0.2134  L0 31.9  dead 1.2%  51,200 tokens/s,
    waited 1.3 s`."""
    return (
        f"FVU {row['fvu']:.4f}  L0 {row['l0']:.1f}  dead {row['dead_fraction']:.1%}  "
        f"{row['tokens_per_second']:,.0f} tokens/s, waited {row['waiting_seconds']:.1f} s"
    )


class Reporter:
    """Shows a run; a context manager.

    Args:
        total_steps: of the run. step: where it starts.
        quiet: show nothing but notes.
        title: before the bar.
        console: where to; None is the terminal (standard error).
    """

    def __init__(
        self,
        total_steps: int,
        step: int,
        *,
        quiet: bool = False,
        title: str = "training",
        console: Console | None = None,
    ):
        self.console = console or Console(stderr=True)
        self.total_steps = total_steps
        self.quiet = quiet
        self.bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console, refresh_per_second=4)
            self.task = self.bar.add_task(title, total=total_steps, completed=step, numbers="")
            self._collected: TaskID | None = None

    def __enter__(self) -> Reporter:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def collecting(self, done: int, total: int) -> None:
        """Tokens that a model has read, of those that it reads before the next step."""
        if self.bar is not None:
            if self._collected is None:
                self._collected = self.bar.add_task("activations", total=total, numbers="")
            self.bar.update(
                self._collected, completed=done, total=total, numbers="tokens", visible=done < total
            )
        elif done == 0 and not self.quiet:
            self._line(f"activations: reading {total:,} tokens")

    def log(self, row: dict[str, Any]) -> None:
        if self.bar is not None:
            self.bar.update(self.task, numbers=summary(row))
        elif not self.quiet:
            self._line(f"step {row['step']}/{self.total_steps}  {summary(row)}")

    def note(self, message: str) -> None:
        """Said even when quiet: interruptions, and where the work is."""
        self._line(message)

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
