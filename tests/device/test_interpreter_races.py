# SPDX-License-Identifier: Apache-2.0
"""The recorder of tests/support/interpreter_races.py: it sees a race of each kind, and that a
barrier is missing for each in kernels/."""

import functools
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from interpreter_races import Race
from oracle import randn
from triton.runtime.interpreter import InterpreterBuilder

from mikernels import _triton, kernels, topk_encode
from mikernels.kernels.sae import adam, encode, encode_screen, encode_winners
from mikernels.kernels.select import row_topk

pytestmark = pytest.mark.skipif(not _triton.interpreting(), reason="needs TRITON_INTERPRET=1")


@triton.jit
def _racing_kernel(x, y, KIND: tl.constexpr, BARRIER: tl.constexpr, N: tl.constexpr):
    program = tl.program_id(0)
    at = program * N + tl.arange(0, N)
    back = program * N + N - 1 - tl.arange(0, N)
    if KIND == "tiles overlap":
        tl.store(y + at - program, tl.load(x + at))
    elif KIND == "another's tile is read":
        tl.store(y + at, tl.load(x + at))
        tl.load(y + back - program * N)
    elif KIND == "read first":
        tl.load(y + back - program * N)
        tl.store(y + at, tl.load(x + at))
    elif KIND == "one store":
        tl.store(y + at // 2 + program * N // 2, tl.load(x + at))
    elif KIND == "two stores":
        tl.store(y + at, tl.load(x + at))
        if BARRIER:
            tl.debug_barrier()
        tl.store(y + at, tl.load(x + back))
    elif KIND == "read after write":
        tl.store(y + at, tl.load(x + at))
        if BARRIER:
            tl.debug_barrier()
        tl.store(x + at, tl.load(y + back))
    elif KIND == "write after read":
        a = tl.load(y + at)
        if BARRIER:
            tl.debug_barrier()
        tl.store(y + back, a)
    elif KIND == "in place":
        tl.store(y + at, tl.load(y + at) + 1)
    elif KIND == "nothing":
        tl.store(y + at, tl.load(x + at), at < 0)
        tl.load(y + at - program * N, at < 0)
    elif KIND == "before":
        tl.load(x + at - 1)
    elif KIND == "behind":
        tl.store(y + at + 1, 0)
    elif KIND == "atomic":
        tl.atomic_add(y + at, 1.0)


def run(kind: str, barrier: bool = False, dtype: torch.dtype = torch.float32) -> None:
    x, y = torch.ones(32).to(dtype), torch.ones(32).to(dtype)
    _racing_kernel[(2,)](x, y, KIND=kind, BARRIER=barrier, N=16)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("tiles overlap", "two programs write: write by program 0 .*; write by program 1"),
        ("another's tile is read", "another program writes: read by program 1 .* program 0"),
        ("read first", "another program writes: read by program 1 .* program 0"),
        ("one store", "one store writes twice"),
        ("two stores", "no barrier is between: write .*; write"),
        ("read after write", "no barrier is between: read .*; write .*memory of y"),
        ("write after read", "no barrier is between: read .*; write"),
    ],
)
@pytest.mark.parametrize("of", [torch.float32, torch.int8, torch.float64])
def test_a_race_of_each_kind_is_seen(kind, message, of) -> None:
    with pytest.raises(Race, match=f"_racing_kernel: {message}"):
        run(kind, dtype=of)


def test_what_is_no_race_passes() -> None:
    for kind in ("two stores", "read after write", "write after read"):
        run(kind, barrier=True)
    run("in place")
    run("nothing")


@pytest.mark.parametrize(
    "kind, message", [("before", "in no tensor"), ("behind", "in no tensor"), ("atomic", "atomic")]
)
def test_what_cannot_be_judged_raises(kind, message) -> None:
    with pytest.raises(Exception, match=f"Race.*{message}"):
        run(kind)


