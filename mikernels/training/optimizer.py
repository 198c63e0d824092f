# SPDX-License-Identifier: Apache-2.0
"""The optimiser of an SAE, and what a step asks of it."""

from __future__ import annotations

from typing import Any

import torch

from mikernels.nn import SAE
from mikernels.optim import RowAdam
from mikernels.training.config import TrainConfig


def row_adam(sae: SAE, config: TrainConfig) -> RowAdam:
    """The optimiser of an SAE: one group for the constrained decoders, one for the rest."""
    constrained = bool(sae.constrained())
    decoders = sae.decoders()
    others = [p for p in sae.parameters() if not any(p is w for w in decoders)]
    optimizer = RowAdam(
        [
            {"params": decoders, "project": constrained, "unit_norm": constrained},
            {"params": others},
        ],
        lr=config.peak_lr(sae.config.n_features),
        betas=config.betas,
        eps=config.eps,
        clip_norm=config.clip_norm,
        capturable=config.cuda_graph,
    )
    # one tensor, if it is one: sae_update_ needs to know that the rates are equal, unread
    for group in optimizer.param_groups:
        group["lr"] = optimizer.param_groups[0]["lr"]
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's lr; a tensor is filled, for the CUDA graph that reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def group_of(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> dict[str, Any] | None:
    """The parameter group that holds p; None if the optimiser leaves p alone."""
    groups = (g for g in optimizer.param_groups if any(p is own for own in g["params"]))
    return next(groups, None)


def same_settings(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two groups take the same steps; a device's lr is compared unread, by identity."""
    if isinstance(a["lr"], torch.Tensor) or isinstance(b["lr"], torch.Tensor):
        rates = a["lr"] is b["lr"]
    else:
        rates = a["lr"] == b["lr"]
    return rates and all(a[name] == b[name] for name in ("betas", "eps"))
