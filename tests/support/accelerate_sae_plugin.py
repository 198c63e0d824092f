# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of SAELens, dictionary_learning and sparsify accelerated:
`pytest -p accelerate_sae_plugin` (see CONTRIBUTING.md).

While a test and its fixtures run, every SAE, dictionary, SparseCoder, trainer and runner is
accelerated when its constructor has returned. What is made within another's constructor goes with
that one; a trainer of SAEs that are accelerated already is accelerated anew, with them. What
`accelerate` refuses stays as it is. The report ends with how many tests computed with accelerated
objects, what was left and what was looked at, and what was refused, with the reasons.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import mikernels
from mikernels.integrations.accelerate import Report

# package -> the classes of which, or below which, everything is that can be accelerated
BASES = {
    "sae_lens": (
        *("SAE", "SAETrainer", "MultiSAETrainer"),
        *("LanguageModelSAETrainingRunner", "MultiSAETrainingRunner"),
    ),
    "dictionary_learning": ("Dictionary", "SAETrainer"),
    "sparsify": ("SparseCoder", "Trainer"),
}
# suites' SAEs are random, with half of their features active; it is codes that are to be tried
CROWDED_FROM = 1.0

# for each test that was accelerated, how many products were left
LEFT: dict[str, int] = {}
# operation -> how often it was given a dense tensor
DENSE: Counter[str] = Counter()
# class -> how many were accelerated; reason -> how many were refused
DONE: Counter[str] = Counter()
REFUSED: Counter[str] = Counter()
# reason -> the first test of it
FIRST: dict[str, str] = {}
# what was counted of a report so far; objects of a module's fixtures live longer than a test
SEEN: weakref.WeakKeyDictionary[Report, tuple[int, Counter[str]]] = weakref.WeakKeyDictionary()


class _Test:
    """What is made while one test runs."""

    def __init__(self, name: str) -> None:
        self.name = name
        # objects whose constructors run, the outermost first
        self.open: list[Any] = []
        # what was made within them, the innermost first
        self.made: list[Any] = []
        # until they are counted
        self.reports: list[Report] = []
        # `accelerate` itself makes objects of these classes
        self.busy = False

    def construct(self, make: Any, obj: Any, args: Any, kwargs: Any) -> None:
        if self.busy or any(obj is other for other in self.open):
            # by a constructor of a class below
            make(obj, *args, **kwargs)
            return
        self.open.append(obj)
        try:
            make(obj, *args, **kwargs)
            self.made.append(obj)
        finally:
            self.open.pop()
            if not self.open:
                made, self.made = self.made, []
                self.accelerate(made[::-1])

    def accelerate(self, objects: list[Any]) -> None:
        """Objects of one constructor, what holds others before these."""
        tried: list[Any] = []
        for obj in objects:
            if _reports_of(obj) or any(obj is other for other in tried):
                continue
            parts = _parts(obj)
            for report in [report for part in parts for report in _reports_of(part)]:
                with contextlib.suppress(RuntimeError):
                    # unless the test has replaced a method since
                    report.restore()
            if not self._accelerated(obj):
                for part in parts:
                    self._accelerated(part)
                    tried.append(part)

    def _accelerated(self, obj: Any) -> bool:
        kind = type(obj)
        if not hasattr(kind.__init__, "accelerates"):
            # it is not finished yet
            return self._refused("a class that the test itself made, with a constructor of its own")
        self.busy = True
        try:
            report = mikernels.accelerate(obj)
        except (TypeError, ValueError) as error:
            return self._refused(re.sub(r"\b\d+\b", "#", str(error)))
        finally:
            self.busy = False
        report.crowded_from = CROWDED_FROM
        self.reports.append(report)
        SEEN[report] = 0, Counter()
        DONE[kind.__name__] += 1
        return True

    def _refused(self, reason: str) -> bool:
        REFUSED[reason] += 1
        FIRST.setdefault(reason, self.name)
        return False

    def count(self) -> None:
        left = 0
        for report in list(SEEN):
            calls, dense = SEEN[report]
            left += report.calls - calls
            DENSE.update(report.dense - dense)
            SEEN[report] = report.calls, Counter(report.dense)
        if left:
            LEFT[self.name] = left


def _reports_of(obj: Any) -> list[Report]:
    """What has accelerated an object, and is not restored."""
    return [
        report
        for report in SEEN
        if report.plan is not None and any(m.owner is obj for m in report.plan.methods)
    ]


def _parts(obj: Any) -> list[Any]:
    """The SAEs and trainers in an object's attributes, and in dictionaries among these."""
    values = list(vars(obj).values())
    for value in list(values):
        if isinstance(value, dict):
            values += value.values()
    bases = tuple(_bases())
    parts = [value for value in values if isinstance(value, bases) and value is not obj]
    return [*parts, *(below for part in parts for below in _parts(part))]


def _bases() -> list[type]:
    found: dict[type, None] = {}
    for name, module in list(sys.modules.items()):
        package = name.split(".")[0]
        for base in BASES.get(package, ()):
            kind = vars(module).get(base)
            if isinstance(kind, type) and kind.__module__.split(".")[0] == package:
                found[kind] = None
    return list(found)


def _wrap(test: _Test, stack: ExitStack) -> None:
    """Has `test` told of what is constructed, until the stack is left."""
    kinds = _bases()
    for kind in kinds:
        kinds += [below for below in kind.__subclasses__() if below not in kinds]
    for kind in kinds:
        if "__init__" in vars(kind):
            make = kind.__init__
            stack.callback(setattr, kind, "__init__", make)
            kind.__init__ = _told(test, make)


def _told(test: _Test, make: Any) -> Any:
    @functools.wraps(make)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        test.construct(make, self, args, kwargs)

    init.accelerates = True  # type: ignore[attr-defined]
    return init


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    test = _Test(item.nodeid)
    with ExitStack() as stack:
        _wrap(test, stack)
        try:
            return (yield)
        finally:
            test.count()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    def told(counts: Counter[str]) -> str:
        return ", ".join(f"{name} {times}" for name, times in counts.most_common()) or "none"

    write = terminalreporter.write_line
    write(f"accelerated: {len(LEFT)} tests, {sum(LEFT.values())} products left")
    write(f"dense: {sum(DENSE.values())} ({told(DENSE)})")
    write(f"objects: {sum(DONE.values())} ({told(DONE)})")
    write(f"refused: {sum(REFUSED.values())}")
    for reason, times in REFUSED.most_common():
        write(f"  {times} {reason} ({FIRST[reason]})")
