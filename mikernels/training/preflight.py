# SPDX-License-Identifier: Apache-2.0
"""What is checked before the first step, so that nothing fails at the first save."""

from __future__ import annotations

import errno
import inspect
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.parametrize import is_parametrized

from mikernels.files import check_json, explained, write_atomic
from mikernels.nn import SAE
from mikernels.optim import RowAdam
from mikernels.tensor_files import check_writable, overlap
from mikernels.training.batches import BatchSource
from mikernels.training.config import TrainConfig
from mikernels.training.optimizer import group_of
from mikernels.training.state.checkpoint import TRAINING, checkpoints, in_the_way, remove_leftovers
from mikernels.training.state.optimizer_state import unpack_optimizer

# what the fused and the dense step compute in their own way
METHODS = (
    *("encode", "slots", "select", "activate", "penalty", "decode", "run", "score"),
    *("remove_parallel_gradient_", "normalize_decoder_"),
)


def check_fit(sae: SAE, source: BatchSource, config: TrainConfig) -> None:
    """SAE, source and settings fit each other, or a ValueError."""
    check_weights_apart(sae)
    if any(p.is_inference() for p in sae.parameters()):
        raise ValueError(
            "Trainer: sae must be made outside of torch.inference_mode(), got parameters that "
            "cannot be trained; pass copy.deepcopy(sae)"
        )
    if config.scale_activations and config.weights_dtype(sae.w_dec.dtype) == torch.float16:
        raise ValueError(
            "Trainer: scale_activations must be False for float16 weights, whose range is too "
            "small to fold a scale into the biases and back, got True; set it, or train in float32"
        )
    if source.d != sae.config.d:
        raise ValueError(
            f"Trainer: source.d must be the SAE's d = {sae.config.d}, got {source.d}; make the SAE "
            f"for the width of these activations"
        )
    d_out = getattr(source, "d_out", None)
    if d_out is not None and d_out != sae.config.d_out:
        raise ValueError(
            f"Trainer: source.d_out must be the SAE's d_out = {sae.config.d_out}, got {d_out}; "
            f"make the SAE for the width of these targets, or the source with others"
        )
    size = getattr(source, "batch_size", None)
    if size not in (None, config.batch_size):
        raise ValueError(
            f"Trainer: source.batch_size must be config.batch_size = {config.batch_size}, got "
            f"{size}; say it once, in TrainConfig, and leave it out of the source"
        )
    if config.cuda_graph and sae.shaped:
        raise ValueError(
            f"Trainer: cuda_graph must be False for {sae.name}, whose number of slots is known "
            f"only once they are found, got True; leave cuda_graph out"
        )
    _check_bypassed(sae, config.step)
    if not any(p.requires_grad for p in sae.parameters()):
        raise ValueError(
            "Trainer: sae must have a parameter to train, got requires_grad=False for all of them; "
            "set requires_grad_(True) on those to train"
        )
    if sae.config.loss == "fvu" and config.batch_size == 1:
        raise ValueError(
            "Trainer: loss='fvu' must have batches of at least 2 tokens, whose variance it is "
            "measured by, got batch_size = 1; raise it or use loss='mse'"
        )
    if config.k_start is not None and config.k_start > sae.config.n_features:
        raise ValueError(
            f"Trainer: k_start must be in 1..{sae.config.n_features} (n_features), got "
            f"{config.k_start}"
        )


def _check_bypassed(sae: SAE, step: str) -> None:
    """The step runs all that the SAE is: what it would pass by without a word is refused.

    Every step calls the methods of an SAE one by one, and never `forward`. Only step "autograd"
    calls `slots`, `decode` and `score` for what they are, and lets hooks see gradients. A variant,
    a class with an `architecture` of its own, answers for its methods itself.
    """
    found = []
    variant = next(c for c in type(sae).__mro__ if "architecture" in vars(c) or c is SAE)
    if is_parametrized(sae):
        found.append("a parametrization")
    if sae._forward_hooks or sae._forward_pre_hooks:
        found.append("forward hooks")
    passed = ("forward", "select") if step == "autograd" else ("forward", *METHODS)
    for name in passed:
        if getattr(type(sae), name) is not getattr(variant, name) or name in vars(sae):
            found.append(f"its own {name}")
    if step != "autograd":
        if sae._backward_hooks or sae._backward_pre_hooks:
            found.append("backward hooks")
        hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
        found += [
            f"a hook on {name}"
            for name, p in sae.named_parameters()
            if any(getattr(p, attribute) for attribute in hooks)
        ]
    if found:
        raise ValueError(
            f"Trainer: sae must be a plain {variant.__name__} for step={step!r}, which would pass "
            f"by what is added to it, got {', '.join(found)}; remove it"
            + ("" if step == "autograd" else ", or use step='autograd' for all but forward")
        )


