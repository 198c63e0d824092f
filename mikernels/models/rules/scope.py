# SPDX-License-Identifier: Apache-2.0
"""Which rules hold, and for whom.

Rules are hooks on the modules of one model, which do nothing but in the context (of the thread, of
the asyncio task) that entered the `with` block: elsewhere the same model computes as ever. Of
nested blocks the innermost that says something about a place decides, one kind of rule at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import update_wrapper
from typing import Any, Protocol

import torch
from torch.utils.checkpoint import CheckpointFunction

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


class Uncopied:
    """A function that no copy of a module takes along: there it would act for another module."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        update_wrapper(self, function)

    @classmethod
    def hook(
        cls, register: Callable[..., Any], see: Callable[..., Any], **options: Any
    ) -> Callable[[], None]:
        """Registers a hook; what removes it."""
        if not options.get("with_kwargs"):
            return register(cls(see), **options).remove  # type: ignore[no-any-return]
        count = 3 if register.__name__ == "register_forward_pre_hook" else 4

        def tolerant(*given: Any) -> Any:
            # torch notes that a hook takes keywords after it is there to be called: a thread that
            # runs the model then calls it without
            return see(*given) if len(given) == count else see(*given[:2], {}, *given[2:])

        return register(cls(tolerant), **options).remove  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            "rules: a model must be copied or pickled outside of the `with` block, got one under "
            "rules; save its state_dict, or copy it before"
        )


def _checkpointed() -> bool:
    """Whether this runs in the first pass of a checkpoint with use_reentrant=True."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


class Scope:
    """One `with rules(...)` while it is entered."""

    def __init__(self, said: Rules, places: list[Place], report: RuleReport):
        self.said, self.report = said.said(), report
        self._ended = False
        # of places whose arithmetic is checked when a backward pass ends
        self.claims: list[Any] = []
        # attention seen to heed its scale
        self.heed: set[str] = set()
        self._covered = {(p.key, rule) for p in places for rule in p.rules if rule in self.said}

    def value(self, place: Place, rule: str) -> Any:
        """What this scope says of a place, None when it is not for it to say: not entered in this
        context, an inner scope decides, no gradients, nothing said."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"rules: the model must run as Python modules, got {place.name} being compiled; "
                f"compile outside of the `with` block"
            )
        at = place.key, rule
        # a copied context (of an asyncio task, of a thread) still names blocks that have ended
        decides = next(
            (s for s in reversed(_ACTIVE.get()) if at in s._covered and not s._ended), None
        )
        if decides is not self:
            if decides is not None and self.entered():
                self.report.overruled(rule, place.name)
            return None
        if torch.is_grad_enabled():
            return self.said[rule]
        if _checkpointed():
            raise RuntimeError(
                f"rules: the model must be run with gradients, got {place.name} in a checkpoint "
                f"that runs it without and again in backward, where rules may have ended; say "
                f"use_reentrant=False"
            )
        return None

    @contextmanager
    def enter(self) -> Iterator[None]:
        """While it is entered, this scope is the innermost of this context."""
        _ACTIVE.set((*_ACTIVE.get(), self))
        try:
            yield
        finally:
            self._ended = True
            # not by the token: blocks may end in any order
            _ACTIVE.set(tuple(scope for scope in _ACTIVE.get() if scope is not self))

    def entered(self) -> bool:
        """Whether this scope is entered in this context."""
        return self in _ACTIVE.get()
