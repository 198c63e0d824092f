# SPDX-License-Identifier: Apache-2.0
"""A trainer's own torch.optim.Adam with its update in one pass over rows.

The optimiser object, its groups, its state and what its schedulers hold stay; its `step` alone is
replaced, by mikernels/ops/sae/adam.py on the same moments. State dicts and checkpoints stay
torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch

from mikernels.integrations.accelerate.layout import lies_by_feature
from mikernels.integrations.accelerate.report import Report
from mikernels.ops.sae.adam import adam_rows_op

OFF = ("weight_decay", "amsgrad", "maximize", "differentiable", "capturable")


def take_over(report: Report, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Replace the step of Adams that are plain; what is not, and why, goes to `report.kept`."""
    for optimizer in optimizers:
        name = f"{type(optimizer).__name__}.step"
        if why := _refused(optimizer):
            report.kept[name] = why
            continue
        report.replace(optimizer, "step", MethodType(_step, optimizer))
        report.methods.append(name)
    if not optimizers:
        report.kept["the optimiser"] = "none is there yet; accelerate the trainer that has one"


def _refused(optimizer: torch.optim.Optimizer) -> str:
    if type(optimizer) is not torch.optim.Adam:
        return "it is not torch.optim.Adam"
    for group in optimizer.param_groups:
        if on := [name for name in OFF if group.get(name)]:
            return f"{', '.join(on)} is set"
        if isinstance(group["lr"], torch.Tensor):
            return "its lr is a tensor"
        if odd := [p.dtype for p in group["params"] if p.dtype is not torch.float32]:
            return f"it has parameters of {odd[0]}, whose moments torch keeps in that dtype"
    return ""


def _rows(t: torch.Tensor, by_feature: bool) -> torch.Tensor:
    if t.dim() < 2:
        return t.reshape(1, -1)
    return t.T if by_feature else t.reshape(t.shape[0], -1)


@torch.optim.Optimizer.profile_hook_step
@torch.no_grad()
def _step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    # what a learning rate scheduler looks for
    self._opt_called = True
    for group in self.param_groups:
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("Adam does not support sparse gradients; use SparseAdam")
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["step"] += 1
            by_feature = p.dim() == 2 and not p.is_contiguous() and lies_by_feature(p)
            moments = [state["exp_avg"], state["exp_avg_sq"]]
            adam_rows_op(
                *(_rows(t, by_feature) for t in (p, p.grad, *moments)),
                torch.full((), group["lr"], dtype=torch.float64, device=p.device),
                beta1,
                beta2,
                group["eps"],
                state["step"].to(p.device),
                torch.ones((), device=p.device),
                False,
                False,
            )
    return loss


_step.__name__ = "step"
# what a scheduler asks before it warns of a step that it did not wrap
_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
