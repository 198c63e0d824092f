# SPDX-License-Identifier: Apache-2.0
"""The runs that one `mikernels train` asks for: one, or one for each site and setting."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mikernels.models.sites import AnySite
    from mikernels.training import History, MetricsLogger, Trainer

LOGGERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class Member:
    """One SAE to train.

    Attributes:
        name: of its folder, e.g. "3.residual-k32"; "" where it is the only one.
        source: which source it reads. arch, k: of the SAE.
    """

    name: str
    source: int
    arch: str
    k: float


def members(sites: Sequence[AnySite], archs: Sequence[str], ks: Sequence[float]) -> list[Member]:
    """One for each site, architecture and k; an architecture without a k comes once.

    Args:
        sites: of --sites; none where there is one source.

    Raises:
        ValueError: an architecture that is none, or something given twice.
    """
    from mikernels.nn import ARCHITECTURES

    for arch in archs:
        if arch not in ARCHITECTURES:
            raise ValueError(f"train: --arch must be one of {sorted(ARCHITECTURES)}, got {arch!r}")
    for option, given in (("--arch", archs), ("--k", [f"{k:g}" for k in ks])):
        if twice := next((one for one in given if list(given).count(one) > 1), None):
            raise ValueError(f"train: {option} must be given once for each SAE, got {twice} twice")
    found = []
    for (number, site), arch in product(enumerate(map(str, sites) if sites else [""]), archs):
        has_k = sparsity_setting(arch) is not None
        for k in ks if has_k else ks[:1]:
            parts = [
                site,
                arch if len(archs) > 1 else "",
                f"k{k:g}" if has_k and len(ks) > 1 else "",
            ]
            found.append(Member("-".join(filter(None, parts)), number, arch, k))
    return found


def sparsity_setting(arch: str) -> str | None:
    """What --k sets of an architecture."""
    from mikernels.nn import ARCHITECTURES

    names = {f.name for f in fields(ARCHITECTURES[arch].config_type)}
    return next((name for name in ("k", "target_l0") if name in names), None)


def sites_given(texts: Sequence[str] | None) -> list[AnySite]:
    """The sites of --sites: 3 (its residual stream), 7.mlp_out, or a submodule's name.

    Raises:
        ValueError: none in one, or one twice.
    """
    from mikernels.models.sites import read_sites

    if not texts:
        return []
    parts = [part.strip() for text in texts for part in text.split(",")]
    return list(
        read_sites("train", "--sites", [int(p) if p.isdecimal() else p for p in parts if p])
    )


def check_joined(layers: Sequence[int] | None, archs: Sequence[str], site: str) -> None:
    """Several --layer are one input: for architectures that know of layers.

    Raises:
        ValueError: for the others.
    """
    from mikernels.nn import ARCHITECTURES

    if layers is None or len(layers) < 2:
        return
    joined = [
        name
        for name, variant in ARCHITECTURES.items()
        if "n_layers" in {f.name for f in fields(variant.config_type)}
    ]
    if wrong := [arch for arch in archs if arch not in joined]:
        each = ",".join(f"{layer}.{site}" for layer in layers)
        raise ValueError(
            f"train: --layer may be repeated to join layers into the input of one --arch "
            f"{' or '.join(joined)}, got {len(layers)} layers with --arch {wrong[0]}; for an SAE "
            f"for each layer give --sites {each}"
        )


def loggers(names: Sequence[str] | None) -> list[MetricsLogger]:
    """New loggers by name.

    Raises:
        ValueError: another name, or one twice. ModuleNotFoundError: its package is missing.
    """
    from mikernels.training import TensorBoardLogger, WandbLogger

    given = list(names or ())
    for name in given:
        if name not in LOGGERS or given.count(name) > 1:
            raise ValueError(
                f"train: --log-to must be {' or '.join(LOGGERS)}, each once, got {given}"
            )
    made: dict[str, Callable[[], MetricsLogger]]
    made = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger}
    return [made[name]() for name in given]


def again() -> str:
    """The command line that continues this one."""
    given = sys.argv[1:]
    return shlex.join(["mikernels", *given, *([] if "--resume" in given else ["--resume"])])


def run(trainers: dict[str, Trainer], resume: bool, several: bool) -> dict[str, Any]:
    """Train them, alone or as a group; the errors of those that failed, by name."""
    from mikernels.training import TrainerGroup, TrainingFailed

    how = f"run `{again()}`"
    if not several:
        (trainer,) = trainers.values()
        if resume:
            print(f"resumed at step {trainer.resume():,} of {trainer.config.total_steps:,}")
        _print_start("", trainer)
        trainer.run(how)
        _print_end("", trainer.history, trainer.out_dir)
        return {}
    group = TrainerGroup(trainers)
    if resume:
        for name, step in group.resume().items():
            print(f"{name}: resumed at step {step:,} of {trainers[name].config.total_steps:,}")
    for name, trainer in trainers.items():
        _print_start(f"{name}: ", trainer)
    failed: dict[str, Any] = {}
    try:
        group.run(how)
    except TrainingFailed as error:
        failed = {"error": error, "names": error.errors}
    for name, trainer in trainers.items():
        if name not in failed.get("names", ()):
            _print_end(f"{name}: ", trainer.history, trainer.out_dir)
    return failed


def figures(trainer: Trainer) -> dict[str, Any]:
    """What --json says of a run."""
    rows = trainer.history.rows
    return {
        "sae": trainer.sae.name,
        "d": trainer.sae.config.d,
        "n_features": trainer.sae.config.n_features,
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "seconds": trainer.history.parts,
        "out": str(trainer.out_dir),
        "last": rows[-1] if rows else None,
    }


def sparsity(sae: Any) -> str:
    """How many features are meant to be active, in words."""
    if sae.k is not None:
        return f"k {sae.k:g}"
    target = getattr(sae.config, "target_l0", None)
    return "L0 by its penalty" if target is None else f"target L0 {target:g}"


def _print_start(prefix: str, trainer: Trainer) -> None:
    sae, config = trainer.sae, trainer.config
    print(
        f"{prefix}{sae.name}: d {sae.config.d:,}, F {sae.config.n_features:,}, "
        f"{sparsity(sae)}; {config.total_tokens:,} tokens to {trainer.out_dir}\n"
        f"{prefix}lr {config.lr:.1e}, warm-up {config.warmup:,} and decay "
        f"{config.decay_length:,} of {config.total_steps:,} steps"
    )


def _print_end(prefix: str, history: History, out: Path | None) -> None:
    if history.rows:
        last = history.rows[-1]
        print(
            f"{prefix}step {last['step']:,}: FVU {last['fvu']:.4f}, L0 {last['l0']:.1f}, dead "
            f"{last['dead_fraction']:.1%}; saved in {out}"
        )
