# SPDX-License-Identifier: Apache-2.0
"""`cfg.json`, read and checked: what it says is ours to compute, or refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mikernels.files import read_json
from mikernels.integrations.saelens.form import CONFIG, DTYPES, FORMS, WEIGHTS, Form


@dataclass(frozen=True)
class Config:
    """What `cfg.json` says.

    Attributes:
        path: of the file.
        k: of "topk", else None.
        centred, rescaled: `apply_b_dec_to_input`, `rescale_acts_by_decoder_norm`.
        metadata: whatever the writer kept.
    """

    path: Path
    architecture: str
    d: int
    n_features: int
    d_out: int
    k: int | None
    dtype: torch.dtype
    centred: bool
    rescaled: bool
    metadata: dict[str, Any]

    @property
    def form(self) -> Form:
        return FORMS[self.architecture]


def read_config(path: Path) -> Config:
    """The configuration at `path`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is truncated or foreign, or of what no variant computes.
    """
    fix = "it is truncated or of another format: copy or export the SAE again"
    found = read_json(require(path), "load_sae", "JSON", fix)
    if not isinstance(found, dict):
        raise damaged(path, "a JSON object", type(found).__name__)
    metadata = found.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    found = _modern(found, metadata, path)
    for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if not isinstance(found.get(name, False), bool):
            raise damaged(path, f"with {name} true or false", repr(found[name]))
    _check_representable(found, path)
    architecture = found["architecture"]
    form = FORMS[architecture]
    d, n_features = (_positive_int(found, key, path) for key in ("d_in", "d_sae"))
    d_out = _positive_int(found, "d_out", path) if form.transcodes else d
    k = _positive_int(found, "k", path) if architecture == "topk" else None
    if k is not None and k > n_features:
        raise ValueError(f"load_sae: k in {path} must be in 1..{n_features} (d_sae), got {k}")
    dtype = DTYPES.get(str(found.get("dtype", "float32")).removeprefix("torch."))
    if dtype is None:
        raise ValueError(
            f"load_sae: dtype in {path} must be one of {list(DTYPES)}, got {found['dtype']!r}"
        )
    return Config(
        path,
        architecture,
        d,
        n_features,
        d_out,
        k,
        dtype,
        centred=found.get("apply_b_dec_to_input", True),
        rescaled=found.get("rescale_acts_by_decoder_norm", False),
        metadata=metadata,
    )


def require(path: Path) -> Path:
    """`path`, which is a file, or a FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(
            f"load_sae: folder must hold {CONFIG} and {WEIGHTS}, got no {path}; pass the folder "
            f"that SAELens' save_model or export_sae wrote"
        )
    return path


def damaged(path: Path, expected: str, got: object) -> ValueError:
    return ValueError(
        f"load_sae: {path} must be {expected}, got {got}; it is truncated or of another format: "
        f"copy or export the SAE again"
    )


def _modern(found: dict[str, Any], metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration as version 6 writes it."""
    activation = found.get("activation_fn_str", found.get("activation_fn"))
    version = found.get("sae_lens_version") or metadata.get("sae_lens_version")
    major = str(version or "0").split(".")[0]
    if major.isdecimal() and int(major) < 6:
        # TopK was an activation function, and the first versions had one architecture
        found = {"architecture": "standard", **found}
        if activation == "topk":
            settings = found.get("activation_fn_kwargs")
            k = settings.get("k") if isinstance(settings, dict) else None
            return {**found, "architecture": "topk", "k": k}
    if activation not in (None, "relu"):
        raise ValueError(
            f"load_sae: activation_fn in {path} must be 'relu' or, before version 6, 'topk', got "
            f"{activation!r}; no variant has it"
        )
    return found


def _check_representable(found: dict[str, Any], path: Path) -> None:
    architecture = found.get("architecture")
    if not isinstance(architecture, str) or architecture not in FORMS:
        raise ValueError(
            f"load_sae: architecture in {path} must be one of {list(FORMS)}, got "
            f"{architecture!r}; save an SAE in training with its save_inference_model, and load "
            f"others with sae_lens.SAE.load_from_disk"
        )
    if architecture != "topk" and found.get("rescale_acts_by_decoder_norm"):
        raise damaged(path, "without rescale_acts_by_decoder_norm", f"it with {architecture!r}")
    if FORMS[architecture].transcodes and found.get("apply_b_dec_to_input", True):
        raise damaged(path, "with apply_b_dec_to_input false", f"none such with {architecture!r}")
    normalize = found.get("normalize_activations") or "none"
    if normalize != "none":
        raise ValueError(
            f"load_sae: normalize_activations in {path} must be 'none', got {normalize!r}; fold a "
            f"scaling or whitening with SAELens (fold_activation_norm_scaling_factor, "
            f"fold_activation_whitening) and save again; layer_norm and constant_norm_rescale "
            f"cannot be folded"
        )
    if found.get("finetuning_scaling_factor"):
        raise ValueError(
            f"load_sae: finetuning_scaling_factor in {path} must be false, got true; no variant "
            f"has such a factor: load it with sae_lens.SAE.load_from_disk"
        )


def _positive_int(found: dict[str, Any], key: str, path: Path) -> int:
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"load_sae: {key} in {path} must be a positive integer, got {value!r}; the file is "
            f"incomplete or of another format"
        )
    return value
