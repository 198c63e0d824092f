# SPDX-License-Identifier: Apache-2.0
"""`accelerate` itself: which library, what is planned, whether it holds, and then the change."""

from __future__ import annotations

import importlib
from types import MethodType
from typing import Any

from mikernels.integrations.accelerate.adam import take_over
from mikernels.integrations.accelerate.certify import certify
from mikernels.integrations.accelerate.layout import lay_by_feature
from mikernels.integrations.accelerate.plan import Page, Plan
from mikernels.integrations.accelerate.report import Report
from mikernels.integrations.accelerate.writes import keep_before_writes

# package -> the module of this folder that knows it
PAGES = {
    "sae_lens": "saelens",
    "dictionary_learning": "dictionary_learning",
    "sparsify": "sparsify",
}


def _page(obj: Any) -> Page:
    for kind in type(obj).__mro__:
        package = kind.__module__.split(".")[0]
        if package in PAGES:
            name = f"mikernels.integrations.accelerate.{PAGES[package]}"
            page: Any = importlib.import_module(name)
            return page
    kind = type(obj)
    raise TypeError(
        f"accelerate: expected an SAE, trainer or runner of {', '.join(PAGES)}, got "
        f"{kind.__module__}.{kind.__qualname__}"
    )


def plan_of(obj: Any, *, correct: bool = False) -> Plan:
    """What would be replaced, tried on a small object of the same class.

    Raises:
        TypeError, ValueError: as `accelerate`.
    """
    page = _page(obj)
    found = page.plan(obj, correct=correct)
    # what is meant to be another gradient is not compared; all else of it is that of this
    certify(found, lambda twin: page.plan(twin, correct=False))
    return found


def check(obj: Any) -> str:
    """What `accelerate(obj)` would do, in words; obj stays as it is.

    Raises:
        TypeError, ValueError: as `accelerate`.
    """
    found = plan_of(obj)
    names = ", ".join(f"{type(m.owner).__name__}.{m.name}" for m in found.methods)
    return f"{found.library}: {names} would be accelerated"


def accelerate(obj: Any, *, correct: bool = False, optimizer: bool = False) -> Report:
    """Make an SAE, trainer or runner of another library faster, with the results that it has.

    Its own code runs on, with the same parameters, state dict, losses, statistics and checkpoints;
    the tokens x features matrices in it are computed only when somebody looks: a hook, a metric,
    your own code. Selections are exact in fp32; sums differ by rounding.

        trainer = SAETrainer(...)
        mikernels.accelerate(trainer)
        trainer.fit()

        with mikernels.accelerate(sae) as report:
            ...
        print(report)

    Args:
        obj: of SAELens a training SAE, an inference SAE, a transcoder, an SAETrainer or a runner;
            of dictionary_learning a trainer or a dictionary; of sparsify a SparseCoder or trainer.
            It is changed in place; no class and no module is.
        correct: use the right gradient where the library's is known to be wrong. sparsify's encoder
            drops the gradient of AuxK and multi-top-k, and passes one through activations of 0.
        optimizer: also run the trainer's Adam in one pass over rows (`mikernels.optim.RowAdam`),
            on its own state; equal to rounding.

    Returns:
        The report: `calls`, `dense`, `codes(x)`, `restore()`; a context manager.

    Raises:
        TypeError: obj is of no class that is known.
        ValueError: a subclass overrides what would be replaced, a setting is not supported, it is
            accelerated already, or this version of the library comes out otherwise. obj is
            untouched.
    """
    found = plan_of(obj, correct=correct)
    report = Report(found.library)
    for method in found.methods:
        function = method.make(report)
        report.replace(method.owner, method.name, MethodType(function, method.owner))
        report.methods.append(f"{type(method.owner).__name__}.{method.name}")
    for module in dict.fromkeys(found.autoencoders):
        keep_before_writes(report, module)
    modules = list(dict.fromkeys(module for module, *_ in found.by_feature))
    for module in modules:
        names = {name: axis for owner, name, axis in found.by_feature if owner is module}
        lay_by_feature(report, module, names, found.optimizers)
    report.kept.update(found.kept)
    if optimizer:
        take_over(report, found.optimizers)
    report.plan = found
    report.on_remove(lambda: setattr(report, "plan", None))
    return report
