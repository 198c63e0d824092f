# SPDX-License-Identifier: Apache-2.0
"""Races of Triton kernels, found in the interpreter: every launch is recorded, and judged at once.

The interpreter runs programs one after the other and each as if it were one thread, so that its
results are right where a GPU's would depend on who comes first. Which addresses a launch reads and
writes is the same on both, and tells:

- between programs, which run in any order: no two may write one address, and what one writes no
  other may read;
- within a program, whose threads run in any order between two barriers (a phase): no address is
  written twice in a phase, by two stores or by one, nor read after it was written. It may be read
  before, as an update in place does, if both tensors of addresses are the same: then either a
  thread has the element in both, or the elements change threads in between, behind a barrier.

All that a load or store reaches lies in one of the tensors that the kernel was given.

Atomic operations order what they touch in ways that this does not follow; kernels have none.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import numpy as np
import triton
from interpreter_patches import Method, replace
from triton.runtime import interpreter

TRITON = str(Path(triton.__file__).parent)


class Race(AssertionError):
    """What a launch does has no one result, or reaches memory that is not its own."""


class Access(NamedTuple):
    """One load or store of a program; addresses in bytes."""

    write: bool
    program: int
    phase: int
    addresses: np.ndarray
    mask: np.ndarray
    size: int
    code: CodeType
    line: int

    def units(self, unit: int) -> np.ndarray:
        """Its addresses in units of so many bytes."""
        first = self.addresses[self.mask].view(np.int64) // unit
        parts = self.size // unit
        return first if parts == 1 else (first[:, None] + np.arange(parts)).ravel()

    def __str__(self) -> str:
        what = "write" if self.write else "read"
        return f"{what} by program {self.program} in {self.code.co_name}, line {self.line}"


class Memory:
    """One storage that a kernel was given."""

    def __init__(self, start: int, end: int, name: str):
        self.start, self.end, self.name = start, end, name
        self.accesses: list[Access] = []

    def conflicts(self) -> Iterator[tuple[str, Access, Access]]:
        """One example of each kind."""
        accesses = self.accesses
        unit = min(a.size for a in accesses)
        program = np.array([a.program for a in accesses])
        phase = np.array([a.phase for a in accesses])
        written, writer = _all([a for a in accesses if a.write], unit)
        number = np.flatnonzero([a.write for a in accesses])
        # in the order of time at each address
        order = np.argsort(written, kind="stable")
        written, writer = written[order], number[writer[order]]
        again = np.flatnonzero(written[1:] == written[:-1])
        a, b = writer[again], writer[again + 1]
        same_program = program[a] == program[b]
        for kind, which in (
            ("two programs write", ~same_program),
            ("one store writes twice", a == b),
            ("no barrier is between", same_program & (a != b) & (phase[a] == phase[b])),
        ):
            for i in np.flatnonzero(which)[:1]:
                yield kind, accesses[a[i]], accesses[b[i]]
        # now that they are disjoint: an address's program is that of its first write
        read, reader = _all([a for a in accesses if not a.write], unit)
        number = np.flatnonzero([not a.write for a in accesses])
        first = np.flatnonzero(np.r_[True, written[1:] != written[:-1]])
        at = np.searchsorted(written[first], read)
        at[at == first.size] = 0
        hit = written[first][at] == read
        at, reader = at[hit], number[reader[hit]]
        owner = writer[first[at]]
        for i in np.flatnonzero(program[owner] != program[reader])[:1]:
            yield "another program writes", accesses[reader[i]], accesses[owner[i]]
        # writes by (address, phase), in which order they are sorted
        phases = int(phase.max()) + 1
        keys = (np.cumsum(np.r_[True, written[1:] != written[:-1]]) - 1) * phases + phase[writer]
        wanted = at * phases + phase[reader]
        at = np.searchsorted(keys, wanted)
        at[at == keys.size] = 0
        hit = (keys[at] == wanted) & (program[writer[at]] == program[reader])
        for r, w in np.unique(np.stack([reader[hit], writer[at[hit]]]), axis=1).T:
            in_place = np.array_equal(accesses[r].addresses, accesses[w].addresses)
            if w < r or not in_place:
                yield "no barrier is between", accesses[r], accesses[w]
                break


def _all(accesses: list[Access], unit: int) -> tuple[np.ndarray, np.ndarray]:
    """All addresses, and of each the number of its access."""
    units = [a.units(unit) for a in accesses]
    owner = np.repeat(np.arange(len(units)), [u.size for u in units])
    return np.concatenate([*units, np.empty(0, np.int64)]), owner


class Launch:
    """What is recorded of the launch that is running."""

    def __init__(self, kernel: str, arguments: dict[str, Any]):
        self.kernel = kernel
        self.program, self.phase = -1, 0
        spans: dict[int, Memory] = {}
        for name, tensor in arguments.items():
            if hasattr(tensor, "untyped_storage"):
                storage = tensor.untyped_storage()
                start = storage.data_ptr()
                spans.setdefault(start, Memory(start, start + storage.nbytes(), name))
        self.memories = [spans[start] for start in sorted(spans)]
        self.starts = [m.start for m in self.memories]

    def access(self, write: bool, pointers: Any, mask: Any) -> None:
        addresses, taken = pointers.data, mask.data
        if taken.shape != addresses.shape:
            taken = np.broadcast_to(taken, addresses.shape)
        reached = addresses[taken]
        if not reached.size:
            return
        # up to the kernel's code
        frame = sys._getframe(2)
        while frame.f_code.co_filename.startswith(TRITON):
            frame = frame.f_back
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        access = Access(
            write,
            self.program,
            self.phase,
            addresses,
            taken,
            size,
            frame.f_code,
            frame.f_lineno,
        )
        at = bisect_right(self.starts, int(reached.min())) - 1
        if at < 0 or int(reached.max()) + size > self.memories[at].end:
            raise Race(f"{self.kernel}: {access}, is in no tensor that it was given")
        self.memories[at].accesses.append(access)

    def judge(self) -> None:
        for memory in self.memories:
            if any(a.write for a in memory.accesses):
                for kind, a, b in memory.conflicts():
                    raise Race(f"{self.kernel}: {kind}: {a}; {b} (memory of {memory.name})")


current: Launch | None = None


def _recorded(write: bool) -> Any:
    def make(old: Method) -> Method:
        def access(self: Any, pointers: Any, *more: Any) -> Any:
            if current is not None:
                current.access(write, pointers, more[1 if write else 0])
            return old(self, pointers, *more)

        return access

    return make


def _barrier(old: Method) -> Method:
    def create_barrier(self: Any) -> Any:
        if current is not None:
            current.phase += 1
        return old(self)

    return create_barrier


def _program(old: Method) -> Method:
    def set_grid_idx(self: Any, *index: int) -> Any:
        if current is not None:
            current.program, current.phase = current.program + 1, 0
        return old(self, *index)

    return set_grid_idx


def _atomic(old: Method) -> Method:
    def refused(self: Any, *arguments: Any) -> Any:
        raise Race("atomic operations are not followed")

    return refused


def _launch(old: Method) -> Method:
    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        global current
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        before, current = current, Launch(self.fn.__name__, arguments)
        try:
            result = old(self, *args, **kwargs)
            current.judge()
            return result
        finally:
            current = before

    return launch


def install() -> None:
    builder = interpreter.InterpreterBuilder
    # loads and stores by blocks and descriptors arrive here too
    replace(builder, "create_masked_load", "ptrs mask", _recorded(False))
    replace(builder, "create_masked_store", "ptrs value mask", _recorded(True))
    replace(builder, "create_barrier", "", _barrier)
    replace(builder, "set_grid_idx", "x y z", _program)
    replace(builder, "create_atomic_rmw", "rmwOp ptr val mask sem scope", _atomic)
    replace(builder, "create_atomic_cas", "ptr cmp val sem scope", _atomic)
    replace(interpreter.GridExecutor, "__call__", "args_dev kwargs", _launch)
