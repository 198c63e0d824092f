# SPDX-License-Identifier: Apache-2.0
"""What tests of `accelerate` compare, whichever library it is.

Numbers that 20 steps lead to are compared as a whole, by their root mean square: where a gradient
is rounding alone, Adam's first step is the learning rate in either direction, so that one element
says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from oracle import identical

PLAIN = int | float | str | bool | None


@dataclass(eq=False)
class _Itself:
    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value


def rms(t: torch.Tensor) -> float:
    return float(t.detach().double().square().mean().sqrt()) if t.numel() else 0.0


def assert_as_accurate(
    actual: Mapping[str, torch.Tensor],
    exact: Mapping[str, torch.Tensor],
    eager: Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """The error-ratio rule of each, by the rms; `dtype` is the one that is computed in."""
    assert actual.keys() == exact.keys() == eager.keys()
    wrong = []
    for name, wanted in exact.items():
        wanted = wanted.detach().double()
        errors = [rms(run[name].detach().double() - wanted) for run in (actual, eager)]
        limit = 2 * errors[1] + torch.finfo(dtype).eps * rms(wanted)
        if not errors[0] <= limit:
            wrong.append(f"{name}: {errors[0]:.2e} > {limit:.2e} (the library {errors[1]:.2e})")
    assert not wrong, "; ".join(wrong)


def _described(value: Any) -> Any:
    """What must be the same of an attribute: what it holds, or where that is unknown, itself."""
    if isinstance(value, torch.Tensor):
        laid = [str(value.dtype), value.device.type, value.stride(), value.requires_grad]
        return [
            # gradients and moments may be other tensors of the same numbers
            _Itself(value) if isinstance(value, torch.nn.Parameter) else None,
            laid,
            value.detach().clone(),
            _described(value.grad if value.is_leaf else None),
        ]
    if isinstance(value, Mapping):
        # an optimizer's state is known by its parameters
        return {k if isinstance(k, PLAIN) else id(k): _described(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_described(v) for v in value]
    if isinstance(value, MethodType):
        # made anew by every look
        return [_Itself(value.__func__), _Itself(value.__self__)]
    return value if isinstance(value, PLAIN) else _Itself(value)


def snapshot(*objects: Any) -> list[Any]:
    """All attributes of objects, and of the modules in them, to be compared by `assert_same`."""
    found = []
    for obj in objects:
        parts = obj.modules() if isinstance(obj, torch.nn.Module) else [obj]
        found += [{name: _described(v) for name, v in vars(part).items()} for part in parts]
    return found


def assert_same(before: Any, after: Any, path: str = "") -> None:
    """Two snapshots are equal, tensors bit for bit."""
    assert type(before) is type(after), f"{path}: {before!r} became {after!r}"
    if isinstance(before, torch.Tensor):
        assert identical(before, after), f"{path} has other numbers"
    elif isinstance(before, dict):
        assert list(before) == list(after), f"{path}: {list(before)} became {list(after)}"
        for key in before:
            assert_same(before[key], after[key], f"{path}.{key}")
    elif isinstance(before, list | tuple):
        assert len(before) == len(after), f"{path}: {before!r} became {after!r}"
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    else:
        assert before == after, f"{path}: {before!r} became {after!r}"
