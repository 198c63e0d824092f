# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM wait for the end of the step, so that what is saved is a whole step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """A context manager; `pending` is the signal that came, if any.

    A second Ctrl-C interrupts at once. Outside the main thread, where Python allows no handlers,
    it does nothing.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.pending is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.pending = number

    def stop(self) -> None:
        """Raise what the pending signal means: KeyboardInterrupt, or exit status 128 + signal."""
        if self.pending == signal.SIGINT:
            raise KeyboardInterrupt
        if self.pending is not None:
            raise SystemExit(128 + self.pending)