def adam_of_a_wide_row(monkeypatch) -> None:
    p, g, m, v = (randn(1, 4097, seed=seed) for seed in range(4))
    hyper = torch.tensor(1e-3), 0.9, 0.999, 1e-8, torch.tensor(1), torch.tensor(0.5)
    adam.adam_rows_(p, g, m, v.abs(), *hyper, True, True)


def row_topk_by_groups(monkeypatch) -> None:
    row_topk.row_topk(randn(2, 2048), 3, False)


def winners(width: int, c: int):
    """Two panels: the first fills the lists, the second is merged with what they hold."""

    def run(monkeypatch) -> None:
        shape = encode_winners.shape_of(width, c)
        best = encode_winners.Winners(2, c, torch.float16, torch.device("cpu"))
        best.begin()
        maxima = torch.empty(2, shape.groups, dtype=torch.int32)
        for base in (0, width):
            best.add(randn(2, width, seed=base).half(), 0, base, maxima)

    return run


def encode_of_near_ties(features: int):
    """Scores that differ by less than their bounds tell: all candidates are scored, and where not
    all features are candidates, all features of both tokens. One program does that, and cuts its
    list of either token in between and at the end."""

    def run(monkeypatch) -> None:
        monkeypatch.setattr(encode, "EXACT_PROGRAMS", 1)
        monkeypatch.setattr(encode, "COPIERS", 1)
        for module in (encode, encode_screen):
            monkeypatch.setattr(module, "SURVEYORS", tl.constexpr(1))
        monkeypatch.setitem(encode.PACK, "ROWS", 128)
        monkeypatch.setitem(encode.EXACT, "SLOTS", 32)
        monkeypatch.setitem(encode.EXACT, "SEGMENT", 64)
        b_enc = 1e-6 * (torch.arange(features) ^ 63)
        topk_encode(torch.ones(2, 4), torch.ones(features, 4), b_enc, k=9, impl="triton")

    return run


# of each file, launches that reach its barriers
RUNS = {
    "sae/adam.py": [adam_of_a_wide_row],
    "sae/encode_exact.py": [encode_of_near_ties(200)],
    "sae/encode_settle.py": [encode_of_near_ties(20)],
    "sae/encode_winners.py": [winners(64, 10), winners(256, 5)],
    "select/row_topk.py": [row_topk_by_groups],
}
ROOM = Path(kernels.__file__).parent
BARRIERS = [
    (str(path.relative_to(ROOM)), number)
    for path in sorted(ROOM.rglob("*.py"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if line.strip().startswith("tl.debug_barrier()")
]


@functools.cache
def barriers_of(run, without: tuple[str, int] | None = None) -> set[tuple[str, int]]:
    """What a run comes to, with one of them left out."""
    old, passed = InterpreterBuilder.create_barrier, set()

    def create_barrier(self):
        frame = sys._getframe(1)
        while ROOM not in Path(frame.f_code.co_filename).parents:
            frame = frame.f_back
        at = str(Path(frame.f_code.co_filename).relative_to(ROOM)), frame.f_lineno
        passed.add(at)
        return None if at == without else old(self)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(InterpreterBuilder, "create_barrier", create_barrier)
        run(patches)
    return passed


@pytest.mark.parametrize("file, line", BARRIERS)
def test_each_barrier_of_the_kernels_is_missed(file, line) -> None:
    """By every launch that comes to it."""
    runs = [run for run in RUNS[file] if (file, line) in barriers_of(run)]
    assert runs
    for run in runs:
        with pytest.raises(Race, match="no barrier is between"):
            barriers_of(run, without=(file, line))


def test_tiles_of_the_kernels_that_overlap_are_seen(monkeypatch) -> None:
    old = InterpreterBuilder.create_get_program_id

    def create_get_program_id(self, axis):
        number = old(self, axis)
        number.data //= 2
        return number

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", create_get_program_id)
    with pytest.raises(Race, match="two programs write"):
        row_topk_by_groups(monkeypatch)
