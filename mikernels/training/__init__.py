# SPDX-License-Identifier: Apache-2.0
"""Trainer, groups of them, their configuration and history, checkpoints, loggers."""

from mikernels.training.config import TrainConfig
from mikernels.training.group import TrainerGroup, TrainingFailed
from mikernels.training.loggers import MetricsLogger, RunInfo, TensorBoardLogger, WandbLogger
from mikernels.training.planning import Plan, plan
from mikernels.training.state.checkpoint import load_sae
from mikernels.training.state.metrics import History
from mikernels.training.trainer import Trainer

__all__ = [
    "History",
    "MetricsLogger",
    "Plan",
    "RunInfo",
    "TensorBoardLogger",
    "TrainConfig",
    "Trainer",
    "TrainerGroup",
    "TrainingFailed",
    "WandbLogger",
    "load_sae",
    "plan",
]
