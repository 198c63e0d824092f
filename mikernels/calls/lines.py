# SPDX-License-Identifier: Apache-2.0
"""A call as one line: `encode(x=float32[4096, 768], ..., k=32) on cpu`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def tensor(t: torch.Tensor) -> str:
    """dtype and shape; strides where it is not contiguous, its class where it is not torch's."""
    kind = "" if type(t) in (torch.Tensor, torch.nn.Parameter) else f"{type(t).__name__} "
    text = f"{kind}{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
    if t.layout != torch.strided:
        return f"{text} {str(t.layout).removeprefix('torch.')}"
    return text if t.is_contiguous() else f"{text} strides {list(t.stride())}"


def value(v: Any) -> str:
    if isinstance(v, torch.Tensor):
        return tensor(v)
    if isinstance(v, list | tuple):
        return f"[{', '.join(map(value, v))}]"
    return repr(v)


def call(op: str, names: Sequence[str], args: Sequence[Any]) -> str:
    given = ", ".join(f"{name}={value(arg)}" for name, arg in zip(names, args, strict=False))
    devices = dict.fromkeys(str(a.device) for a in args if isinstance(a, torch.Tensor))
    return f"{op}({given}) on {' and '.join(devices) or 'no device'}"


def results(found: Any) -> str:
    """What a call returned: nothing, if it only writes."""
    if found is None:
        return "nothing"
    return ", ".join(map(value, found if isinstance(found, tuple) else (found,)))
