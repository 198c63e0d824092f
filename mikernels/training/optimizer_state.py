# SPDX-License-Identifier: Apache-2.0
"""An optimiser's state as tensors and JSON, and back; what comes back is checked before use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from mikernels.optim import RowAdam

_KEY = re.compile(r"optimizer\.(0|[1-9][0-9]*)\.(.+)")
# state of the parameter's shape, in torch's optimisers and ours; others (Adafactor's) vary
SHAPED = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg"}
SHAPED |= {"grad_avg", "sum", "acc_delta", "prev", "step_size"}


def pack_optimizer(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimiser's state as tensors and as JSON."""
    whole = optimizer.state_dict()
    tensors, numbers = {}, {}
    for index, entries in whole["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                numbers[f"optimizer.{index}.{name}"] = value
    return tensors, {"state": numbers, "param_groups": whole["param_groups"]}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    numbers: Mapping[str, Any],
    groups: list[dict[str, Any]],
) -> dict[str, Any]:
    """The inverse of `pack_optimizer`: a state_dict that `optimizer` can load and step with.

    Raises:
        ValueError: `<field> must be <expected>, got <got>`.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**numbers, **tensors}.items():
        found = _KEY.fullmatch(key)
        if found is None or int(found[1]) >= len(params):
            raise ValueError(
                f"optimizer.state must name parameters 0 to {len(params) - 1}, got {key!r}"
            )
        _check_entry(key, found[2], value, params[int(found[1])])
        state.setdefault(int(found[1]), {})[found[2]] = value
    whole = {"state": state, "param_groups": groups}
    if isinstance(optimizer, RowAdam):
        optimizer.check_state_dict(whole)
    else:
        _check_groups(groups, optimizer.state_dict()["param_groups"])
    entries: dict[int, dict[int, list[str]]] = {}
    for index, p in enumerate(params):
        if p.requires_grad:
            entries.setdefault(p.dim(), {})[index] = sorted(state.get(index, ()))
    for dim, alike in entries.items():
        # Adafactor keeps rows and columns of a matrix, and has neither for a bias
        if len({tuple(names) for names in alike.values()}) > 1:
            raise ValueError(
                f"optimizer.state must have the same entries for every parameter of {dim} "
                f"dimensions, got {alike}"
            )
    if len({bool(names) for alike in entries.values() for names in alike.values()}) > 1:
        raise ValueError(
            f"optimizer.state must have entries for every parameter or for none, got {entries}"
        )
    return whole


def _check_entry(key: str, name: str, value: Any, p: torch.Tensor) -> None:
    if name in SHAPED and value is not None:
        if not isinstance(value, torch.Tensor) or value.shape != p.shape:
            got = list(value.shape) if isinstance(value, torch.Tensor) else repr(value)
            raise ValueError(f"{key} must be a tensor of shape {list(p.shape)}, got {got}")
        if not value.is_floating_point():
            raise ValueError(f"{key} must be floating, got {value.dtype}")
        if name.endswith("_sq") and bool((value < 0).any()):
            raise ValueError(f"{key} must be at least 0, got {value.min().item()}")
    elif name == "step":
        scalar = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if isinstance(scalar, bool) or not isinstance(scalar, int | float) or scalar < 0:
            got = list(value.shape) if isinstance(value, torch.Tensor) else repr(value)
            raise ValueError(f"{key} must be a number of at least 0, got {got}")


def _check_groups(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    for number, (group, mine) in enumerate(zip(saved, own, strict=True)):
        for name, value in mine.items():
            field = f"optimizer.param_groups.{number}.{name}"
            if name not in group:
                raise ValueError(f"{field} must be there, got nothing")
            if name == "params" and group[name] != value:
                raise ValueError(f"{field} must be {value}, got {group[name]}")
            if not _alike(group[name], value):
                raise ValueError(f"{field} must be like {value!r}, got {group[name]!r}")


def _alike(a: Any, b: Any) -> bool:
    """One kind of setting: a number for a number, as many of them for a list; switches equal."""
    if a is None or b is None or isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return not (b >= 0 > a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_alike(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b)
