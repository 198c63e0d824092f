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
from torch.optim.adam import adam

from mikernels.integrations.accelerate.layout import lies_by_feature
from mikernels.integrations.accelerate.report import Report
from mikernels.ops.sae.adam import adam_rows_op

# a fused one is told of a GradScaler's factor
OFF = ("weight_decay", "amsgrad", "maximize", "differentiable", "capturable", "fused")
MOMENTS = ("exp_avg", "exp_avg_sq")


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
        if why := _set(group):
            return why
        if odd := [p.dtype for p in group["params"] if p.dtype is not torch.float32]:
            return f"it has parameters of {odd[0]}, whose moments torch keeps in that dtype"
    return ""


def _set(group: dict[str, Any]) -> str:
    """What a group asks for that the pass over rows does not do."""
    if on := [name for name in OFF if group.get(name)]:
        return f"{', '.join(on)} is set"
    return "its lr is a tensor" if isinstance(group["lr"], torch.Tensor) else ""


def _rows(t: torch.Tensor, by_feature: bool) -> torch.Tensor:
    if t.dim() < 2:
        return t.reshape(1, -1)
    return t.T if by_feature else t.reshape(t.shape[0], -1)


def _step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
    if any(_set(group) for group in self.param_groups):
        # by somebody, since
        return torch.optim.Adam.step(self, closure)
    return _rows_step(self, closure)


@torch.optim.Optimizer.profile_hook_step
@torch.no_grad()
def _rows_step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
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
                for name in MOMENTS:
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            for name in MOMENTS:
                # loaded from a checkpoint of another layout
                if state[name].stride() != p.stride():
                    state[name] = torch.empty_like(p, dtype=state[name].dtype).copy_(state[name])
            tensors = [p, p.grad, *(state[name] for name in MOMENTS)]
            by_feature = p.dim() == 2 and not p.is_contiguous() and lies_by_feature(p)
            # a library may replace `p.data` by a tensor of another dtype
            if any(t.dtype is not torch.float32 for t in tensors) or not (
                by_feature or p.is_contiguous()
            ):
                _torchs(tensors, state["step"], group)
                continue
            state["step"] += 1
            adam_rows_op(
                *(_rows(t, by_feature) for t in tensors),
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


def _torchs(tensors: list[torch.Tensor], step: torch.Tensor, group: dict[str, Any]) -> None:
    """torch's own update of one parameter."""
    p, grad, exp_avg, exp_avg_sq = tensors
    adam(
        [p],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        foreach=False,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=0.0,
        eps=group["eps"],
        maximize=False,
    )


_step.__name__ = "step"
# what a scheduler asks before it warns of a step that it did not wrap
_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
