# SPDX-License-Identifier: Apache-2.0
"""SAELens' on-disk format: a folder with `cfg.json` and `sae_weights.safetensors`.

The format is that of sae-lens 6 (checked against 6.54.12); sae-lens itself is not needed. It stores
`W_enc [d, F]`, `b_enc [F]`, `W_dec [F, d]`, `b_dec [d]`. A TopKSAE is of architecture "topk", which
computes, with `c = 1` when `apply_b_dec_to_input` and `s = |W_dec|` (row norms) when
`rescale_acts_by_decoder_norm`, else 1,

    h = s ((x - c b_dec) W_enc + b_enc);  codes = relu(top_k(h));  x^ = (codes / s) W_dec + b_dec.

A TopKSAE is the case c = 1, s = 1. Other files are folded into it on loading:
`w_enc = s W_enc^T`, `w_dec = W_dec / s`, `b_enc = s (b_enc + (1 - c) b_dec W_enc)`.

A BatchTopKSAE is of architecture "jumprelu" there, as SAELens saves its own: `codes = relu(h)`
where `h > threshold [F]`, one number for all features.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mikernels._version import __version__
from mikernels.files import check_json, explained, read_json, replacing, write_all
from mikernels.nn import SAE, BatchTopKSAE, TopKSAE
from mikernels.owning import owned
from mikernels.tensor_files import dump_tensors, open_tensors, read_tensors

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
FORMAT_VERSION = "6.54.12"
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def export_sae(
    sae: SAE,
    folder: str | Path,
    *,
    model_name: str | None = None,
    hook_name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write an SAE so that `sae_lens.SAE.load_from_disk(folder)` reads it.

    Codes and reconstructions there are those of `sae`, to rounding. An earlier export in the folder
    is replaced; at any moment the folder holds the old SAE, the new one or no `cfg.json`, never a
    mixture.

    Args:
        sae: the SAE to write, in its own dtype.
        folder: made if missing.
        model_name: the model whose activations it reads, e.g. "gpt2-small".
        hook_name: where in the model, e.g. "blocks.6.hook_resid_post".
        metadata: further JSON-able entries, e.g. `context_size`, `prepend_bos`, `dataset_path`.

    Returns:
        The folder.

    Raises:
        TypeError: sae is of a variant that SAELens has not, or metadata is not JSON-able.
        ValueError: a BatchTopKSAE has no threshold yet.
        FileExistsError: the folder holds an SAE of another's.
        BlockingIOError: another process exports to it.
        OSError: a file cannot be written, e.g. on a full disk; the earlier export stays.
    """
    if not isinstance(sae, TopKSAE | BatchTopKSAE):
        raise TypeError(
            f"export_sae: sae must be a TopKSAE or a BatchTopKSAE, got {type(sae).__name__}"
        )
    by_threshold = isinstance(sae, BatchTopKSAE)
    if isinstance(sae, BatchTopKSAE) and not float(sae.threshold) > 0:
        raise ValueError(
            f"export_sae: threshold must be above 0, got {float(sae.threshold)}; train the SAE"
        )
    n_features, d = sae.w_dec.shape
    config = {
        "d_in": d,
        "d_sae": n_features,
        **({} if by_threshold else {"k": sae.k, "rescale_acts_by_decoder_norm": False}),
        "dtype": str(sae.w_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": FORMAT_VERSION,
            "sae_lens_training_version": None,
            "mikernels_version": __version__,
            **({"batch_topk_k": sae.k} if by_threshold else {}),
            "model_name": model_name,
            "hook_name": hook_name,
            **(metadata or {}),
        },
        "architecture": "jumprelu" if by_threshold else "topk",
    }
    try:
        check_json(config["metadata"], "metadata")
    except (TypeError, ValueError) as error:
        raise type(error)(f"export_sae: metadata must be JSON-able, got {error}") from error
    text = json.dumps(config, indent=1) + "\n"
    weights = {
        "W_enc": sae.w_enc.detach().T.contiguous().cpu(),
        "b_enc": sae.b_enc.detach().contiguous().cpu(),
        "W_dec": sae.w_dec.detach().contiguous().cpu(),
        "b_dec": sae.b_dec.detach().contiguous().cpu(),
    }
    if isinstance(sae, BatchTopKSAE):
        weights["threshold"] = sae.threshold.to(sae.w_dec.dtype).expand(n_features).clone().cpu()
    folder = Path(folder)
    _write(folder, text, weights)
    return folder


