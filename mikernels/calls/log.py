# SPDX-License-Identifier: Apache-2.0
"""Switching the call log: by `mikernels.log`, or by the levels of `logging`.

The log is on while the level of the logger "mikernels.ops", or else that of "mikernels", is INFO or
lower. The root logger's is not asked: what other libraries are asked to say would make every
operator write lines. `setLevel` of the two tells us, so that nothing asks at each call.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mikernels.calls.saved import Saver

OFF = logging.CRITICAL + 10
LEVELS = {"off": OFF, "info": logging.INFO, "debug": logging.DEBUG, "save": logging.DEBUG}
MAX_CALLS, MAX_BYTES = 100, 4 << 30
_lock = threading.RLock()
_logger, _parent = logging.getLogger("mikernels.ops"), logging.getLogger("mikernels")


class Setting:
    """What the log does from `log` on or, of a `with` statement, until its end."""

    def __init__(self, level: int, saver: Saver | None = None, shown: bool = True):
        self.level, self.saver, self.shown = level, saver, shown

    def __enter__(self) -> Setting:
        with _lock:
            _switch.enter(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _lock:
            _switch.leave(self)


class _Switch:
    """What holds: the setting of the last block that was entered, else the last one without."""

    def __init__(self) -> None:
        self.now = Setting(_logger.level, shown=False)
        # the last is the one that holds; those before it hold again if it becomes a block's. More
        # than one may become one, in any order: 64 threads may be between `log` and its `with`
        self.bases = deque([self.now], maxlen=64)
        self.blocks: list[Setting] = []
        self._on = False
        self._handler: logging.Handler | None = None

    def start(self, setting: Setting) -> None:
        before = self.bases.copy()
        self.bases.append(setting)
        try:
            self.apply()
        except BaseException:
            self.bases = before
            raise

    def enter(self, setting: Setting) -> None:
        if setting in self.bases:
            self.bases.remove(setting)
        self.blocks.append(setting)
        try:
            self.apply()
        except BaseException:
            self.blocks.pop()
            raise

    def leave(self, setting: Setting) -> None:
        # not always the last one: threads enter and leave blocks as they will
        self.blocks.remove(setting)
        self.apply()

    def apply(self) -> None:
        now = self.blocks[-1] if self.blocks else self.bases[-1]
        if now is not self.now:
            former = self.now.saver
            if former is not None:
                former.close()
            try:
                if now.saver is not None:
                    now.saver.open()
            except BaseException:
                if former is not None:
                    former.open()
                raise
            self.now = now
        logging.Logger.setLevel(_logger, now.level)
        self.refresh()

    def refresh(self) -> None:
        """Operators and the handler as the levels say."""
        level = _logger.level or _parent.level or OFF
        if self._handler is not None:
            _logger.removeHandler(self._handler)
            self._handler = None
        on = level <= logging.INFO
        if not on and not self._on:
            return
        # 5 ms of imports that most programs need not
        from mikernels.calls.recorded import Recorder, switch

        self._on = on
        if not on:
            switch(None)
            return
        # who has configured logging sees the lines there; else nobody would
        if self.now.shown and not _logger.hasHandlers():
            self._handler = logging.StreamHandler()
            self._handler.setFormatter(logging.Formatter("mikernels: %(message)s"))
            _logger.addHandler(self._handler)
        switch(Recorder(_logger, level <= logging.DEBUG, self.now.saver))

    def end(self) -> None:
        """Let go of the folder while the interpreter can still do so."""
        if self.now.saver is not None:
            self.now.saver.close()


_switch = _Switch()
atexit.register(_switch.end)


def refresh() -> None:
    """Let the operators that are registered by now do as the levels say."""
    with _lock:
        _switch.refresh()


def _watch() -> None:
    """Hear of levels that are set by `logging`, of loggers that there may have been before us."""

    def of_operators(level: int | str) -> None:
        with _lock:
            logging.Logger.setLevel(_logger, level)
            _switch.start(Setting(_logger.level, shown=False))

    def of_parent(level: int | str) -> None:
        with _lock:
            logging.Logger.setLevel(_parent, level)
            _switch.refresh()

    vars(_logger)["setLevel"] = of_operators
    vars(_parent)["setLevel"] = of_parent


def log(
    level: str | int = "info",
    folder: str | Path | None = None,
    *,
    max_calls: int = MAX_CALLS,
    max_bytes: int = MAX_BYTES,
) -> Setting:
    """Show which operators run, on what, by which implementation and why; "save" keeps inputs.

        mikernels.log("info")       a line for each call, of a backward too
        mikernels.log("debug")      also what it gave, how long it took, and what operators call of
                                    each other; a GPU is waited for
        mikernels.log("save", "calls/")    also a file for each call: `mikernels replay FILE`
        mikernels.log("off")

    In a `with` statement the setting ends with the block. It holds for all threads. Lines go to the
    logger "mikernels.ops" (to standard error if no handler is there), whose level does the same:
    `logging.getLogger("mikernels.ops").setLevel(logging.DEBUG)`. While it is off, which it is from
    the start, calls cost what they cost without it.

    Calls within graphs of torch.compile are not logged: there a line says that an operator was
    traced. Nor are those of `torch.ops.mikernels`.

    Args:
        level: "off", "info", "debug", "save", or a level of `logging`, such as 10.
        folder: of "save". Former calls in it stay.
        max_calls, max_bytes: what is saved at most; a warning says when that is reached, and from
            then on calls are shown only.

    Raises:
        TypeError, ValueError: for another level, a folder without "save" or "save" without one.
        OSError: the folder cannot be written. BlockingIOError: another process saves there.

    Example:
        >>> import torch, mikernels
        >>> with mikernels.log("info"):
        ...     codes = mikernels.topk_encode(torch.randn(2, 4), torch.randn(8, 4), k=2)
    """
    if isinstance(level, bool) or not isinstance(level, str | int):
        raise TypeError(f"log: level must be one of {list(LEVELS)}, got {level!r}")
    if isinstance(level, str) and level not in LEVELS:
        raise ValueError(f"log: level must be one of {list(LEVELS)}, got {level!r}")
    if (level == "save") != (folder is not None):
        raise ValueError(
            f"log: folder must go with level 'save', got level {level!r} and folder {folder!r}"
        )
    if folder is not None and not (folder and isinstance(folder, str | os.PathLike)):
        raise TypeError(f"log: folder must be a path, got {folder!r}; name one, such as 'calls/'")
    for name, most in (("max_calls", max_calls), ("max_bytes", max_bytes)):
        if isinstance(most, bool) or not isinstance(most, int):
            raise TypeError(f"log: {name} must be an int, got {most!r}")
        if most < 1:
            raise ValueError(f"log: {name} must be at least 1, got {most}")
    number = LEVELS[level] if isinstance(level, str) else level
    # 0 is "as the parent says" to logging
    number = OFF if not 0 < number <= logging.INFO else number
    saver = None
    if folder is not None:
        from mikernels.calls.saved import Saver

        saver = Saver(Path(folder), max_calls, max_bytes)
    setting = Setting(number, saver)
    with _lock:
        _switch.start(setting)
    return setting


_watch()
