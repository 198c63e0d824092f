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

from mikernels._built import build_facts

LEVELS = ("portable", "avx2", "avxvnni", "avx512", "amx")


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("mikernels._C"), ""
    except ImportError as error:
        reason = build_facts().get("reason") or str(error)
        return None, f"{reason}; mend it with `MIKERNELS_EXT=cpu pip install --force-reinstall .`"


def cuda_missing() -> str:
    """Why the extension has no CUDA kernels, as far as the build recorded it."""
    return MISSING or build_facts().get("cuda", {}).get("reason") or "built without CUDA"


@functools.cache
def _runs_on(index: int) -> str:
    if torch.ops.mikernels.cuda_runs(index):
        return ""
    built = " ".join(build_facts().get("cuda", {}).get("archs", ["other devices"]))
    return (
        f"has no code for cuda:{index}, it was built for {built}; mend it with "
        f"`MIKERNELS_ARCHS=<its compute capability> pip install --force-reinstall .`"
    )


def cuda_unsupported(device: torch.device) -> str:
    """Why CUDA kernels that were built cannot run on this device, as a predicate; "" if they can.

    The runtime is asked once a device, of the architectures that were built.
    """
    if device.type != "cuda":
        return f"runs on cuda tensors, got {device}"
    return _runs_on(torch.cuda.current_device() if device.index is None else device.index)


# the operators live in the extension's static initialisers, so importing it registers them
C, MISSING = _load()


def cpu_level() -> str | None:
    """The instruction-set level in use, one of LEVELS; None without extension."""
    return C.level() if C is not None else None


def supported_levels() -> tuple[str, ...]:
    """The levels that this processor can run, slowest first."""
    return tuple(C.supported_levels()) if C is not None else ()


@contextmanager
def force_level(level: str) -> Iterator[None]:
    """Run the CPU kernels at one level (process-wide), for tests and benchmarks.

    Raises ValueError for a level that this processor, or this build, does not have.
    """
    if C is None:
        raise ValueError(f"force_level: no compiled extension ({MISSING})")
    if level not in C.supported_levels():
        raise ValueError(
            f"force_level: expected one of {list(C.supported_levels())}, got {level!r}"
        )
    before = C.level()
    C.set_level(level)
    try:
        yield
    finally:
        C.set_level(before)
