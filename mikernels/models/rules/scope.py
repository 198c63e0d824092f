# SPDX-License-Identifier: Apache-2.0
"""Which rules hold, and for whom.

Rules are hooks on the modules of one model, which do nothing but in the context (of the thread, of
the asyncio task) that entered the `with` block: elsewhere the same model computes as ever. Of
nested blocks the innermost that says something about a place decides, one kind of rule at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from mikernels.models.rules.preset import Rules
from mikernels.models.rules.report import RuleReport

_ACTIVE: ContextVar[tuple[Scope, ...]] = ContextVar("rules", default=())


class Place(Protocol):
    """A module of a model, and the kinds of rules that have an effect there.

    Attributes:
        name: of the module. layer: its block's number, None outside of blocks.
        key: what is the same for the same place in another scope: the module.
        rules: fields of Rules.
    """

    name: str
    layer: int | None
    key: Any
    rules: tuple[str, ...]

    def install(self, scope: Scope) -> Iterable[Callable[[], None]]:
        """Hooks that ask `scope` what holds; what removes them."""
        ...


class Scope:
    """One `with rules(...)` while it is entered."""

    def __init__(self, said: Rules, places: list[Place], report: RuleReport):
        self._said, self.report = said.said(), report
        # of places whose arithmetic is checked when a backward pass ends
        self.claims: list[Any] = []
        self._covered = {(p.key, rule) for p in places for rule in p.rules if rule in self._said}

    def value(self, place: Place, rule: str) -> Any:
        """What this scope says of a place, None when it is not for it to say: not entered in this
        context, an inner scope decides, no gradients, nothing said."""
        if not torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"rules: the model must run as Python modules, got {place.name} being compiled; "
                f"compile outside of the `with` block"
            )
        at = place.key, rule
        for scope in reversed(_ACTIVE.get()):
            if at in scope._covered:
                return self._said[rule] if scope is self else None
        return None

    @contextmanager
    def enter(self) -> Iterator[None]:
        """While it is entered, this scope is the innermost of this context."""
        _ACTIVE.set((*_ACTIVE.get(), self))
        try:
            yield
        finally:
            # not by the token: blocks may end in any order
            _ACTIVE.set(tuple(scope for scope in _ACTIVE.get() if scope is not self))

    def entered(self) -> bool:
        """Whether this scope is entered in this context."""
        return self in _ACTIVE.get()
