# SPDX-License-Identifier: Apache-2.0
"""Operators while they are logged.

Every `Op` changes its class to `Recorded` when the log is switched on, and back: a call costs
nothing while it is off, not even a question. `Recorded` overrides what callers go through: the call
itself, `default`, by which implementations run other operators, and `resolve`, so that an `impl`
remembers who asked for it.

Graphs that torch.compile made call the dispatcher past `Op`, and so does
`torch.ops.mikernels.<name>`. Their calls are not logged; that an operator was traced into a graph
is.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from mikernels import _dispatch, _ext
from mikernels._dispatch import Op
from mikernels.calls import lines

if TYPE_CHECKING:
    from mikernels.calls.saved import Saver


class Asked(str):
    """The name of an implementation, and who asked for it."""

    by: str

    def __new__(cls, name: str, by: str) -> Asked:
        asked = super().__new__(cls, name)
        asked.by = by
        return asked


@dataclass
class Recorder:
    """Writes calls to a logger, and to files where there is a saver.

    Args:
        detailed: also results and times, and what operators call of each other.
    """

    logger: logging.Logger
    detailed: bool = False
    saver: Saver | None = None
    _traced: set[str] = field(default_factory=set)
    _local: threading.local = field(default_factory=threading.local)

    def run(
        self, op: Op, args: tuple[Any, ...], name: str, why: str, call: Callable[[], Any]
    ) -> Any:
        depth = getattr(self._local, "depth", 0)
        if depth and not self.detailed:
            return call()
        runs = f"{name} at {_ext.cpu_level()}" if name == "cpp" else name
        if torch._C._current_autograd_node() is not None:
            why = f"{why}; in a backward"
        say = _Lines(self, "  " * depth, {"operator": op.name, "implementation": runs})
        say(f"{lines.call(op.name, op._names, args)} -> {runs} ({why})", reason=why)
        saving = None
        if self.saver is not None and not depth:
            saving = self.saver.before(op, args, name, why)
        wait = _device_of(args) if self.detailed else None
        self._local.depth = depth + 1
        try:
            if wait is not None:
                torch.cuda.synchronize(wait)
            start = time.perf_counter()
            found = call()
            if wait is not None:
                torch.cuda.synchronize(wait)
            seconds = time.perf_counter() - start
        except BaseException as error:
            if saving is not None:
                saving.raised(error)
            first = (str(error).splitlines() or [""])[0]
            say(f"{op.name} raised {type(error).__name__}: {first}")
            raise
        finally:
            self._local.depth = depth
        if self.detailed:
            took = f"{1e6 * seconds:.1f} us" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms"
            say(f"{op.name} gave {lines.results(found)} after {took}", seconds=seconds)
        if saving is not None and saving.returned(found):
            say(f"{op.name} saved to {saving.path}")
        return found

    def traced(self, op: Op) -> None:
        """Once for each operator: a graph is traced several times."""
        if op.name not in self._traced:
            self._traced.add(op.name)
            say = _Lines(self, "", {"operator": op.name})
            say(
                f"{op.name} traced by torch.compile, torch.export or fake tensors: what their "
                f"graph calls is not logged"
            )


@dataclass
class _Lines:
    """The lines of one call, with what they are about as attributes of the log records."""

    recorder: Recorder
    indent: str
    about: dict[str, Any]

    def __call__(self, text: str, **more: Any) -> None:
        thread = threading.current_thread()
        if thread is not threading.main_thread():
            text = f"[{thread.name}] {self.indent}{text}"
        else:
            text = f"{self.indent}{text}"
        level = logging.DEBUG if self.recorder.detailed else logging.INFO
        self.recorder.logger.log(level, "%s", text, extra={**self.about, **more})


def _device_of(args: tuple[Any, ...]) -> torch.device | None:
    """The GPU to wait for: its launches return before they are done."""
    device = next((a.device for a in args if isinstance(a, torch.Tensor)), None)
    if device is None or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return device


# what Recorded operators write to
_recorder = Recorder(logging.getLogger(__name__))


class Recorded(Op):
    """An operator that tells the recorder; it computes what the operator computes."""

    def __call__(self, *args: Any, impl: str | None = None, dense: bool = True) -> Any:
        if torch.compiler.is_compiling():
            return Op.__call__(self, *args, impl=impl, dense=dense)
        plain = _plain(self)
        name, why = _choice(plain, args, impl, dense)
        return _recorder.run(plain, args, name, why, lambda: plain(*args, impl=impl, dense=dense))

    @property
    def default(self) -> Any:  # type: ignore[override]
        """As registered. What runs it from outside is another operator's implementation."""
        registered = self.__dict__["default"]
        if torch.compiler.is_compiling():
            return registered

        def run(*args: Any) -> Any:
            plain = _plain(self)
            return _recorder.run(plain, args, *plain.owner(args), lambda: registered(*args))

        return run

    def resolve(self, impl: str | None, device: torch.device) -> str:
        name = Op.resolve(self, impl, device)
        if torch.compiler.is_compiling() or isinstance(impl, Asked):
            return name
        asked = os.environ.get("MIKERNELS_IMPL")
        return Asked(name, f"impl={name!r}" if impl else f"MIKERNELS_IMPL={asked}")

    def traced(self, *args: Any) -> Any:
        _recorder.traced(self)
        return Op.traced(self, *args)


def _plain(op: Op) -> Op:
    """The same operator, as if nothing were recorded: an Op of the same attributes."""
    twin = object.__new__(Op)
    twin.__dict__ = op.__dict__
    return twin


def _choice(op: Op, args: tuple[Any, ...], impl: str | None, dense: bool) -> tuple[str, str]:
    if not any(isinstance(a, torch.Tensor) for a in args):
        return "nothing", "no tensor is given"
    name, why = op.choice(args, impl, dense)
    if isinstance(impl, Asked) and impl != "auto":
        return name, impl.by
    if impl and impl != "auto" and impl == os.environ.get("MIKERNELS_IMPL"):
        return name, f"impl={name!r} or MIKERNELS_IMPL"  # resolved before the log was on
    return name, why


def switch(recorder: Recorder | None) -> None:
    """Let every operator tell `recorder`; None lets them be. Calls under way end as they began."""
    global _recorder
    if recorder is not None:
        _recorder = recorder
    for op in _dispatch.OPS.values():
        op.__class__ = Op if recorder is None else Recorded
