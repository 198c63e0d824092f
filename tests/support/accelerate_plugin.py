# SPDX-License-Identifier: Apache-2.0
"""Runs another library's tests accelerated: `pytest -p accelerate_plugin` (see CONTRIBUTING.md).

Around every test, the integrations are switched on for the HookedTransformers among its fixtures
and for those that it makes, and off again. `fast_heads` begins with a model's first call that forms
heads' results, since tests switch those on themselves. The last line of the report says how many
tests computed with replacements, and how often.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from mikernels.integrations.circuit_tracer import fast_scores
from mikernels.integrations.eap_ig import fast_eap
from mikernels.integrations.handle import Handle
from mikernels.integrations.transformer_lens import fast_heads

EAP = ("eap.attribute", "eap.attribute_node")
# for each test that was accelerated, how many products were computed
COUNTS: dict[str, int] = {}


def _models(values: list[Any]) -> list[torch.nn.Module]:
    """Models that can be accelerated among values, or in their tuples, lists and dictionaries."""
    lens = getattr(sys.modules.get("transformer_lens"), "HookedTransformer", ())
    found: list[torch.nn.Module] = []
    for value in values:
        if isinstance(value, lens) or hasattr(type(value), "setup_attribution"):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _models(list(value))
        elif isinstance(value, dict):
            found += _models(list(value.values()))
    return list(dict.fromkeys(found))


def _accelerate(model: torch.nn.Module, handles: list[Handle], stack: ExitStack) -> None:
    def keep(handle: Handle) -> None:
        handles.append(handle)
        stack.callback(handle.remove)

    begun: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def heads(module: torch.nn.Module, args: Any) -> None:
        # also in a copy of the model, which has the hook too
        if module not in begun and module.cfg.use_attn_result:
            begun.add(module)
            if not any("forward" in vars(block.attn) for block in module.blocks):
                keep(fast_heads(module))

    if hasattr(model, "cfg"):
        stack.callback(model.register_forward_pre_hook(heads).remove)
    if hasattr(model, "setup_attribution"):
        keep(fast_scores(model))
    for name in EAP:
        if name in sys.modules:
            keep(fast_eap(sys.modules[name], model))


def _made(handles: list[Handle], stack: ExitStack) -> None:
    """Has the models that are made from now on accelerated, until the stack is left."""
    kind = getattr(sys.modules.get("transformer_lens"), "HookedTransformer", None)
    if kind is None:
        return
    make = kind.__init__

    @functools.wraps(make)
    def init(model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        make(model, *args, **kwargs)
        _accelerate(model, handles, stack)

    kind.__init__ = init
    stack.callback(setattr, kind, "__init__", make)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    handles: list[Handle] = []
    with ExitStack() as stack:
        for model in _models(list(getattr(item, "funcargs", {}).values())):
            _accelerate(model, handles, stack)
        _made(handles, stack)
        try:
            return (yield)
        finally:
            if calls := sum(handle.calls for handle in handles):
                COUNTS[item.nodeid] = calls


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(
        f"accelerated: {len(COUNTS)} tests, {sum(COUNTS.values())} products by mikernels"
    )
