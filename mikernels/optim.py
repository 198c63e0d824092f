# SPDX-License-Identifier: Apache-2.0
"""RowAdam: Adam with gradient projection, clipping and renormalisation in one pass over the rows.

It computes what `remove_parallel_gradient`, `clip_grad_norm_`, `torch.optim.Adam.step` and
`normalize_decoder` compute one after the other, within fp32 rounding, and reads and writes every
number once (see `mikernels.ops.sae.adam`). The state is fp32 for low-precision weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch

from mikernels._dispatch import FLOATS, accumulate_dtype
from mikernels.ops.sae.adam import adam_rows_op, grad_sumsq_op

__all__ = ["RowAdam"]

STATE = ("exp_avg", "exp_avg_sq")
SETTINGS = ("lr", "betas", "eps")


class RowAdam(torch.optim.Optimizer):
    """Adam whose update of a matrix row is fused with the constraint on that row.

    Order of a step: gradients are projected (`project`), the global norm of all of them is clipped
    to `clip_norm`, Adam updates, rows are renormalised (`unit_norm`).

    Args:
        params: tensors or parameter groups. A group may set `project=True` (drop the gradient's
            part along each row; rows must have norm 1) and `unit_norm=True` (give each row norm 1
            after the update) for matrices `[rows, columns]`, and its own lr, betas, eps.
        lr, betas, eps: as in torch.optim.Adam.
        clip_norm: limit on the norm of all gradients together, as
            `torch.nn.utils.clip_grad_norm_`; None is none. It never synchronises a device.
        capturable: keep lr and the step counts in tensors on the parameters' device, so that a step
            captured in a CUDA graph, once it has run, can be replayed. lr may then be a 0-dim
            tensor; `group["lr"].fill_(rate)` changes it for the graph as well, as torch's
            schedulers do, and a number put in its place does not.

    Raises:
        TypeError, ValueError: for settings or parameters other than the above.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        clip_norm: float | None = None,
        capturable: bool = False,
    ):
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"RowAdam: clip_norm must be above 0 or None, got {clip_norm}")
        self.clip_norm = clip_norm
        self.capturable = capturable
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, project=False, unit_norm=False)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        rate = float(group["lr"])
        if not (math.isfinite(rate) and rate >= 0 and group["eps"] >= 0):
            raise ValueError(
                f"RowAdam: lr and eps must be finite and at least 0, got {rate} and {group['eps']}"
            )
        group["lr"] = self._rate(group["lr"], group["params"][0].device)
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"RowAdam: betas must be two numbers in [0, 1), got {group['betas']}")
        for p in group["params"]:
            if p.dtype not in FLOATS:
                raise TypeError(f"RowAdam: parameters must be one of {list(FLOATS)}, got {p.dtype}")
            if not p.is_contiguous():
                raise ValueError(
                    f"RowAdam: parameters must be contiguous, got shape {list(p.shape)} with "
                    f"strides {list(p.stride())}; call .contiguous() before making the parameter"
                )
            if (group["project"] or group["unit_norm"]) and p.dim() != 2:
                raise ValueError(
                    f"RowAdam: project and unit_norm need matrices [rows, columns], got shape "
                    f"{list(p.shape)}; put it in another group"
                )

    def _rate(self, lr: float | torch.Tensor, device: torch.device) -> float | torch.Tensor:
        if not isinstance(lr, torch.Tensor):
            return _scalar(lr, torch.float64, device) if self.capturable else lr
        if not self.capturable:
            raise TypeError(
                "RowAdam: lr must be a number, got a tensor; pass lr.item(), or capturable=True to "
                "keep it on its device"
            )
        if lr.dim() or lr.device != device or lr.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"RowAdam: a tensor lr must be 0-dim float32 or float64 on {device}, got "
                f"{list(lr.shape)} {lr.dtype} on {lr.device}"
            )
        return lr

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update from `.grad`; parameters without one are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.apply_gradients(
            {p: p.grad for g in self.param_groups for p in g["params"] if p.grad is not None}
        )
        return loss

    @torch.no_grad()
    def apply_gradients(self, gradients: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """One update from gradients held outside `.grad`.

        Args:
            gradients: parameter -> gradient of its shape, in its dtype or float32 (autograd cannot
                give a bfloat16 parameter a float32 gradient; the fused training step can).

        Raises:
            TypeError, ValueError: for a gradient that is sparse or of another shape or dtype.
        """
        todo = [
            (group, p, gradients[p])
            for group in self.param_groups
            for p in group["params"]
            if p in gradients
        ]
        for _, p, grad in todo:
            if grad.layout != torch.strided or grad.dtype not in (p.dtype, torch.float32):
                raise TypeError(
                    f"RowAdam: gradients must be dense, of dtype {p.dtype} or float32, got "
                    f"{grad.dtype} ({grad.layout})"
                )
            if grad.shape != p.shape:
                raise ValueError(
                    f"RowAdam: a gradient must have its parameter's shape {list(p.shape)}, got "
                    f"{list(grad.shape)}"
                )
        if not todo:
            return
        self.check_capture([p for _, p, _ in todo])
        clip = self._clip(todo)
        made: dict[Any, torch.Tensor] = {}
        for group, p, grad in todo:
            moments, settings = self.advance(group, p, made)
            adam_rows_op(
                _rows(p),
                _rows(grad),
                *(_rows(m) for m in moments),
                *settings,
                clip,
                group["project"],
                group["unit_norm"],
            )

    def advance(
        self, group: dict[str, Any], p: torch.Tensor, made: dict[Any, torch.Tensor]
    ) -> tuple[list[torch.Tensor], tuple[Any, ...]]:
        """Count a step of p, which the caller applies.

        `made` keeps scalars that parameters share. Returns p's moments, and (lr, beta1, beta2, eps,
        step) as `adam_rows_` takes them.
        """
        state = self.state[p]
        if not state:
            state["step"] = _scalar(0, torch.int64, p.device) if self.capturable else 0
            for name in STATE:
                state[name] = torch.zeros_like(p, dtype=accumulate_dtype(p.dtype))
        held = state[STATE[0]]
        if held.dtype != accumulate_dtype(p.dtype) or held.device != p.device:
            raise ValueError(
                f"RowAdam: a parameter must stay what it was when its state was made, got "
                f"{p.dtype} on {p.device} for moments of {held.dtype} on {held.device}; convert "
                f"them with optimizer.load_state_dict(optimizer.state_dict())"
            )
        state["step"] += 1
        lr = _scalar(group["lr"], torch.float64, p.device, made)
        step = _scalar(state["step"], torch.int64, p.device, made)
        return [state[name] for name in STATE], (lr, *group["betas"], group["eps"], step)

    def check_capture(self, params: list[torch.Tensor]) -> None:
        """Raises RuntimeError while a CUDA graph is recorded that could not be replayed."""
        device = params[0].device
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            return
        if not self.capturable:
            raise RuntimeError(
                "RowAdam: a captured step would repeat its lr and step count; make the optimiser "
                "with capturable=True"
            )
        if not all(self.state[p] for p in params):
            raise RuntimeError(
                "RowAdam: the first step makes the state and cannot be captured; run it before"
            )

    def _clip(self, todo: list[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        if self.clip_norm is None:
            return torch.ones((), dtype=torch.float32, device=todo[0][1].device)
        sums = [grad_sumsq_op(_rows(grad), _rows(p), g["project"]) for g, p, grad in todo]
        norm = torch.stack(sums).sum().sqrt()
        # 1e-6 as in torch.nn.utils.clip_grad_norm_
        return (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which torch would make of the groups and the state alone."""
        whole = super().__getstate__()
        return {**whole, "clip_norm": self.clip_norm, "capturable": self.capturable}

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with lr and steps as numbers: one format, capturable or not.

        torch.optim.Adam takes it, too; the projection, renormalisation and clipping are then the
        caller's.
        """
        whole = super().state_dict()
        for group in whole["param_groups"]:
            group["lr"] = float(group["lr"])
            group["weight_decay"] = 0.0
        whole["state"] = {
            index: {**state, "step": int(state["step"])} for index, state in whole["state"].items()
        }
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but fp32 state stays fp32 for low-precision parameters, and whether the
        saved one was capturable does not matter. A CUDA graph must be captured anew after it.

        A state of torch.optim.Adam or AdamW is taken if RowAdam computes what they do: without
        weight_decay, amsgrad and maximize. The groups' own project and unit_norm then stay.

        Raises:
            TypeError, ValueError: for any other state; nothing has been changed then.
        """
        self.check_state_dict(state_dict)
        rates = [group["lr"] for group in self.param_groups]
        groups = [
            {name: group.get(name, own[name]) for name in (*SETTINGS, "project", "unit_norm")}
            | {"params": group["params"]}
            for group, own in zip(state_dict["param_groups"], self.param_groups, strict=True)
        ]
        super().load_state_dict({"state": state_dict["state"], "param_groups": groups})
        for group, rate in zip(self.param_groups, rates, strict=True):
            lr: float | torch.Tensor = float(group["lr"])
            lr = rate.fill_(lr) if isinstance(rate, torch.Tensor) else lr
            group["lr"] = self._rate(lr, group["params"][0].device)
            group["betas"] = tuple(map(float, group["betas"]))
        saved = [index for group in groups for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, params, strict=True):
            entries = state_dict["state"].get(index)
            if not entries:
                continue
            # torch has cast it to p's dtype, which loses bits
            for name in STATE:
                full = entries[name].to(p.device, accumulate_dtype(p.dtype), copy=True)
                self.state[p][name] = full.contiguous()
            step = int(entries["step"])
            self.state[p]["step"] = (
                _scalar(step, torch.int64, p.device) if self.capturable else step
            )

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """What `load_state_dict` takes; it reads the moments once.

        Raises:
            TypeError, ValueError: naming the entry and what it must be.
        """
        if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
            raise TypeError(
                "RowAdam: state_dict must be a dict of state and param_groups, got "
                f"{sorted(state_dict) if isinstance(state_dict, Mapping) else type(state_dict)}"
            )
        groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group.get("params", ())) for group in groups] != sizes:
            raise ValueError(
                f"RowAdam: state_dict must be of groups with {sizes} parameters, got "
                f"{[len(group.get('params', ())) for group in groups]}; make the optimiser with "
                f"the same groups"
            )
        params: dict[Any, torch.Tensor] = {}
        for number, (group, own) in enumerate(zip(groups, self.param_groups, strict=True)):
            self._check_group(f"param_groups.{number}", group, own)
            params.update(zip(group["params"], own["params"], strict=True))
        if len(params) != sum(sizes) or not params.keys() >= state_dict["state"].keys():
            raise ValueError(
                f"RowAdam: params must name {sum(sizes)} parameters once each, got groups of "
                f"{[group['params'] for group in groups]} and a state of "
                f"{sorted(state_dict['state'])}"
            )
        for index, entries in state_dict["state"].items():
            if entries:
                _check_moments(f"state.{index}", entries, params[index])

    def _check_group(self, name: str, group: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        if missing := [setting for setting in SETTINGS if setting not in group]:
            raise ValueError(
                f"RowAdam: {name} must be a group of Adam with {list(SETTINGS)}, got none of "
                f"{missing}; a state of another optimiser cannot be continued"
            )
        for setting in ("weight_decay", "amsgrad", "maximize"):
            if group.get(setting):
                raise ValueError(
                    f"RowAdam: {name}.{setting} must be 0 or False, got {group[setting]!r}; "
                    f"RowAdam has no such term: continue with torch's optimiser"
                )
        lr, betas, eps = (group[setting] for setting in SETTINGS)
        for setting, value in (("lr", lr), ("eps", eps)):
            if not _is_number(value) or not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"RowAdam: {name}.{setting} must be finite and at least 0, got {value!r}"
                )
        if (
            not isinstance(betas, list | tuple)
            or len(betas) != 2
            or not all(_is_number(beta) and 0 <= beta < 1 for beta in betas)
        ):
            raise ValueError(f"RowAdam: {name}.betas must be two numbers in [0, 1), got {betas!r}")
        for setting in ("project", "unit_norm"):
            value = group.get(setting, own[setting])
            if not isinstance(value, bool):
                raise TypeError(f"RowAdam: {name}.{setting} must be a bool, got {value!r}")
            if value and any(p.dim() != 2 for p in own["params"]):
                raise ValueError(f"RowAdam: {name}.{setting} needs matrices [rows, columns]")


def _is_number(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and value.dtype != torch.bool
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_moments(name: str, entries: Mapping[str, Any], p: torch.Tensor) -> None:
    if set(entries) != {"step", *STATE}:
        raise ValueError(
            f"RowAdam: {name} must have step, {', '.join(STATE)}, got {sorted(entries)}; a state "
            f"of another optimiser, or of amsgrad, cannot be continued"
        )
    step = entries["step"]
    if not _is_number(step) or not (0 <= step < 2**53 and step == int(step)):
        raise ValueError(f"RowAdam: {name}.step must be a whole number of at least 0, got {step!r}")
    for moment in STATE:
        value = entries[moment]
        if not isinstance(value, torch.Tensor) or value.shape != p.shape:
            got = list(value.shape) if isinstance(value, torch.Tensor) else repr(value)
            raise ValueError(
                f"RowAdam: {name}.{moment} must be a tensor of shape {list(p.shape)}, got {got}"
            )
        if value.layout != torch.strided or not value.is_floating_point():
            raise TypeError(
                f"RowAdam: {name}.{moment} must be dense and floating, got {value.dtype} "
                f"({value.layout})"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"RowAdam: {name}.{moment} must be finite, got NaN or inf")
    if bool((entries["exp_avg_sq"] < 0).any()):
        raise ValueError(f"RowAdam: {name}.exp_avg_sq must be at least 0, got negative numbers")


def _scalar(
    value: float | torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    made: dict[Any, torch.Tensor] | None = None,
) -> torch.Tensor:
    """A 0-dim tensor, filled on the device: nothing is copied from the host. Kept in `made`."""
    if isinstance(value, torch.Tensor):
        return value
    if made is None:
        return torch.full((), value, dtype=dtype, device=device)
    if (value, dtype, device) not in made:
        made[value, dtype, device] = _scalar(value, dtype, device)
    return made[value, dtype, device]


# numbers of a row of a long vector: one row would be one thread's
ROW, LONG = 1024, 1 << 20


def _rows(t: torch.Tensor) -> torch.Tensor:
    """A matrix view: biases are one row, further dimensions are columns.

    A long vector (a cross-layer transcoder's decoders) is as many rows as divide it.
    """
    if t.dim() >= 2:
        return t.reshape(t.shape[0], -1)
    return t.reshape(math.gcd(t.numel(), ROW) if t.numel() >= LONG else 1, -1)
