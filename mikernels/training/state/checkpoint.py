# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: a folder `checkpoint-<step>` that is complete or does not exist.

    sae.safetensors        weights and tokens_since_fired
    training.safetensors   optimiser state, torch's generator
    state.json             configurations, step, source position, everything that is a number, and
                           the SHA-256 of all three (its own is that of its other contents)

A checkpoint is written to a hidden folder, every file and folder is fsynced, and the folder is
renamed: a kill or a power cut leaves the former checkpoints as they were. Old ones are renamed away
before they are deleted, for the same reason. Only folders that hold a checkpoint's files and
nothing else are ever deleted.

Version 2 knew no penalties of codes. Its SAEs load and its runs go on, to the same bits.
Version 1 had no checksums, averaged its metrics over micro-batches, knew no scale of activations
and divided the auxiliary loss by the residual's variance alone. Its SAEs load, and its runs go on,
with a warning that says so.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mikernels._dispatch import FLOATS
from mikernels.files import (
    explained,
    partial_of,
    read_json,
    sealed,
    sync_folder,
    write_json,
)
from mikernels.nn import ARCHITECTURES, SAE, SAEConfig, TopKSAE
from mikernels.tensor_files import read_tensors, write_tensors
from mikernels.training.config import TrainConfig

if TYPE_CHECKING:
    from mikernels.schema import FirstSums, State, Sums

FORMAT = "mikernels-checkpoint"
VERSION = 3
WEIGHTS, TRAINING, STATE = "sae.safetensors", "training.safetensors", "state.json"
FILES = (WEIGHTS, TRAINING, STATE)
_OWN = {*FILES, *(partial_of(Path(name)).name for name in FILES)}
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_LEFTOVER = re.compile(r"\.checkpoint-(0|[1-9][0-9]*)\.(partial|old)")
# what a file of a former version says of each; a setting that came later has its default there
_SAE = ("d", "n_features", "k", "k_aux", "aux_coefficient", "dead_after", "loss")
FORMER_SAE = {1: (*_SAE, "normalize_decoder"), 2: (*_SAE, "normalize_decoder")}
_CONFIG = (
    *("total_tokens", "batch_size", "accumulation", "step", "lr", "warmup_steps", "decay"),
    *("decay_steps", "betas", "eps", "clip_norm", "k_start", "k_anneal_steps", "dtype"),
    *("init_b_dec", "log_every", "checkpoint_every", "keep_checkpoints", "seed", "cuda_graph"),
)
FORMER_CONFIG = {1: _CONFIG, 2: (*_CONFIG, "scale_activations")}


