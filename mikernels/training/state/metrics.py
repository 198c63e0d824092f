# SPDX-License-Identifier: Apache-2.0
"""What a run measured: running sums on the device, rows in memory, lines in a JSONL file."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mikernels.files import explained, finite, irregular, parse_json, write_all, write_atomic
from mikernels.nn.losses import weighted
from mikernels.values.batch import Batch
from mikernels.values.codes import SparseCodes

PARTS = ("encode", "decode", "gradients", "optimizer", "other")
MEANS = ("loss", "mse", "fvu", "aux_loss", "sparsity", "l0")


@dataclass
class History:
    """A run's measurements.

    Attributes:
        rows: a dict per logged step. step, tokens: so far. loss, mse, fvu, aux_loss, sparsity, l0:
            means over the tokens since the row before; loss, mse and aux_loss are of the scaled
            activations, scale^2 times those of the source's; sparsity is what codes cost there.
            dead_fraction, lr, k: now. step_ms: mean time of a step without its source.
            waiting_seconds: for activations, since the row before. tokens_per_second: of the rest
            of that time, checkpoints included.
        scale: what activations were multiplied by (`TrainConfig.scale_activations`).
        parts: seconds of the steps in all, by part: encode, decode, gradients, optimizer, other.
            Host clocks: on an asynchronous device they measure the launches.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    scale: float = 1.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def column(self, name: str) -> list[Any]:
        """One entry of every row, e.g. `history.column("fvu")`."""
        return [row[name] for row in self.rows]


class Clock:
    """Seconds by part; what no part claims within a step is "other"."""

    def __init__(self, parts: dict[str, float]):
        self.parts = parts

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.parts[name] += time.perf_counter() - start

    @contextmanager
    def step(self) -> Iterator[None]:
        start, before = time.perf_counter(), self.total()
        yield
        self.parts["other"] += time.perf_counter() - start - (self.total() - before)

    def total(self) -> float:
        return sum(self.parts.values())


class Pace:
    """Wall time since a mark, apart for training and for waiting on the source.

    A GPU computes while the host waits: there training takes at least as long as the device was
    busy with steps, by its own clock.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.mark()

    def mark(self) -> None:
        self._start, self._waited = time.perf_counter(), 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def away(self) -> Iterator[None]:
        """The turns of other runs, which are not this one's time."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    @contextmanager
    def training(self) -> Iterator[None]:
        if self._device.type != "cuda":
            yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self._device)
        start.record(stream)
        yield
        end.record(stream)
        self._events.append((start, end))

    def read(self) -> tuple[float, float]:
        """Seconds of training and of waiting; synchronises a GPU."""
        for _, end in self._events:
            end.synchronize()
        busy = sum(start.elapsed_time(end) for start, end in self._events) / 1e3
        wall = time.perf_counter() - self._start
        training = min(wall, max(wall - self._waited, busy))
        return training, wall - training


class Means:
    """Means over tokens of 0-dim tensors; nothing is read back before it is asked for.

    Attributes:
        sums: of every quantity, times the tokens of its micro-batch. tokens: in all, each counted
            by its weight.
    """

    def __init__(self, sums: dict[str, float] | None = None, tokens: float = 0.0):
        self.sums: dict[str, Any] = dict(sums) if sums else dict.fromkeys(MEANS, 0.0)
        self.tokens: Any = tokens

    def add(self, batch: Batch, codes: SparseCodes, values: Mapping[str, Any]) -> None:
        """One micro-batch: its loss, mse, fvu, aux_loss and sparsity, and the L0 of its codes."""
        for name in MEANS[:-1]:
            self.sums[name] = self.sums[name] + values[name].detach().double() * batch.count
        self.sums["l0"] = self.sums["l0"] + weighted(codes.l0().double(), batch.weights)
        self.tokens = self.tokens + batch.count

    def merge(self, other: Means) -> None:
        """Add another's sums; they are copied, so that it may change afterwards."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums[name] + value
        self.tokens = self.tokens + other.tokens

    def read(self) -> dict[str, float]:
        """The sums as numbers: synchronises the device."""
        return {name: float(value) for name, value in self.sums.items()}

    def means(self) -> dict[str, float]:
        """The means over the tokens: synchronises the device."""
        tokens = float(self.tokens)
        return {name: value / tokens for name, value in self.read().items()}


class JsonLines:
    """A file with one JSON object a line, each written at once; a context manager.

    Args:
        path: the file, made when missing.
        last_step: lines beyond this step, and a line cut short by a kill, are removed first.

    Raises:
        ValueError: what is there is no such file. OSError: it cannot be written.
    """

    def __init__(self, path: Path, last_step: int):
        self.path = path
        self.kept: list[dict[str, Any]] = []
        if os.path.lexists(path):
            fix = "move the file away to resume without its history"
            self.kept = [
                row for row in complete_rows(path, "Trainer", fix) if row["step"] <= last_step
            ]
            with self._explained():
                write_atomic(path, "".join(json.dumps(row) + "\n" for row in self.kept))
        with self._explained():
            # unbuffered: a line that could not be written is not tried again while closing
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; a number that is not finite becomes null.

        Raises:
            OSError: when it cannot be written, naming the file; or the file was deleted.
        """
        self.check()
        before = os.fstat(self._file.fileno()).st_size
        try:
            with self._explained():
                write_all(self._file, (json.dumps(finite(row)) + "\n").encode())
        except OSError:
            with suppress(OSError):  # half a line goes; where that fails too, resume drops it
                self._file.truncate(before)
            raise

    def check(self) -> None:
        """The file that is written is still the one of that name; 2 us.

        Raises:
            FileNotFoundError: it was deleted or replaced, so that its rows are lost.
        """
        mine = os.fstat(self._file.fileno())
        try:
            there = os.lstat(self.path)
        except OSError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            state = "it was deleted" if there is None else "another file in its place"
            raise FileNotFoundError(
                errno.ENOENT,
                f"Trainer: metrics must be written to {self.path}, got {state}; the rows so far "
                f"are in Trainer.history, and in no file",
            )

    def sync(self) -> None:
        """To the disk itself: what is older than a checkpoint survives a power cut, too."""
        self.check()
        with self._explained():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with self._explained():
            self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        with suppress(OSError):  # the error under way is the one that tells
            self.close()

    def _explained(self) -> AbstractContextManager[None]:
        fix = "free space, then resume from the last checkpoint"
        return explained("Trainer", "metrics", self.path, fix)


def complete_rows(path: Path, where: str, fix: str) -> Iterator[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without one that a kill cut short."""
    from mikernels.schema import Row, check

    if kind := irregular(os.lstat(path).st_mode):
        raise ValueError(f"{where}: {path} must be a file of JSON lines, got {kind}; {fix}")
    whole = path.read_bytes()
    # what follows the last line's end was cut short by a kill
    lines = whole.split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(
                f"{where}: {path} must hold one JSON object a line, got line {number}: "
                f"{line[:60].decode(errors='backslashreplace')!r} ({error}); {fix}"
            ) from error
        check(Row, row, where, f"{path} line {number}", fix)
        yield row
