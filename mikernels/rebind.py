# SPDX-License-Identifier: Apache-2.0
"""A library's functions with other values of some global names, which nobody else sees."""

from __future__ import annotations

from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any


def rebound(function: Any, **names: object) -> FunctionType:
    """The same code with other values of these global names, which only this copy sees."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def within(wrapper: Any, change: Callable[[Any], Any]) -> Any:
    """A decorated function with `change` applied to the function inside its wrappers.

    Raises:
        ValueError: for a wrapper that does not hold the function that it wraps in its closure.
    """
    inner = getattr(wrapper, "__wrapped__", None)
    if inner is None:
        return change(wrapper)
    cells = wrapper.__closure__ or ()
    held = [i for i, cell in enumerate(cells) if _content(cell) is inner]
    if len(held) != 1:
        raise ValueError(
            f"{wrapper.__qualname__}: expected a wrapper with the function that it wraps in its "
            f"closure, got {wrapper.__code__.co_filename}; remove the decorator"
        )
    changed = within(inner, change)
    copy = FunctionType(
        wrapper.__code__,
        wrapper.__globals__,
        wrapper.__name__,
        wrapper.__defaults__,
        tuple(CellType(changed) if i == held[0] else cell for i, cell in enumerate(cells)),
    )
    copy.__kwdefaults__ = wrapper.__kwdefaults__
    copy.__wrapped__ = changed  # type: ignore[attr-defined]
    return copy


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None
