# SPDX-License-Identifier: Apache-2.0
"""Metrics for Weights & Biases, where its package is installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mikernels.files import explained, write_atomic
from mikernels.training.loggers.protocol import RunInfo

# holds the run's id, with which it goes on after a resume
ID = "wandb-id.txt"


class WandbLogger:
    """Logs every row to a run of Weights & Biases, at its step, with the settings as its config.

    Account, project and mode are what wandb reads from its environment (`WANDB_PROJECT`,
    `WANDB_MODE=offline`, ...) unless they are given here. A resumed run goes on under the id of the
    first one, which out_dir keeps; rows that wandb already has are not logged twice.

    Args:
        options: of `wandb.init`, e.g. `project="saes"`, `group="layer 7"`.

    Raises:
        ModuleNotFoundError: without the package wandb.
        ValueError: later, for one object with two runs at a time.

    Example:
        Trainer(sae, source, config, out_dir="out/sae", log_to=[WandbLogger(project="saes")])
    """

    def __init__(self, **options: Any):
        try:
            import wandb
        except ImportError as error:
            raise ModuleNotFoundError(
                "WandbLogger: the package wandb must be installed; `pip install wandb`"
            ) from error
        self._init = wandb.init
        self._options = options
        self._run: Any = None

    def start(self, run: RunInfo) -> None:
        if self._run is not None:
            raise ValueError(
                f"WandbLogger: one logger must have one run at a time, got a second, {run.name}; "
                f"make one for each"
            )
        own: dict[str, Any] = {"name": run.name, "config": run.settings}
        if run.out_dir is not None:
            own["dir"] = str(run.out_dir)
            if run.step and (former := _id(run.out_dir / ID)):
                own |= {"id": former, "resume": "allow"}
        # several at a time, as a group has them
        self._run = self._init(**{"reinit": "create_new", **own, **self._options})
        if run.out_dir is not None:
            with explained("WandbLogger", "the run's id", run.out_dir / ID, "choose another"):
                write_atomic(run.out_dir / ID, f"{self._run.id}\n")

    def log(self, row: dict[str, Any]) -> None:
        self._run.log({n: v for n, v in row.items() if v is not None}, step=row["step"])

    def finish(self, failed: bool) -> None:
        run, self._run = self._run, None
        run.finish(exit_code=int(failed))


def _id(path: Path) -> str | None:
    """What the file holds, if it is an id as wandb has them."""
    if not path.is_file():
        return None
    found = path.read_bytes()[:100].strip()
    return found.decode() if re.fullmatch(rb"[A-Za-z0-9_-]{1,64}", found) else None