def check_optimizer(sae: SAE, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
    """A given optimiser does what the SAE and the settings say, or a TypeError or ValueError."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(
            f"Trainer: optimizer must step from gradients, got {type(optimizer).__name__}, which "
            f"needs a closure; use one such as Adam or SGD"
        )
    names = {id(p): name for name, p in sae.named_parameters() if p.requires_grad}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    others = len(held - {id(p) for p in sae.parameters()})
    missing = [name for place, name in names.items() if place not in held]
    if others or missing:
        raise ValueError(
            f"Trainer: optimizer must be of the parameters to train, got one with {others} others "
            f"and without {missing}; make it of sae.parameters(), and freeze what is to stay put "
            f"with requires_grad_(False)"
        )
    rates = [group.get("lr") for group in optimizer.param_groups]
    if None in rates or len(set(map(float, rates))) > 1:  # type: ignore[arg-type]
        raise ValueError(
            f"Trainer: optimizer must have one lr for all its groups, since each step sets it by "
            f"the schedule, got {rates}; give them the same"
        )
    fused = config.step == "fused" and isinstance(optimizer, RowAdam)
    for p in sae.constrained() if fused else ():
        group = group_of(optimizer, p) if p.requires_grad else None
        given = {} if group is None else {n: group.get(n) for n in ("project", "unit_norm")}
        if not all(given.values()):
            raise ValueError(
                f"Trainer: optimizer must constrain w_dec for an SAE with normalize_decoder, got "
                f"{given}; put w_dec in a group with both True, or leave optimizer out"
            )


def check_state(
    sae: SAE,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
) -> None:
    """What a checkpoint would hold can be written and read back; reads the moments once.

    Raises:
        TypeError, ValueError: naming what cannot.
    """
    fix = "; mend it, or leave out_dir out to train without checkpoints"
    weights = sae.state_dict()
    expected = sae.tensors(sae.config).keys()
    if weights.keys() != expected:
        raise ValueError(
            f"Trainer: the SAE's state_dict must be of {sorted(expected)}, as load_sae makes it, "
            f"got {sorted(weights)}{fix}"
        )
    try:
        for name, value in state.items():
            check_json(value, name)
        for name, t in {**weights, **tensors}.items():
            check_writable(name, t)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"Trainer: the states of the source and optimiser must be JSON-able (tensors of the "
            f"optimiser aside), got: {error}{fix}"
        ) from error
    moments = {name: t for name, t in tensors.items() if name.startswith("optimizer.")}
    saved = state["optimizer"]
    try:
        unpack_optimizer(optimizer, moments, saved["state"], saved["param_groups"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Trainer: the state of the optimiser must be one that resume takes back, got "
            f"{type(optimizer).__name__}: {error}{fix}"
        ) from error


def check_weights_apart(sae: SAE) -> None:
    """No two weights in one memory: each is stepped on its own. ValueError else."""
    if tied := overlap(dict(sae.named_parameters(remove_duplicate=False))):
        raise ValueError(
            f"Trainer: the SAE's weights must lie in memory of their own, got {tied[0]} and "
            f"{tied[1]} in one; give each its own, e.g. nn.Parameter({tied[0]}.detach().clone())"
        )


def prepare_out_dir(out_dir: Path, sae: SAE, config: TrainConfig, reached: int | None) -> None:
    """Make sure that all checkpoints can be written to out_dir, which this process owns.

    Args:
        reached: the step of the checkpoint that was resumed from out_dir, None for a new run.

    Raises:
        FileExistsError: it holds checkpoints of another run, or things of their names.
        FloatingPointError: the weights are not finite.
        OSError: it cannot be written, or its disk is too full.
    """
    former = checkpoints(out_dir)
    if former and reached is None:
        raise FileExistsError(
            f"Trainer: out_dir must be without checkpoints for a new run, got {former[-1]}; call "
            f"resume() (--resume) to continue it or choose another out_dir (--out)"
        )
    if reached is not None and (not former or former[-1].name != f"checkpoint-{reached}"):
        raise FileExistsError(
            f"Trainer: out_dir must hold checkpoint-{reached}, from which this run resumes, as its "
            f"newest, got {former[-1] if former else 'none'}; make the Trainer again and call "
            f"resume()"
        )
    remove_leftovers(out_dir)
    if strange := in_the_way(out_dir):
        raise FileExistsError(
            f"Trainer: out_dir must hold checkpoints alone under their names, got {strange[0]}, "
            f"which is none; move it away"
        )
    for name, p in sae.named_parameters():
        if not bool(p.isfinite().all()):
            raise FloatingPointError(f"Trainer: {name} must be finite, got NaN or inf; load others")
    _try_names(out_dir, config.total_steps)
    check_space([(out_dir, space_needed(out_dir, sae, config))])


def space_needed(out_dir: Path, sae: SAE, config: TrainConfig) -> int:
    """Bytes that checkpoints will take beyond what they take now, at most."""
    # weights and two fp32 moments each, and one more while the next is written
    each = sum(p.numel() * (p.element_size() + 8) for p in sae.parameters())
    return each * max(1, config.keep_checkpoints + 1 - len(checkpoints(out_dir)))


def check_space(needed: Sequence[tuple[Path, int]]) -> None:
    """The disks have room for what is needed in folders, which may be still to be made.

    Raises:
        OSError: a disk is too full.
    """
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in needed:
        there = next(p for p in (folder, *folder.parents) if p.exists())
        first, so_far = disks.get(there.stat().st_dev, (folder, 0))
        disks[there.stat().st_dev] = first, so_far + size
    for folder, size in disks.values():
        there = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(there).free
        if free < size:
            raise OSError(
                errno.ENOSPC,
                f"Trainer: out_dir {folder} must have {size / 1e6:,.0f} MB free for checkpoints, "
                f"got {free / 1e6:,.0f} MB; free space or lower keep_checkpoints",
            )


def _try_names(out_dir: Path, last: int) -> None:
    """Write the longest path of a checkpoint, rename its folder and take it away again."""
    partial = out_dir / f".checkpoint-{last}.partial"
    renamed = out_dir / f".checkpoint-{last}.old"
    fix = "choose an out_dir that can be written, with a shorter path"
    with explained("Trainer", "checkpoints", out_dir, fix):
        try:
            partial.mkdir()
            write_atomic(partial / TRAINING, b"")
            os.rename(partial, renamed)
        finally:
            remove_leftovers(out_dir)
