# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter replaces what `triton.language` holds at every call of a helper: 2.7 ms.

A launch needs it once. What a helper's module sees is replaced at its first call in a launch, and
the launch puts all back, as before.
"""

from __future__ import annotations

from typing import Any

from interpreter_patches import Method, replace
from triton import language
from triton.runtime import interpreter

_done: set[int] = set()


def _helper(old: Method) -> Method:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        modules = {
            id(m) for m in self.fn.__globals__.values() if m is language or m is language.core
        }
        if not modules <= _done:
            interpreter._patch_lang(self.fn)
            _done.update(modules)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    return call


def _launch(old: Method) -> Method:
    def launch(self: Any, *args_dev: Any, **kwargs: Any) -> Any:
        _done.clear()
        return old(self, *args_dev, **kwargs)

    return launch


def install() -> None:
    replace(interpreter.GridExecutor, "__call__", "args_dev kwargs", _launch)
    replace(interpreter.InterpretedFunction, "__call__", "args kwargs", _helper)
