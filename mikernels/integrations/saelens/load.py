# SPDX-License-Identifier: Apache-2.0
"""An SAE read from SAELens' format."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from mikernels.integrations.saelens.config import Config, damaged, read_config, require
from mikernels.integrations.saelens.fold import folded
from mikernels.integrations.saelens.form import CONFIG, DTYPES, SETTINGS, WEIGHTS
from mikernels.integrations.saelens.variant import settings_of
from mikernels.nn import SAE, BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE
from mikernels.tensor_files import open_tensors, read_tensors


def load_sae(folder: str | Path, *, k: float | None = None) -> SAE:
    """Read an SAE or transcoder that SAELens or `export_sae` wrote.

    Its codes and reconstructions are those of the SAE in SAELens, to rounding: the function is
    kept, not the parameters. What SAELens keeps beside the weights is folded into them (see above),
    so `export_sae(load_sae(folder), other)` writes other weights than `folder` holds for the same
    codes and reconstructions. Where something has to be folded into half-precision weights, the
    result is float32, so that nothing is lost. An SAE of `hook_z` activations takes them with the
    heads flattened: `[..., heads * d_head]`.

    Args:
        folder: holds `cfg.json` and `sae_weights.safetensors`.
        k: of a BatchTopKSAE, MatryoshkaSAE or transcoder in further training; None is that of the
            file. A "jumprelu" file that does not say what it was becomes a BatchTopKSAE with it,
            and without it a JumpReLUSAE, which computes the same.

    Returns:
        The SAE on the CPU: the variant and the training settings that `export_sae` wrote. A file of
        SAELens becomes what the table above says, with default settings; BatchTopK and Matryoshka
        SAEs with its k and widths, a JumpReLUSAE with `sparsity="step"`. The decoder is kept at
        unit norm in further training only when it comes with unit norm. Negative thresholds of a
        JumpReLU SAE, which an optimiser's last step may leave, are 0: there as here no feature is
        active below 0.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated or foreign, a weight not finite, or the SAE is none of
            these: another architecture, an input normalisation, an output scaling, a transcoder
            with several thresholds, or one with a threshold but no k. The format has no checksums:
            a bit that flipped on the disk is seen only where it makes such a fault.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    weights = _read_weights(config, folder / WEIGHTS)
    tensors = folded(config, weights)
    threshold = tensors.pop("threshold", None)
    norms = torch.linalg.vector_norm(tensors["w_dec"], dim=1, dtype=torch.float64)
    # 1 % is above every dtype's rounding, and below what an unconstrained decoder shows
    unit = config.rescaled or bool(((norms - 1).abs() < 0.01).all())
    variant, settings = settings_of(config, threshold, k, unit)
    dtype = tensors["w_dec"].dtype
    # its own generator: loading leaves the caller's random numbers alone
    sae = variant.of(settings, dtype=dtype, generator=torch.Generator())
    with torch.no_grad():
        for name, t in tensors.items():
            getattr(sae, name).copy_(t)
        if threshold is not None:
            _set_threshold(sae, threshold, config, folder / WEIGHTS)
    if isinstance(sae, MatryoshkaSAE) and sae.config.by_frequency:
        warnings.warn(
            f"load_sae: {config.path} holds no frequencies of features, by which this SAE's levels "
            f"go: they are by number until further training has counted",
            stacklevel=2,
        )
    return sae


def _set_threshold(sae: SAE, threshold: torch.Tensor, config: Config, path: Path) -> None:
    allowed = isinstance(sae, JumpReLUSAE) and SETTINGS not in config.metadata
    if not allowed and bool((threshold < 0).any()):
        raise ValueError(
            f"load_sae: threshold in {path} must be at least 0, got {float(threshold.min())}; "
            f"neither training nor export_sae gives such a one: copy or export the SAE again"
        )
    if isinstance(sae, BatchTopKSAE):
        sae.threshold.copy_(threshold[0])
    else:
        assert isinstance(sae, JumpReLUSAE)
        sae.threshold.copy_(threshold.clamp_min(0))


def _read_weights(config: Config, path: Path) -> dict[str, torch.Tensor]:
    shapes = config.form.shapes(config.d, config.n_features, config.d_out)
    # files of the first versions have one, of ones
    former = {"scaling_factor": [config.n_features]}
    try:
        # the shapes first: what does not fit is not read
        with open_tensors(require(path)) as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        fits = found in (shapes, {**shapes, **former})
        weights = read_tensors(path) if fits else {}
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise damaged(path, "a complete safetensors file", error) from error
    if not fits:
        raise ValueError(
            f"load_sae: {path} must hold {shapes} by {CONFIG}, got {found}; the two files are not "
            f"of one SAE: copy or export it again"
        )
    for name, t in weights.items():
        if t.dtype not in DTYPES.values():
            raise damaged(path, f"with {name} of one of {list(DTYPES)}", t.dtype)
        if bad := int((~t.isfinite()).sum()):
            raise ValueError(
                f"load_sae: {name} in {path} must be finite, got NaN or inf in {bad:,} of "
                f"{t.numel():,} numbers; its training diverged: take an earlier checkpoint"
            )
    ones = weights.pop("scaling_factor", None)
    if ones is not None and not bool((ones == 1).all()):
        raise ValueError(
            f"load_sae: scaling_factor in {path} must be 1 for every feature, got "
            f"{float(ones.min())} to {float(ones.max())}; fold it into W_dec, or load the SAE with "
            f"sae_lens.SAE.load_from_disk"
        )
    return weights