def load_sae(folder: str | Path, *, k: float | None = None) -> TopKSAE | BatchTopKSAE:
    """Read a TopK or BatchTopK SAE that SAELens or `export_sae` wrote.

    Its codes and reconstructions are those of the SAE in SAELens, to rounding: the function is
    kept, not the parameters. What SAELens keeps beside the weights is folded into them (see above),
    so `export_sae(load_sae(folder), other)` writes other weights than `folder` holds, with the
    settings of a TopKSAE, for the same codes and reconstructions. Where something has to be folded
    into half-precision weights, the result is float32, so that nothing is lost. An SAE of `hook_z`
    activations takes them with the heads flattened: `[..., heads * d_head]`.

    Args:
        folder: holds `cfg.json` and `sae_weights.safetensors`.
        k: of a BatchTopKSAE in further training; None is that of `export_sae`. SAELens keeps the
            threshold alone, and needs it.

    Returns:
        The SAE on the CPU, with default training settings; the decoder is kept at unit norm in
        further training when it comes with unit norm.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated or foreign, a weight not finite, or the SAE is none of
            these: another architecture, a threshold for every feature, an input normalisation,
            an output scaling. The format has no checksums: a bit that flipped on the disk is seen
            only where it makes such a fault.
    """
    folder = Path(folder)
    path = folder / CONFIG
    config = _read_config(path)
    _check_representable(config, path)
    by_threshold = config["architecture"] == "jumprelu"
    d, n_features = (_positive_int(config, key, path) for key in ("d_in", "d_sae"))
    if by_threshold:
        k = _mean_k(config, k, n_features, path)
    else:
        if k is not None:
            raise ValueError(f"load_sae: k must be None for the TopK SAE of {path}, got {k}")
        k = _positive_int(config, "k", path)
        if k > n_features:
            raise ValueError(f"load_sae: k in {path} must be in 1..{n_features} (d_sae), got {k}")
    dtype = DTYPES.get(str(config.get("dtype", "float32")).removeprefix("torch."))
    if dtype is None:
        raise ValueError(
            f"load_sae: dtype in {path} must be one of {list(DTYPES)}, got {config['dtype']!r}"
        )
    shapes = {
        "W_enc": [d, n_features],
        "b_enc": [n_features],
        "W_dec": [n_features, d],
        "b_dec": [d],
    }
    if by_threshold:
        shapes["threshold"] = [n_features]
    weights = _read_weights(folder / WEIGHTS, shapes)
    threshold = weights.pop("threshold", None)
    sae = _build(config, k, {name: tensor.to(dtype) for name, tensor in weights.items()})
    if threshold is not None and isinstance(sae, BatchTopKSAE):
        if not bool((threshold == threshold[0]).all()) or float(threshold[0]) < 0:
            raise ValueError(
                f"load_sae: threshold in {folder / WEIGHTS} must be one number of at least 0 for "
                f"all features, got {float(threshold.min())} to {float(threshold.max())}; a "
                f"BatchTopKSAE has no other: load it with sae_lens.SAE.load_from_disk"
            )
        sae.threshold.copy_(threshold[0])
    return sae


def _mean_k(config: dict[str, Any], given: float | None, n_features: int, path: Path) -> float:
    metadata = config.get("metadata")
    k = metadata.get("batch_topk_k") if isinstance(metadata, dict) and given is None else given
    if isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k <= n_features:
        raise ValueError(
            f"load_sae: k must be above 0 and at most {n_features} for the BatchTopK SAE of "
            f"{path}, got {k!r}; pass the k that it was trained with"
        )
    return float(k)


