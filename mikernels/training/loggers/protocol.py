# SPDX-License-Identifier: Apache-2.0
"""What a logger of metrics is, and how a run is kept safe from those that fail."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class RunInfo:
    """What a logger is told at the start of a run.

    Attributes:
        name: of the run: its folder's, or that in its group.
        out_dir: its folder; None without one.
        step: where it starts: 0, or the step that was resumed, after which rows come again that
            were logged before an interruption.
        settings: `{"sae": {...}, "config": {...}}`, JSON-able.
    """

    name: str
    out_dir: Path | None
    step: int
    settings: dict[str, Any]


@runtime_checkable
class MetricsLogger(Protocol):
    """Any object with these three: a run calls them in this order.

    Example:
        >>> class Printed:
        ...     def start(self, run): print(run.name, "from step", run.step)
        ...     def log(self, row): print(row["step"], row["fvu"])
        ...     def finish(self, failed): print("failed" if failed else "done")
    """

    def start(self, run: RunInfo) -> None:
        """Before the first step; what this raises refuses the run."""
        ...

    def log(self, row: dict[str, Any]) -> None:
        """A row, as it is in `metrics.jsonl` and `History.rows`: its own copy."""
        ...

    def finish(self, failed: bool) -> None:
        """After the last step; failed: an error or an interrupt ended the run."""
        ...


def checked(given: Sequence[MetricsLogger]) -> tuple[MetricsLogger, ...]:
    """The loggers, or a TypeError."""
    if isinstance(given, MetricsLogger):
        raise TypeError(
            f"Trainer: log_to must be a list of loggers, got one {type(given).__name__}; pass "
            f"[logger]"
        )
    for each in given:
        if isinstance(each, type) or not isinstance(each, MetricsLogger):
            raise TypeError(
                f"Trainer: log_to must hold objects with start(run), log(row) and finish(failed), "
                f"got {each!r}; pass e.g. [TensorBoardLogger()]"
            )
    return tuple(given)


class Loggers:
    """Rows go to every logger that has not failed."""

    def __init__(self, started: Sequence[MetricsLogger]):
        self._started = list(started)

    def write(self, row: dict[str, Any]) -> None:
        for each in list(self._started):
            try:
                each.log(dict(row))
            except Exception as error:
                self._started.remove(each)
                _warn(each, f"gets no more rows, since log raised {_said(error)}")
                try:
                    each.finish(True)
                except Exception as second:
                    _warn(each, f"could not be finished either: {_said(second)}")

    def finish(self, failed: bool) -> None:
        for each in self._started:
            try:
                each.finish(failed)
            except Exception as error:
                _warn(each, f"may lack its last rows, since finish raised {_said(error)}")


@contextmanager
def loggers(given: Sequence[MetricsLogger], run: RunInfo) -> Iterator[Loggers]:
    """Started for a run, and finished with it; only `start` may refuse a run."""
    with ExitStack() as stack:
        started: list[MetricsLogger] = []
        for each in given:
            each.start(run)
            started.append(each)
            stack.push(lambda kind, error, trace, one=each: _end(one, kind is not None))
        stack.pop_all()
    log = Loggers(started)
    try:
        yield log
    except BaseException:
        log.finish(True)
        raise
    log.finish(False)


def _end(logger: MetricsLogger, failed: bool) -> None:
    """Another logger has refused the run."""
    if failed:
        Loggers([logger]).finish(True)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _warn(logger: MetricsLogger, what: str) -> None:
    warnings.warn(
        f"Trainer: the run goes on, and {type(logger).__name__} {what}; metrics.jsonl and "
        f"Trainer.history have all rows",
        RuntimeWarning,
        stacklevel=4,
    )
