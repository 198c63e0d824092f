# SPDX-License-Identifier: Apache-2.0
"""Metrics for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mikernels.training.loggers.protocol import RunInfo


class TensorBoardLogger:
    """Writes every number of a row as the scalar `train/<name>`, which TensorBoard keeps in fp32.

    Where a run is resumed, TensorBoard shows the new rows instead of those after that step.

    Args:
        folder: of the event file; None is the run's out_dir, so that `tensorboard --logdir` of the
            folder above shows runs side by side.

    Raises:
        ModuleNotFoundError: without the package tensorboard.
        ValueError: later, from a run without out_dir if folder is None; or one object for two runs
            at a time.

    Example:
        Trainer(sae, source, config, out_dir="out/sae", log_to=[TensorBoardLogger()]).run()
    """

    def __init__(self, folder: str | Path | None = None):
        try:
            from torch.utils import tensorboard
        except ImportError as error:
            raise ModuleNotFoundError(
                "TensorBoardLogger: the package tensorboard must be installed; `pip install "
                "'mikernels[tensorboard]'`"
            ) from error
        self._make = tensorboard.SummaryWriter
        self.folder = None if folder is None else Path(folder).absolute()
        self._writer: Any = None

    def start(self, run: RunInfo) -> None:
        folder = self.folder or run.out_dir
        if folder is None:
            raise ValueError(
                "TensorBoardLogger: folder must be given for a run without out_dir, got None; pass "
                "TensorBoardLogger(folder)"
            )
        if self._writer is not None:
            raise ValueError(
                f"TensorBoardLogger: one logger must have one run at a time, got a second, "
                f"{run.name}; make one for each"
            )
        # what was written after the step that a run resumes from is not shown
        purge = run.step + 1 if run.step else None
        self._writer = self._make(str(folder), purge_step=purge)

    def log(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(f"train/{name}", value, row["step"])

    def finish(self, failed: bool) -> None:
        writer, self._writer = self._writer, None
        writer.close()
