# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: a folder `checkpoint-<step>` that is complete or does not exist.

    sae.safetensors        weights and tokens_since_fired
    training.safetensors   optimiser state, torch's generator
    state.json             configurations, step, source position, everything that is a number

A checkpoint is written to a hidden folder, every file and folder is fsynced, and the folder is
renamed: a kill or a power cut leaves the former checkpoints as they were. Old ones are renamed away
before they are deleted, for the same reason.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mikernels.nn import TopKSAE

FORMAT = "mikernels-checkpoint"
VERSION = 1
WEIGHTS, TRAINING, STATE = "sae.safetensors", "training.safetensors", "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(out_dir: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    found = [path for path in out_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(
    out_dir: Path,
    step: int,
    weights: Mapping[str, torch.Tensor],
    training: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `out_dir/checkpoint-<step>` and delete all but the newest `keep`.

    Raises:
        OSError: when it cannot be written (a full disk); the former checkpoints are intact.
    """
    final = out_dir / f"checkpoint-{step}"
    partial = out_dir / f".checkpoint-{step}.partial"
    try:
        remove_leftovers(out_dir)
        partial.mkdir(parents=True)
        for name, tensors in ((WEIGHTS, weights), (TRAINING, training)):
            save_file({key: t.detach().contiguous() for key, t in tensors.items()}, partial / name)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "tensors": {key: describe(t) for key, t in training.items()},
        }
        (partial / STATE).write_text(json.dumps({**header, **state}, indent=1) + "\n")
        for name in (WEIGHTS, TRAINING, STATE):
            _fsync(partial / name)
        _fsync(partial)
        os.rename(partial, final)
        _fsync(out_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        former = checkpoints(out_dir)
        safe = f"{former[-1]} is intact" if former else "there is no former one"
        # safetensors gives the system's error as text: "... on device (os error 28)"
        told = re.search(r"os error (\d+)", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None)
        raise OSError(
            number or errno.EIO,
            f"Trainer: a checkpoint must be written to {final}, got {error}; free disk space, then "
            f"resume ({safe})",
        ) from error
    for path in checkpoints(out_dir)[:-keep]:
        os.rename(path, out_dir / f".{path.name}.old")
    remove_leftovers(out_dir)
    return final


def remove_leftovers(out_dir: Path) -> None:
    """Delete what an interrupted save left: it was never a checkpoint, or is one no more."""
    for path in out_dir.glob(".checkpoint-*"):
        shutil.rmtree(path)


def load_checkpoint(
    folder: Path,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """The weights, training tensors and state of a checkpoint.

    Raises:
        FileNotFoundError, ValueError: naming the file that is missing, truncated or foreign.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"resume: expected a checkpoint folder, got {folder}, which does not exist"
        )
    path = folder / STATE
    try:
        state = json.loads(path.read_text())
        if state["format"] != FORMAT or state["version"] != VERSION:
            raise ValueError(f"format {state['format']!r}, version {state['version']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unusable(path, f"the state of a {FORMAT}, version {VERSION}", error) from error
    weights, training = (_read(folder / name) for name in (WEIGHTS, TRAINING))
    described = {key: describe(t) for key, t in training.items()}
    check_equal(folder / TRAINING, described, state["tensors"])
    return weights, training, state


def load_sae(folder: str | Path) -> TopKSAE:
    """The SAE of a checkpoint, for use outside a Trainer.

    Raises:
        FileNotFoundError, ValueError: naming the file that is missing, truncated or foreign.
    """
    folder = Path(folder)
    weights, _, state = load_checkpoint(folder)
    sae = TopKSAE(**state["sae"], dtype=weights["w_dec"].dtype)
    check_weights(folder, weights, sae)
    sae.load_state_dict(weights)
    return sae


def check_weights(folder: Path, weights: Mapping[str, torch.Tensor], sae: TopKSAE) -> None:
    """The checkpoint's weights fit the SAE, or a ValueError that names the file and the tensor."""
    check_equal(
        folder / WEIGHTS,
        {name: describe(t) for name, t in weights.items()},
        {name: describe(t) for name, t in sae.state_dict().items()},
    )


def check_equal(path: Path, got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Same entries, or a ValueError that names the file and the first that differs."""
    for name in sorted(got.keys() | expected.keys()):
        have, want = got.get(name, "none"), expected.get(name, "none")
        if have != want:
            raise ValueError(
                f"resume: {path} must hold {name} = {want}, got {have}; resume with the SAE and "
                f"settings of the first run"
            )


def describe(t: torch.Tensor) -> str:
    return f"{t.dtype} {list(t.shape)}"


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
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], packed: dict[str, Any]
) -> None:
    """The inverse of `pack_optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**packed["state"], **tensors}.items():
        _, index, name = key.split(".", 2)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": packed["param_groups"]})


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        # cloned: loaded tensors map the file, which a later checkpoint deletes
        return {name: t.clone() for name, t in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise _unusable(path, "a complete safetensors file", error) from error


def _unusable(path: Path, expected: str, error: Exception) -> ValueError:
    return ValueError(
        f"resume: {path} must be {expected}, got {type(error).__name__}: {error}; remove the "
        f"folder {path.parent} to resume from the checkpoint before it"
    )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
