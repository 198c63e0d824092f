# SPDX-License-Identifier: Apache-2.0
"""An SAE written in SAELens' format."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels._version import __version__
from mikernels.files import check_json, explained, read_json, replacing, write_all
from mikernels.integrations.saelens.form import (
    ARCHITECTURES,
    CONFIG,
    FORMAT_VERSION,
    FORMS,
    NAMES,
    SETTINGS,
    WEIGHTS,
)
from mikernels.nn import ARCHITECTURES as VARIANTS
from mikernels.nn import SAE, BatchTopKSAE, JumpReLUSAE, Transcoder
from mikernels.owning import owned
from mikernels.tensor_files import dump_tensors, open_tensors


def export_sae(
    sae: SAE,
    folder: str | Path,
    *,
    model_name: str | None = None,
    hook_name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write an SAE or transcoder so that `sae_lens.SAE.load_from_disk(folder)` reads it.

    Codes and reconstructions there are those of `sae`, to rounding. `load_sae` gives `sae` back,
    but for what training counts: how long ago and how often features fired. An earlier export in
    the folder is replaced; at any moment the folder holds the old SAE, the new one or no
    `cfg.json`, never a mixture.

    Args:
        sae: the SAE to write, in its own dtype; thresholds of half-precision ones are float32.
        folder: made if missing.
        model_name: the model whose activations it reads, e.g. "gpt2-small".
        hook_name: where in the model, e.g. "blocks.6.hook_resid_post".
        metadata: further JSON-able entries, e.g. `context_size`, `prepend_bos`, `dataset_path`,
            and for a transcoder `hook_name_out`.

    Returns:
        The folder.

    Raises:
        TypeError: sae is of a variant that SAELens has not, or metadata is not JSON-able.
        ValueError: a threshold is negative or not finite, or there is none yet (BatchTopK).
        FileExistsError: the folder holds an SAE of another's.
        BlockingIOError: another process exports to it.
        OSError: a file cannot be written, e.g. on a full disk; the earlier export stays.
    """
    if not isinstance(sae, SAE) or sae.architecture not in ARCHITECTURES:
        names = ", ".join(VARIANTS[kind].__name__ for kind in ARCHITECTURES)
        raise TypeError(
            f"export_sae: sae must be one of {names}, got {type(sae).__name__}; SAELens has no "
            f"other: a Trainer's checkpoint keeps it"
        )
    _check_threshold(sae)
    architecture = ARCHITECTURES[sae.architecture][-1 if _is_relu(sae) else 0]
    form = FORMS[architecture]
    n_features, d = sae.w_enc.shape
    d_out = sae.w_dec.shape[1]
    config = {
        "d_in": d,
        "d_sae": n_features,
        **({"d_out": d_out} if form.transcodes else {}),
        **({"k": sae.k, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}),
        "dtype": str(sae.w_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": not form.transcodes,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": FORMAT_VERSION,
            "sae_lens_training_version": None,
            "model_name": model_name,
            "hook_name": hook_name,
            **(metadata or {}),
            "mikernels_version": __version__,
            SETTINGS: {"architecture": sae.architecture, **sae.config.to_dict()},
        },
        "architecture": architecture,
    }
    try:
        check_json(config["metadata"], "metadata")
    except (TypeError, ValueError) as error:
        raise type(error)(f"export_sae: metadata must be JSON-able, got {error}") from error
    text = json.dumps(config, indent=1) + "\n"
    weights = {}
    for name in form.shapes(d, n_features, d_out):
        t = getattr(sae, NAMES[name]).detach()
        if name == "W_enc":
            t = t.T
        elif name == "threshold":
            t = t.to(accumulate_dtype(sae.w_dec.dtype)).expand(n_features)
        weights[name] = t.contiguous().cpu()
    folder = Path(folder)
    _write(folder, text, weights)
    return folder


def _is_relu(sae: SAE) -> bool:
    """A transcoder that keeps all positive pre-activations, in training too."""
    if not isinstance(sae, Transcoder):
        return False
    return sae.config.k == sae.config.n_features and float(sae.threshold) == 0


def _check_threshold(sae: SAE) -> None:
    if isinstance(sae, BatchTopKSAE):
        if not _is_relu(sae) and not float(sae.threshold) > 0:
            raise ValueError(
                f"export_sae: threshold must be above 0, got {float(sae.threshold)}; train the SAE"
            )
    elif isinstance(sae, JumpReLUSAE):
        t = sae.threshold.detach()
        bad = t[~((t >= 0) & t.isfinite())]
        if bad.numel():
            raise ValueError(
                f"export_sae: threshold must be at least 0 and finite, got {float(bad[0])} "
                f"({bad.numel()} such in all); negative ones become 0 by sae.project_()"
            )


def _check_replaceable(folder: Path) -> None:
    """What stands under our names is an export of ours: nothing else is overwritten."""
    config, weights = folder / CONFIG, folder / WEIGHTS
    try:
        if os.path.lexists(config):
            value = read_json(config, "export_sae", "the export of an SAE", "move it away")
            ours = "mikernels_version" in value["metadata"]
        elif os.path.lexists(weights):
            # an export that was interrupted between its two renames
            with open_tensors(weights) as file:
                ours = "mikernels_version" in (file.metadata() or {})
        else:
            return
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours or any(path.is_symlink() or path.is_dir() for path in (config, weights)):
        raise FileExistsError(
            f"export_sae: folder must hold no other SAE, got {folder} with a {CONFIG} or {WEIGHTS} "
            f"that export_sae did not write; choose another folder"
        )


def _write(folder: Path, config: str, weights: dict[str, torch.Tensor]) -> None:
    """Both files are complete on the disk before either takes its place; the configuration is
    absent while the weights change, so that no reader sees one SAE's sizes with another's."""
    fix = "free space or choose another folder"
    with explained("export_sae", "an SAE", folder, fix):
        folder.mkdir(parents=True, exist_ok=True)
    with owned(folder, "export_sae") as mine:
        _check_replaceable(folder)
        with (
            explained("export_sae", "an SAE", folder, fix),
            replacing(folder / CONFIG) as text,
            replacing(folder / WEIGHTS) as tensors,
        ):
            write_all(text, config.encode("utf-8"))
            dump_tensors(tensors, weights, {"mikernels_version": __version__})
            for file in (text, tensors):
                os.fsync(file.fileno())
            (folder / CONFIG).unlink(missing_ok=True)
        mine.check()
