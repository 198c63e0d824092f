# SPDX-License-Identifier: Apache-2.0
"""How Triton's interpreter is changed for the tests: method by method, and only where it is known.

Its methods are no public interface (Triton 3.6 to 3.9 were read), so a method that is gone or takes
other arguments stops the tests. That it still does what it did, tests/device/test_interpreter_*.py
show.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton

Method = Callable[..., Any]


def replace(owner: type, name: str, parameters: str, make: Callable[[Method], Method]) -> None:
    """owner.name becomes make(owner.name); it has to take `parameters` first, after self."""
    old = getattr(owner, name, None)
    expected = ["self", *parameters.split()]
    found = [] if old is None else list(inspect.signature(old).parameters)
    if found[: len(expected)] != expected:
        raise RuntimeError(
            f"{owner.__name__}.{name} of Triton {triton.__version__}'s interpreter must take "
            f"{expected}, got {found or 'no method'}; adapt tests/support/interpreter_*.py"
        )
    assert old is not None
    setattr(owner, name, make(old))
