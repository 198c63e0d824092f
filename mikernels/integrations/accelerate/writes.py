# SPDX-License-Identifier: Apache-2.0
"""Methods of the libraries that write to parameters' data, of which no version says anything.

Activations from before that nobody has looked at read copies of the parameters from then on.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from mikernels.integrations.accelerate.report import Report

NAMES = ("fold_", "scale_biases", "normalize_decoder")


def keep_before_writes(report: Report, module: torch.nn.Module) -> None:
    kind = type(module)
    for name in dir(kind):
        function = inspect.getattr_static(kind, name)
        if name.startswith(NAMES) and inspect.isfunction(function) and name not in vars(module):
            report.replace(module, name, MethodType(_keeping(function, report), module))


def _keeping(function: Callable[..., Any], report: Report) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        report.keep()
        return function(*args, **kwargs)

    return run
