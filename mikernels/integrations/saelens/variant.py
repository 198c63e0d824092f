# SPDX-License-Identifier: Apache-2.0
"""Which variant of SAE a file becomes, with which settings.

A file of `export_sae` says so in its metadata. So do those of SAELens' BatchTopK and Matryoshka
SAEs, which it saves as "jumprelu". Such a claim gives settings of training alone: sizes, thresholds
and decoder norms are the file's, which may have been folded and saved again. Any other file becomes
the variant that computes the same and has nothing more to know.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mikernels.integrations.saelens.config import Config, damaged
from mikernels.integrations.saelens.form import ARCHITECTURES, SETTINGS
from mikernels.nn import ARCHITECTURES as VARIANTS
from mikernels.nn import (
    SAE,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    SAEConfig,
    SkipTranscoder,
    TopKSAE,
    Transcoder,
)

# a file that claims nothing
PLAIN: dict[str, type[SAE]] = {
    "topk": TopKSAE,
    "standard": ReLUSAE,
    "jumprelu": JumpReLUSAE,
    "gated": GatedSAE,
    "transcoder": Transcoder,
    "skip_transcoder": SkipTranscoder,
    "jumprelu_transcoder": Transcoder,
    "jumprelu_skip_transcoder": SkipTranscoder,
}


class Claim(NamedTuple):
    """A variant, settings of training, and the field of the metadata that has them."""

    variant: type[SAE]
    settings: dict[str, Any]
    field: str
    fix: str = ""


def settings_of(
    config: Config, threshold: torch.Tensor | None, k: float | None, unit: bool
) -> tuple[type[SAE], SAEConfig]:
    """The variant of a file, and its settings.

    Args:
        threshold: `[F]`, where the architecture has one.
        k: the caller's; None is the file's.
        unit: decoder rows have norm 1.

    Raises:
        ValueError: for a threshold, a k or metadata that the variant cannot have.
    """
    from mikernels.schema import check  # pydantic costs 35 ms

    if k is not None:
        _check_k(config, k)
    claim = _claim(config, k)
    one = threshold is None or bool((threshold == threshold[0]).all())
    if issubclass(claim.variant, BatchTopKSAE) and not one:
        assert threshold is not None
        if k is not None or config.form.transcodes:
            fix = "load it with sae_lens.SAE.load_from_disk"
            raise ValueError(
                f"load_sae: threshold of {config.path.parent} must be one number for all features "
                f"of a {claim.variant.__name__}, got {float(threshold.min())} to "
                f"{float(threshold.max())}; "
                f"{fix if config.form.transcodes else 'leave k out for a JumpReLUSAE'}"
            )
        claim = Claim(JumpReLUSAE, {}, "")  # it was folded since
    variant = claim.variant
    if k is not None and not issubclass(variant, BatchTopKSAE):
        raise ValueError(
            f"load_sae: k must be None for the {variant.__name__} of {config.path}, got {k}"
        )
    settings = {
        **claim.settings,
        "d": config.d,
        "n_features": config.n_features,
        # the first step of further training would bring rows to norm 1
        "normalize_decoder": unit and claim.settings.get("normalize_decoder", True),
    }
    if config.form.transcodes:
        settings["d_out"] = config.d_out
    if k is not None or config.k is not None:
        settings["k"] = config.k if k is None else float(k)
    elif issubclass(variant, Transcoder) and "k" not in settings:
        if threshold is not None and bool(threshold.any()):
            raise ValueError(
                f"load_sae: k must be given for the {variant.__name__} of {config.path}, got None; "
                f"pass the k that it was trained with: further training goes by it, use does not"
            )
        settings["k"] = float(config.n_features)  # ReLU is BatchTopK of all features
    if issubclass(variant, JumpReLUSAE):
        settings.setdefault("sparsity", "step")  # the one without a target
    return variant, check(
        variant.config_type, settings, "load_sae", config.path, claim.fix, claim.field
    )


def _claim(config: Config, k: float | None) -> Claim:
    """What the metadata says that a file is, or what files of its architecture are."""
    own = config.metadata.get(SETTINGS)
    if own is not None:
        kind = own.get("architecture") if isinstance(own, dict) else None
        if not isinstance(kind, str) or config.architecture not in ARCHITECTURES.get(kind, ()):
            raise damaged(
                config.path,
                f"with metadata.{SETTINGS}.architecture of {config.architecture!r}",
                repr(kind),
            )
        settings = {name: value for name, value in own.items() if name != "architecture"}
        fix = "the file was changed, or is a later version's: export the SAE again"
        return Claim(VARIANTS[kind], settings, f"metadata.{SETTINGS}", fix)
    plain = Claim(PLAIN[config.architecture], {}, "")
    if config.architecture != "jumprelu":
        return plain
    if k is not None:
        return Claim(BatchTopKSAE, {}, "")
    trained = config.metadata.get("training_architecture")
    details = config.metadata.get("training_architecture_details")
    if not isinstance(details, dict) or trained not in ("batchtopk", "matryoshka_batchtopk"):
        return plain
    field, fix = "metadata.training_architecture_details", "pass k to load it as a BatchTopKSAE"
    settings = {"k": details.get("k")}
    if trained == "batchtopk":
        return Claim(BatchTopKSAE, settings, field, fix)
    settings["widths"] = details.get("matryoshka_widths")
    return Claim(MatryoshkaSAE, settings, field, fix)


def _check_k(config: Config, k: float) -> None:
    most = config.n_features
    if isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k <= most:
        raise ValueError(
            f"load_sae: k must be above 0 and at most {most} (d_sae of {config.path}), got {k!r}; "
            f"pass the k that it was trained with"
        )
