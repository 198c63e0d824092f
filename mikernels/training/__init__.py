# SPDX-License-Identifier: Apache-2.0
"""Trainer, its configuration and history, checkpoints."""

from mikernels.training.config import TrainConfig
from mikernels.training.planning import Plan, plan
from mikernels.training.state.checkpoint import load_sae
from mikernels.training.state.metrics import History
from mikernels.training.trainer import Trainer

__all__ = ["History", "Plan", "TrainConfig", "Trainer", "load_sae", "plan"]
