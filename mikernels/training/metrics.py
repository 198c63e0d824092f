# SPDX-License-Identifier: Apache-2.0
"""What a run measured: running sums on the device, rows in memory, lines in a JSONL file."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mikernels.codes import SparseCodes

PARTS = ("encode", "decode", "gradients", "optimizer", "other")
MEANS = ("loss", "mse", "fvu", "aux_loss", "l0")


@dataclass
class History:
    """A run's measurements.

    Attributes:
        rows: a dict per logged step. step, tokens: so far. loss, mse, fvu, aux_loss, l0: means over
            the tokens since the row before; loss, mse and aux_loss are of the scaled activations,
            scale^2 times those of the source's. dead_fraction, lr, k: now. step_ms: mean time of a
            step without its source. tokens_per_second: of everything, source and checkpoints
            included.
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


class Means:
    """Means over tokens of 0-dim tensors; nothing is read back before it is asked for.

    Attributes:
        sums: of every quantity, times the tokens of its micro-batch. tokens: in all.
    """

    def __init__(self, sums: dict[str, float] | None = None, tokens: int = 0):
        self.sums: dict[str, Any] = dict(sums) if sums else dict.fromkeys(MEANS, 0.0)
        self.tokens = tokens

    def add(self, codes: SparseCodes, **losses: torch.Tensor) -> None:
        """One micro-batch: its loss, mse, fvu and aux_loss, and the L0 of its codes."""
        tokens = codes.values.numel() // codes.k
        for name, value in losses.items():
            self.sums[name] = self.sums[name] + value.detach().double() * tokens
        active = (codes.values.detach() != 0).sum(dtype=torch.float64)
        self.sums["l0"] = self.sums["l0"] + active
        self.tokens += tokens

    def merge(self, other: Means) -> None:
        """Add another's sums; they are copied, so that it may change afterwards."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums[name] + value
        self.tokens += other.tokens

    def read(self) -> dict[str, float]:
        """The sums as numbers: synchronises the device."""
        return {name: float(value) for name, value in self.sums.items()}

    def means(self) -> dict[str, float]:
        """The means over the tokens: synchronises the device."""
        return {name: value / self.tokens for name, value in self.read().items()}


class JsonLines:
    """A file with one JSON object a line, flushed line by line.

    Args:
        path: the file, made when missing.
        last_step: lines beyond this step, and a line cut short by a kill, are removed first.
    """

    def __init__(self, path: Path, last_step: int):
        self.path = path
        self.kept: list[dict[str, Any]] = []
        if path.exists():
            self.kept = [row for row in _complete_rows(path) if row["step"] <= last_step]
            shorter = path.with_name(f".{path.name}.tmp")
            with self._explained():
                shorter.write_text("".join(json.dumps(row) + "\n" for row in self.kept))
                os.replace(shorter, path)
        self._file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; a number that is not finite becomes null.

        Raises:
            OSError: when it cannot be written, naming the file.
        """
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        with self._explained():
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """To the disk itself: what is older than a checkpoint survives a power cut, too."""
        with self._explained():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"Trainer: metrics must be written to {self.path}, got {error.strerror}; free "
                f"space, then resume from the last checkpoint",
            ) from error


def _complete_rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines := path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise ValueError(
                f"Trainer: {path} must hold one JSON object a line, got line {number}: "
                f"{line[:60]!r}; move the file away to resume without its history"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(
                f"Trainer: {path} must hold rows with a step, got line {number}: {line[:60]!r}; "
                f"move the file away to resume without its history"
            )
        yield row
