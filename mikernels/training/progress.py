# SPDX-License-Identifier: Apache-2.0
"""The console: a progress bar on a terminal, a line per logged step elsewhere, nothing if quiet."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


def summary(row: dict[str, Any]) -> str:
    """The numbers that are looked at, e.g. `FVU 0.2134  L0 31.9  dead 1.2%  51,200 tokens/s,
    waited 1.3 s`."""
    return (
        f"FVU {row['fvu']:.4f}  L0 {row['l0']:.1f}  dead {row['dead_fraction']:.1%}  "
        f"{row['tokens_per_second']:,.0f} tokens/s, waited {row['waiting_seconds']:.1f} s"
    )


class Board:
    """Where runs are shown: a context manager.

    Args:
        console: where to; None is the terminal (standard error).
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self.console, refresh_per_second=4)
        self._shown = False

    def reporter(
        self, total_steps: int, step: int, title: str, *, quiet: bool = False, named: bool = False
    ) -> Reporter:
        """What shows one run.

        Args:
            total_steps: of the run. step: where it starts.
            title: before the bar; before each line, too, if named.
            quiet: show nothing but notes.
        """
        bars = None
        if self.console.is_terminal and not quiet:
            bars, self._shown = self._progress, True
            bars.start()
        return Reporter(self, bars, total_steps, step, title, quiet, f"{title}: " if named else "")

    def note(self, message: str) -> None:
        """Said even when quiet: interruptions, and where the work is."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shown:
            self._progress.stop()


class Reporter:
    """Shows one run: its bar, or its lines. Made by `Board.reporter`."""

    def __init__(
        self,
        board: Board,
        bars: Progress | None,
        total_steps: int,
        step: int,
        title: str,
        quiet: bool,
        prefix: str,
    ):
        self._board, self._bars, self._quiet, self._prefix = board, bars, quiet, prefix
        self.total_steps = total_steps
        self._collected: TaskID | None = None
        if bars is not None:
            # square brackets would be read as markup
            self._task = bars.add_task(escape(title), total=total_steps, completed=step, numbers="")

    def step(self, step: int) -> None:
        if self._bars is not None:
            self._bars.update(self._task, completed=step)

    def collecting(self, done: int, total: int) -> None:
        """Tokens that a model has read, of those that it reads before the next step."""
        if self._bars is not None:
            if self._collected is None:
                self._collected = self._bars.add_task("activations", total=total, numbers="")
            self._bars.update(
                self._collected, completed=done, total=total, numbers="tokens", visible=done < total
            )
        elif done == 0 and not self._quiet:
            self._board.note(f"activations: reading {total:,} tokens")

    def log(self, row: dict[str, Any]) -> None:
        if self._bars is not None:
            self._bars.update(self._task, numbers=summary(row))
        elif not self._quiet:
            self._board.note(f"{self._prefix}step {row['step']}/{self.total_steps}  {summary(row)}")

    def note(self, message: str) -> None:
        self._board.note(message)
