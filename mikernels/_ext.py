# SPDX-License-Identifier: Apache-2.0
"""The compiled extension: loaded once, its absence remembered with the reason and the remedy."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

# before the extension, which links to the libraries that torch loads
import torch

from mikernels._built import REINSTALL, REMEDY
from mikernels._built import build_facts as build_facts
from mikernels._ops import ops

# csrc/cpu/simd/levels.h, in its order
LEVELS = ("portable", "avx2", "avxvnni", "avx512", "amx")


def _load() -> tuple[ModuleType | None, str]:
    # the operators live in the extension's static initialisers, so importing it registers them
    try:
        extension = importlib.import_module("._C", __package__)
    except ImportError as error:
        return None, f"{build_facts().get('reason') or error}; mend it with `{REMEDY}`"
    if not hasattr(ops, "cpu_level"):
        return None, f"{extension.__file__} is of another build; mend it with `{REMEDY}`"
    return extension, ""


def cuda_missing() -> str:
    """Why the extension has no CUDA kernels, as far as the build recorded it."""
    return MISSING or build_facts().get("cuda", {}).get("reason") or "built without CUDA"


@functools.cache
def _runs_on(index: int) -> str:
    if ops.cuda_runs(index):
        return ""
    built = " ".join(build_facts().get("cuda", {}).get("archs", ["other devices"]))
    return (
        f"has no code for cuda:{index}, it was built for {built}; mend it with "
        f"`MIKERNELS_ARCHS=<its compute capability> {REINSTALL}`"
    )


def cuda_unsupported(device: torch.device) -> str:
    """Why CUDA kernels that were built cannot run on this device, as a predicate; "" if they can.

    The runtime is asked once a device, of the architectures that were built.
    """
    if device.type != "cuda":
        return f"runs on cuda tensors, got {device}"
    return _runs_on(torch.cuda.current_device() if device.index is None else device.index)


C, MISSING = _load()


def cpu_level() -> str | None:
    """The instruction-set level in use, one of LEVELS; None without extension."""
    return LEVELS[ops.cpu_level()] if C is not None else None


def supported_levels() -> tuple[str, ...]:
    """The levels that this processor can run, slowest first."""
    if C is None:
        return ()
    return tuple(name for level, name in enumerate(LEVELS) if ops.cpu_supports(level))


@contextmanager
def force_level(level: str) -> Iterator[None]:
    """Run the CPU kernels at one level (process-wide), for tests and benchmarks.

    Raises ValueError for a level that this processor, or this build, does not have.
    """
    if C is None:
        raise ValueError(f"force_level: no compiled extension ({MISSING})")
    if level not in supported_levels():
        raise ValueError(f"force_level: expected one of {list(supported_levels())}, got {level!r}")
    before = ops.cpu_level()
    ops.set_cpu_level(LEVELS.index(level))
    try:
        yield
    finally:
        ops.set_cpu_level(before)


def measure_peaks(all_threads: bool = True) -> dict[str, float] | None:
    """Peak rates of this processor, measured now (some seconds), 0 for what it does not have.

    None without extension.
    """
    if C is None:
        return None
    names = (value.name for value in ops.measure_peaks.default._schema.returns)
    return dict(zip(names, ops.measure_peaks(all_threads), strict=True))
