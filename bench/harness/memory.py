# SPDX-License-Identifier: Apache-2.0
"""Peak extra memory of one provider: peak resident set during a call, above the inputs.

Each provider is measured in a process of its own, forked from a server that has imported torch but
has run nothing (so no thread pool, allocator cache or retained scratch is inherited). The child

1. runs the provider once at the smoke shape: code, thread stacks and library pools are then in;
2. makes the inputs, gives freed pages back (malloc_trim) and reads VmRSS: the base;
3. builds the provider and calls it once (weights that it copies and optimiser state are allocated);
4. resets the peak (/proc/self/clear_refs), calls it again and reads VmHWM.

Extra = VmHWM - base: temporaries, outputs, and everything that the provider keeps between calls.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from typing import Any

import torch

from mikernels import force_level
from mikernels._ext import LEVELS
from mikernels.machine import CLEAR_REFS, reset_peak, resident_bytes

from .. import load
from .spec import FAMILIES, Runner

LIMIT_SECONDS = 300


def peak_extra(op: str, shape: str, mode: str, provider: str, threads: int) -> dict[str, Any]:
    """{"bytes": int} or {"reason": str} for a registered provider ("ours:avx2" forces a level)."""
    if not CLEAR_REFS.exists():
        return {"reason": "needs Linux's /proc"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "mikernels.bench.harness.harness"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, op, shape, mode, provider, threads))
    process.start()
    theirs.close()
    answer: dict[str, Any] = {"reason": f"no answer within {LIMIT_SECONDS} s"}
    if ours.poll(LIMIT_SECONDS):
        try:
            answer = ours.recv()
        except EOFError:
            answer = {"reason": "the measuring process died (out of memory?)"}
    if "reason" in answer:
        process.kill()
    process.join()
    return answer


def _child(pipe: Connection, op: str, shape: str, mode: str, name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        benchmark = load(op)
        shapes = FAMILIES[benchmark.family]
        provider = benchmark.provider(name)
        _, _, level = name.partition(":")
        with force_level(level) if level in LEVELS else nullcontext():
            small = benchmark.inputs(shapes["smoke"], mode, 0)
            _call(provider.build(small, mode))
            inputs = benchmark.inputs(shapes[shape], mode, 0)
            pipe.send({"bytes": extra_here(lambda: provider.build(inputs, mode))})
    except Exception as error:
        # crosses a process boundary: the reason is shown in the report's memory column
        pipe.send({"reason": f"{type(error).__name__}: {error}"})


def extra_here(build: Callable[[], Runner]) -> int:
    """Steps 2 to 4 in this process, inputs in place: bytes above them at the peak of a call."""
    _trim()
    base = resident_bytes("VmRSS")
    runner = build()
    _call(runner)
    if runner.before is not None:
        runner.before()
    _trim()
    cleared = reset_peak()
    runner.run()
    peak = resident_bytes("VmHWM")
    if not cleared or base is None or peak is None:
        raise OSError("the kernel does not let a process reset its peak")
    return max(0, peak - base)


def _call(runner: Runner) -> None:
    if runner.before is not None:
        runner.before()
    runner.run()


def _trim() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
