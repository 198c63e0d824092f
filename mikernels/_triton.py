# SPDX-License-Identifier: Apache-2.0
"""Triton as a backend: whether it is there, what it can launch on, and its launchers, loaded late.

Triton is imported at the first launch only: importing it takes longer than all of mikernels.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

REMEDY = "install it with `pip install 'mikernels[triton]'` (Linux)"
# bf16 matrix instructions; AMD devices report the gfx version's first digits, 9.0 and up
OLDEST_CAPABILITY = (8, 0)


def interpreting() -> bool:
    """Whether Triton was told to run kernels in its interpreter, on CPU tensors (for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def missing() -> str:
    """Why no implementation by Triton can run, as a predicate; "" if Triton is installed."""
    return (
        ""
        if importlib.util.find_spec("triton")
        else f"needs Triton, which is not installed; {REMEDY}"
    )


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def unsupported(device: torch.device) -> str:
    """Why kernels cannot run on this device, as a predicate; "" if they can."""
    if missing():
        return missing()
    if device.type == "cpu" and interpreting():
        return ""
    if device.type != "cuda":
        return f"runs on cuda tensors, got {device}"
    index = torch.cuda.current_device() if device.index is None else device.index
    capability = _capability(index)
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        return (
            f"needs compute capability {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} or newer, "
            f"{device} has {capability[0]}.{capability[1]}"
        )
    return ""


def launcher(path: str) -> Callable[..., Any]:
    """The launcher `room.module:function` of mikernels.kernels, imported at the first call."""
    module, _, function = path.partition(":")

    @functools.cache
    def load() -> Callable[..., Any]:
        return getattr(importlib.import_module(f".kernels.{module}", __package__), function)

    return lambda *args: load()(*args)


def first_tensor(args: Sequence[Any]) -> torch.Tensor:
    return next(a for a in args if isinstance(a, torch.Tensor))


def holds_fp64(args: Sequence[Any]) -> bool:
    """fp64 exists for gradcheck, and runs the reference on every GPU; a scalar decides nothing."""
    return any(
        t.dtype == torch.float64 for t in args if isinstance(t, torch.Tensor) and t.dim() > 0
    )


def takes(args: Sequence[Any]) -> bool:
    """Whether `auto` gives these arguments to Triton: a device it supports, and no fp64.

    A rule, not a fallback.
    """
    return not holds_fp64(args) and not unsupported(first_tensor(args).device)
