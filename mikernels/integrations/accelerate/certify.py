# SPDX-License-Identifier: Apache-2.0
"""Whether the installed version of a library is one whose code comes out the same.

Not its number is asked but its arithmetic: a small object of the given one's class is trained for a
step as it is, a copy of it accelerated, and losses, gradients, outputs and statistics must agree to
fp32 rounding without one dense tensor made. 4 to 11 ms for SAELens' classes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from mikernels.integrations.accelerate.plan import Plan
from mikernels.integrations.lazy import Ledger

# of the largest number; fp32 sums of a few dozen terms differ by 1e-6
TOLERANCE = 1e-4


def certify(plan: Plan, replan: Callable[[Any], Plan]) -> None:
    """Raises ValueError where the accelerated step is another one, or makes a dense tensor."""
    for part in plan.others:
        certify(part, replan)
    if plan.twin is None:
        return
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        twin, step = plan.twin()
        other = copy.deepcopy(twin)
        ledger = Ledger("accelerate")
        # at random weights half of the features may be active
        ledger.crowded_from = 1.0
        for method in replan(other).methods:
            setattr(method.owner, method.name, MethodType(method.make(ledger), method.owner))
        with torch.autocast("cpu", enabled=False):
            expected = _tried(step, twin, "as it is", plan)
            got = _tried(step, other, "accelerated", plan)
    name = type(twin).__name__
    if not ledger.calls:
        raise ValueError(
            f"accelerate: {plan.library}: a step of {name} formed no product of activations with "
            f"its encoder where one is expected; this version is not known"
        )
    if ledger.dense:
        raise ValueError(
            f"accelerate: {plan.library}: {', '.join(ledger.dense)} of {name} would make the dense "
            f"tokens x features tensor; this version, or this setting, is not known"
        )
    for key, wanted in expected.items():
        bound = TOLERANCE * max(1e-3, float(wanted.abs().max())) if wanted.numel() else 0.0
        found = got.get(key)
        if found is None or found.shape != wanted.shape:
            raise ValueError(f"accelerate: {plan.library}: {name} gave no {key}")
        off = float((found.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
        if not off <= bound:
            raise ValueError(
                f"accelerate: {plan.library}: {key} of {name} would be off by {off:.1e} (of at "
                f"most {bound:.1e}); this version, or this setting, is not known"
            )


def _tried(step: Callable[[Any], Any], twin: Any, how: str, plan: Plan) -> Any:
    torch.manual_seed(1)
    try:
        return step(twin)
    except Exception as error:
        raise ValueError(
            f"accelerate: {plan.library}: a small {type(twin).__name__} of these settings, {how}, "
            f"fails in its first step with {type(error).__name__}; this version, or this setting, "
            f"is not known"
        ) from error