def checkpoints(out_dir: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first; links are none."""
    found = [path for path in _named(out_dir, _NAME) if _is_folder(path)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def runs_within(folder: Path) -> list[str]:
    """The names of the folders in it that hold checkpoints: the runs of a group."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if _is_folder(path) and checkpoints(path))


def save_checkpoint(
    out_dir: Path,
    step: int,
    weights: Mapping[str, torch.Tensor],
    training: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `out_dir/checkpoint-<step>` and delete all but the newest `keep`.

    An older one that holds anything but a checkpoint's files is kept, with a warning.

    Raises:
        OSError: when it cannot be written (a full disk); the former checkpoints are intact.
    """
    final = out_dir / f"checkpoint-{step}"
    partial = out_dir / f".checkpoint-{step}.partial"
    former = checkpoints(out_dir)
    safe = f"{former[-1]} is intact" if former else "there is no former one"
    with explained("Trainer", "a checkpoint", final, f"free disk space, then resume ({safe})"):
        remove_leftovers(out_dir)
        partial.mkdir()
        try:
            hashes = {
                name: write_tensors(partial / name, tensors)
                for name, tensors in ((WEIGHTS, weights), (TRAINING, training))
            }
            header = {
                "format": FORMAT,
                "version": VERSION,
                "step": step,
                "tensors": {key: describe(t) for key, t in training.items()},
            }
            write_json(partial / STATE, sealed({**header, **state}, **hashes))
            os.rename(partial, final)
        except BaseException:
            _discard(partial)
            raise
        sync_folder(out_dir)
    for path in checkpoints(out_dir)[:-keep]:
        if others := _others(path):
            warnings.warn(
                f"Trainer: {path} holds {others} beside a checkpoint and is kept; move that away",
                stacklevel=2,
            )
            continue
        with explained("Trainer", "the removal of a checkpoint", path, "delete it by hand"):
            os.rename(path, out_dir / f".{path.name}.old")
    remove_leftovers(out_dir)
    return final


def remove_leftovers(out_dir: Path) -> None:
    """Delete what an interrupted save left: it was never a checkpoint, or is one no more."""
    for path in _named(out_dir, _LEFTOVER):
        _discard(path)


def in_the_way(out_dir: Path) -> list[Path]:
    """What has a name that a checkpoint will need and is none; remove leftovers before."""
    strange = [path for path in _named(out_dir, _NAME) if not _is_folder(path)]
    return sorted([*strange, *_named(out_dir, _LEFTOVER)])


def own_folders(out_dir: Path) -> list[Path]:
    """Checkpoints, and what interrupted saves left, with nothing else in them."""
    found = [*checkpoints(out_dir), *_named(out_dir, _LEFTOVER)]
    return [path for path in found if _is_folder(path) and not _others(path)]


def remove_checkpoints(out_dir: Path) -> None:
    """Delete `own_folders`."""
    for path in own_folders(out_dir):
        _discard(path)


def _named(out_dir: Path, pattern: re.Pattern[str]) -> list[Path]:
    if not out_dir.is_dir():
        return []
    return [path for path in out_dir.iterdir() if pattern.fullmatch(path.name)]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _others(folder: Path) -> list[str]:
    """What a folder holds beside a checkpoint's files."""
    with os.scandir(folder) as entries:
        return sorted(
            e.name for e in entries if e.name not in _OWN or e.is_dir(follow_symlinks=False)
        )


def _discard(folder: Path) -> None:
    """Delete a folder with nothing but a checkpoint's files; any other stays as it is."""
    try:
        if not stat.S_ISDIR(os.lstat(folder).st_mode) or _others(folder):
            return
    except FileNotFoundError:
        return
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def load_checkpoint(
    folder: Path,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], State]:
    """The weights, training tensors and state of a checkpoint, with their checksums verified.

    One of version 1 has no checksums, which a warning says.

    Raises:
        FileNotFoundError, ValueError: naming the file that is missing, truncated, foreign or
            changed, and the field.
    """
    state = read_state(folder)
    hashes = state.sha256
    weights, training = (_read(folder / name, hashes.get(name)) for name in (WEIGHTS, TRAINING))
    described = {key: describe(t) for key, t in training.items()}
    check_equal(folder / TRAINING, described, state.tensors)
    for key, t in training.items():
        check_finite(folder / TRAINING, key, t)
    return weights, training, state


def read_state(folder: Path) -> State:
    """What a checkpoint says of itself, without its tensors; see `load_checkpoint`."""
    from mikernels.schema import FirstState, State, check, check_sealed

    if not folder.is_dir():
        raise FileNotFoundError(
            f"resume: expected a checkpoint folder, got {folder}, which does not exist"
        )
    path, fix = folder / STATE, _fix(folder)
    expected = f"the state of a {FORMAT}, version 1 to {VERSION}"
    try:
        raw = read_json(path, "resume", expected, fix)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    if not isinstance(raw, dict):
        raise _unusable(path, expected, f"a JSON {type(raw).__name__}")
    name, version = raw.get("format"), raw.get("version")
    if name != FORMAT or type(version) is not int or not 1 <= version <= VERSION:
        raise _unusable(path, expected, f"format {name!r}, version {version!r}")
    state = check(FirstState if version == 1 else State, raw, "resume", path, fix)
    hashes = state.sha256
    if version == 1:
        warnings.warn(
            f"resume: {folder} is of version 1, which has no checksums: a bit that flipped on the "
            f"disk is not seen. A run that goes on weighs AuxK anew: with loss='mse' its auxiliary "
            f"loss is now in units of the mse, times the variance of the activations; to go on as "
            f"before, divide aux_coefficient by that in a run of its own from load_sae",
            stacklevel=4,
        )
    else:
        names = sorted([WEIGHTS, TRAINING, "self"])
        if sorted(hashes) != names:
            raise _unusable(path, f"with sha256 of {names}", f"sha256 of {sorted(hashes)}")
        check_sealed(raw, "resume", path, fix)
    if version == 1:
        state.sae["architecture"] = TopKSAE.architecture  # there was no other
    kind = state.sae.get("architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise _unusable(path, f"with sae.architecture of {sorted(ARCHITECTURES)}", f"{kind!r}")
    form = ARCHITECTURES[kind].config_type
    check_names(path, "sae", state.sae, form, FORMER_SAE.get(version))
    return state


def load_sae(folder: str | Path) -> SAE:
    """The SAE of a checkpoint, for use outside a Trainer.

    Raises:
        FileNotFoundError, ValueError: naming the file that is missing, truncated, foreign or
            changed, and what in it.
    """
    folder = Path(folder)
    weights, _, state = load_checkpoint(folder)
    config = read_config(folder, state)
    check_weights(folder, weights, config)
    # its own generator: loading leaves the caller's random numbers alone
    kind = ARCHITECTURES[state.sae["architecture"]]
    sae = kind.of(config, dtype=weights["w_dec"].dtype, generator=torch.Generator())
    sae.load_state_dict(weights)
    return sae


def read_config(folder: Path, state: State) -> SAEConfig:
    """The SAE's settings, or a ValueError that names the field."""
    from mikernels.schema import check

    settings = dict(state.sae)
    form = ARCHITECTURES[settings.pop("architecture")].config_type
    return check(form, settings, "resume", folder / STATE, _fix(folder), "sae")


def modern_config(config: TrainConfig) -> TrainConfig:
    """What the settings of a version-1 checkpoint mean today."""
    decay = config.decay_steps
    if decay is None and config.decay != "constant":
        decay = max(1, config.total_steps - config.warmup)  # it began where the warm-up ended
    return replace(config, decay_steps=decay, scale_activations=False)


def modern_sums(former: FirstSums | Sums, config: TrainConfig, version: int) -> Sums:
    """Sums over the tokens from those of a former version."""
    from mikernels.schema import Sums

    if version == VERSION and isinstance(former, Sums):
        return former
    sums = {**former.sums, "sparsity": 0.0}  # there was none
    if isinstance(former, Sums):
        return Sums(sums=sums, tokens=former.tokens)
    # version 1: over micro-batches, which were of one size
    sums = {name: value * config.batch_size for name, value in sums.items()}
    return Sums(sums=sums, tokens=former.count * config.batch_size)


def check_names(
    path: Path, field: str, found: Mapping[str, Any], form: Any, first: tuple[str, ...] | None
) -> None:
    """Every setting of a dataclass is there: none takes a default in silence."""
    names = [f.name for f in fields(form)] if first is None else first
    if missing := [name for name in names if name not in found]:
        raise _unusable(path, f"with {field}.{missing[0]}", "nothing")


def check_weights(
    folder: Path, weights: Mapping[str, torch.Tensor], config: SAEConfig, like: str | None = None
) -> None:
    """The checkpoint's weights are those of such an SAE, or a ValueError that names the tensor.

    Args:
        like: the dtype that they must have; None is any, the same for all.
    """
    path = folder / WEIGHTS
    tensors = next(v for v in ARCHITECTURES.values() if v.config_type is type(config)).tensors(
        config
    )
    if like is None:
        like = str(weights["w_dec"].dtype) if "w_dec" in weights else "torch.float32"
        if like not in map(str, FLOATS):
            raise _unusable(path, f"weights of one of {[str(d) for d in FLOATS]}", like)
    expected = {name: f"{dtype or like} {list(shape)}" for name, (shape, dtype) in tensors.items()}
    check_equal(path, {name: describe(t) for name, t in weights.items()}, expected)
    for name in tensors:
        check_finite(path, name, weights[name])
    if bool((weights["tokens_since_fired"] < 0).any()):
        raise _unusable(path, "with tokens_since_fired of at least 0", "negative ones")


def check_finite(path: Path, name: str, t: torch.Tensor) -> None:
    """No NaN or infinity in a floating tensor, or a ValueError."""
    if t.is_floating_point() and (bad := int((~t.isfinite()).sum())):
        raise ValueError(
            f"resume: {path} must hold finite {name}, got NaN or inf in {bad:,} of "
            f"{t.numel():,} places; {_fix(path.parent)}"
        )


def check_equal(
    path: Path,
    got: Mapping[str, Any],
    expected: Mapping[str, Any],
    fix: str = "resume with the SAE and settings of the first run",
) -> None:
    """Same entries, or a ValueError that names the file and the first that differs."""
    for name in sorted(got.keys() | expected.keys()):
        have, want = got.get(name, "none"), expected.get(name, "none")
        if have != want:
            raise ValueError(f"resume: {path} must hold {name} = {want}, got {have}; {fix}")


def describe(t: torch.Tensor) -> str:
    return f"{t.dtype} {list(t.shape)}"


def _read(path: Path, sha256: str | None) -> dict[str, torch.Tensor]:
    try:
        return read_tensors(path, sha256)
    except (OSError, ValueError) as error:
        raise _unusable(path, "a complete safetensors file", f"{error}") from error


def _fix(folder: Path) -> str:
    return f"remove the folder {folder} to resume from the checkpoint before it"


def _unusable(path: Path, expected: str, got: str) -> ValueError:
    return ValueError(f"resume: {path} must be {expected}, got {got}; {_fix(path.parent)}")
