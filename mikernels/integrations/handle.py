# SPDX-License-Identifier: Apache-2.0
"""What the integrations give back: the way to undo what they replaced."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any


class Handle:
    """What was replaced in given objects, until `remove()` or the end of the `with` block.

    Attributes:
        replaced: how many attributes of objects.
        calls: how often a replacement has computed something.
    """

    def __init__(self, name: str):
        self.name = name
        self.replaced = 0
        self.calls = 0
        self._values: list[tuple[weakref.ref, str, object]] = []
        self._undo: list[Callable[[], object]] = []

    def replace(self, owner: Any, attribute: str, value: object) -> None:
        """Set an attribute of this one object; it is not kept alive."""
        there = vars(owner)
        had, before = attribute in there, there.get(attribute)
        reference = weakref.ref(owner)

        def undo() -> None:
            if (alive := reference()) is None:
                return
            if had:
                setattr(alive, attribute, before)
            else:
                delattr(alive, attribute)

        setattr(owner, attribute, value)
        self._values.append((reference, attribute, value))
        self._undo.append(undo)
        self.replaced += 1

    def on_remove(self, undo: Callable[[], object]) -> None:
        """Have `undo` called with the rest, the latest first."""
        self._undo.append(undo)

    def remove(self) -> None:
        """Put back what was there. Does nothing the second time.

        Raises:
            RuntimeError: somebody else replaced it since; nothing is changed.
        """
        for owner, attribute, value in self._values:
            alive = owner()
            if alive is not None and vars(alive).get(attribute) is not value:
                raise RuntimeError(
                    f"{self.name}: expected its own {attribute} in the {type(alive).__name__}, got "
                    f"{vars(alive).get(attribute)!r}; remove first what was installed after it"
                )
        self._values.clear()
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()
        if kind is None and not self.calls:
            warnings.warn(
                f"{self.name}: nothing that it replaces was computed in its `with` block; run the "
                f"model inside it",
                RuntimeWarning,
                stacklevel=2,
            )