def _build(
    config: dict[str, Any], k: Any, weights: dict[str, torch.Tensor]
) -> TopKSAE | BatchTopKSAE:
    rescale = config.get("rescale_acts_by_decoder_norm", False)
    centre = config.get("apply_b_dec_to_input", True)
    dtype = weights["W_dec"].dtype
    if (rescale or not centre) and dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    w_enc, b_enc, w_dec, b_dec = (
        weights[name].to(dtype) for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    if not centre:  # h is the same
        b_enc = (b_enc.double() + b_dec.double() @ w_enc.double()).to(dtype)
    norms = torch.linalg.vector_norm(w_dec, dim=1, dtype=torch.float64)
    if rescale:
        scale = norms.to(dtype)
        w_enc, b_enc = w_enc * scale, b_enc * scale
        w_dec = w_dec / torch.where(scale > 0, scale, 1)[:, None]  # a zero row stays zero
    # 1 % is above every dtype's rounding, and below what an unconstrained decoder shows
    unit = rescale or bool(((norms - 1).abs() < 0.01).all())
    n_features, d = w_dec.shape
    # its own generator: loading leaves the caller's random numbers alone
    variant = BatchTopKSAE if config["architecture"] == "jumprelu" else TopKSAE
    sae = variant(
        d, n_features, k, normalize_decoder=unit, dtype=dtype, generator=torch.Generator()
    )
    with torch.no_grad():
        sae.w_enc.copy_(w_enc.T)
        sae.b_enc.copy_(b_enc)
        sae.w_dec.copy_(w_dec)
        sae.b_dec.copy_(b_dec)
    return sae


def _require(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"load_sae: folder must hold {CONFIG} and {WEIGHTS}, got no {path}; pass the folder "
            f"that SAELens' save_model or export_sae wrote"
        )
    return path


def _damaged(path: Path, expected: str, got: object) -> ValueError:
    return ValueError(
        f"load_sae: {path} must be {expected}, got {got}; it is truncated or of another format: "
        f"copy or export the SAE again"
    )


def _read_config(path: Path) -> dict[str, Any]:
    fix = "it is truncated or of another format: copy or export the SAE again"
    config = read_json(_require(path), "load_sae", "JSON", fix)
    if not isinstance(config, dict):
        raise _damaged(path, "a JSON object", type(config).__name__)
    # before version 6, TopK was an activation function of the "standard" architecture
    if config.get("activation_fn_str", config.get("activation_fn")) == "topk":
        settings = config.get("activation_fn_kwargs")
        k = settings.get("k") if isinstance(settings, dict) else None
        config = {**config, "architecture": "topk", "k": k}
    for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if not isinstance(config.get(name, False), bool):
            raise _damaged(path, f"with {name} true or false", repr(config[name]))
    return config


def _check_representable(config: dict[str, Any], path: Path) -> None:
    architecture = config.get("architecture")
    if architecture not in ("topk", "jumprelu"):
        raise ValueError(
            f"load_sae: architecture in {path} must be 'topk' or 'jumprelu' (BatchTopK), got "
            f"{architecture!r}; load it with sae_lens.SAE.load_from_disk"
        )
    if architecture == "jumprelu" and config.get("rescale_acts_by_decoder_norm"):
        raise _damaged(path, "without rescale_acts_by_decoder_norm", "it with 'jumprelu'")
    normalize = config.get("normalize_activations") or "none"
    if normalize != "none":
        raise ValueError(
            f"load_sae: normalize_activations in {path} must be 'none', got {normalize!r}; fold a "
            f"scaling or whitening with SAELens (fold_activation_norm_scaling_factor, "
            f"fold_activation_whitening) and save again; layer_norm and constant_norm_rescale "
            f"cannot be folded"
        )
    if config.get("finetuning_scaling_factor"):
        raise ValueError(
            f"load_sae: finetuning_scaling_factor in {path} must be false, got true; a TopKSAE has "
            f"no such factor: load it with sae_lens.SAE.load_from_disk"
        )


def _positive_int(config: dict[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"load_sae: {key} in {path} must be a positive integer, got {value!r}; the file is "
            f"incomplete or of another format"
        )
    return value


def _read_weights(path: Path, shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    try:
        # the shapes first: what does not fit is not read
        with open_tensors(_require(path)) as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        weights = read_tensors(path) if found == shapes else {}
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise _damaged(path, "a complete safetensors file", error) from error
    if found != shapes:
        raise ValueError(
            f"load_sae: {path} must hold {shapes} by {CONFIG}, got {found}; the two files are not "
            f"of one TopK SAE: copy or export it again"
        )
    for name, t in weights.items():
        if t.dtype not in DTYPES.values():
            raise _damaged(path, f"with {name} of one of {list(DTYPES)}", t.dtype)
        if bad := int((~t.isfinite()).sum()):
            raise ValueError(
                f"load_sae: {name} in {path} must be finite, got NaN or inf in {bad:,} of "
                f"{t.numel():,} numbers; its training diverged: take an earlier checkpoint"
            )
    return weights


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
