# SPDX-License-Identifier: Apache-2.0
"""Where a run's metrics go beside its `metrics.jsonl`: TensorBoard, Weights & Biases, your own."""

from mikernels.training.loggers.protocol import MetricsLogger, RunInfo
from mikernels.training.loggers.tensorboard import TensorBoardLogger
from mikernels.training.loggers.wandb import WandbLogger

__all__ = ["MetricsLogger", "RunInfo", "TensorBoardLogger", "WandbLogger"]
