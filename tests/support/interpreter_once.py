# SPDX-License-Identifier: Apache-2.0
"""What Triton's interpreter does again and again, done once.

It replaces what `triton.language` holds at every call of a helper, which takes 2.7 ms; a launch
needs it once. What a helper's module sees is replaced at its first call in a launch, and the launch
puts all back, as before. It makes its table of types at every look into it, 9% of a launch's time.
"""

from __future__ import annotations

import functools
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


def _table(old: Method) -> Method:
    known = functools.cache(old)

    def np_dtype(of: Any) -> Any:
        scalar = of.scalar
        # types of pointers have no hash, and need no table
        return old(scalar) if scalar.is_ptr() else known(scalar)

    return np_dtype


def install() -> None:
    interpreter._get_np_dtype = _table(interpreter._get_np_dtype)
    replace(interpreter.GridExecutor, "__call__", "args_dev kwargs", _launch)
    replace(interpreter.InterpretedFunction, "__call__", "args kwargs", _helper)
