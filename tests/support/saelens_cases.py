# SPDX-License-Identifier: Apache-2.0
"""SAEs of every variant that SAELens has, files as it writes them, and its equations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from oracle import assert_accurate, randn
from safetensors.torch import save_file

from mikernels.nn import (
    SAE,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    SkipTranscoder,
    TopKSAE,
    Transcoder,
)

D, F, K, D_OUT = 24, 160, 6, 20
WIDTHS = (10, 40, F)

# name -> variant, settings, architecture there
VARIANTS: dict[str, tuple[type[SAE], dict[str, Any], str]] = {
    "topk": (TopKSAE, dict(k=K, k_aux=3), "topk"),
    "batch_topk": (BatchTopKSAE, dict(k=4.5, threshold_rate=0.1), "jumprelu"),
    "matryoshka": (
        MatryoshkaSAE,
        dict(k=4.5, widths=WIDTHS, level_weights=(1, 0.5, 2), aux_by_level=True),
        "jumprelu",
    ),
    "jumprelu": (JumpReLUSAE, dict(target_l0=6, bandwidth=0.2), "jumprelu"),
    "gated": (GatedSAE, dict(l1_coefficient=0.3, frozen_decoder=False), "gated"),
    "relu": (ReLUSAE, dict(l1_coefficient=0.3, loss="fvu"), "standard"),
    "transcoder": (Transcoder, dict(k=4.5, d_out=D_OUT), "jumprelu_transcoder"),
    "skip_transcoder": (SkipTranscoder, dict(k=4.5, d_out=D_OUT), "jumprelu_skip_transcoder"),
    "transcoder, ReLU": (Transcoder, dict(k=F, d_out=D_OUT), "transcoder"),
    "skip_transcoder, ReLU": (SkipTranscoder, dict(k=F), "skip_transcoder"),
}
# architecture -> the variant that a file without metadata becomes
BECOMES: dict[str, type[SAE]] = {
    "topk": TopKSAE,
    "standard": ReLUSAE,
    "gated": GatedSAE,
    "jumprelu": JumpReLUSAE,
    "transcoder": Transcoder,
    "skip_transcoder": SkipTranscoder,
    "jumprelu_transcoder": Transcoder,
    "jumprelu_skip_transcoder": SkipTranscoder,
}
THRESHOLD = 0.75  # of every dtype


def make(name: str, dtype: torch.dtype = torch.float32) -> SAE:
    """Every parameter non-trivial; decoder rows of unit norm where they are kept so."""
    kind, settings, _ = VARIANTS[name]
    sae = kind(D, F, dtype=dtype, generator=torch.Generator().manual_seed(1), **settings)
    scales = {"w_enc": 0.3, "b_enc": 0.2, "r_mag": 0.3, "b_mag": 0.2, "w_skip": 0.3, "b_dec": 1}
    with torch.no_grad():
        for seed, (parameter, scale) in enumerate(scales.items(), start=2):
            if (t := getattr(sae, parameter, None)) is not None:
                t.add_(scale * randn(*t.shape, dtype=dtype, seed=seed))
        if sae.needs_target:
            sae.w_dec.copy_(randn(*sae.w_dec.shape, dtype=dtype, seed=9))
        if isinstance(sae, BatchTopKSAE) and "ReLU" not in name:
            sae.threshold.fill_(THRESHOLD)
        elif isinstance(sae, JumpReLUSAE):
            sae.threshold.copy_(thresholds())
    return sae


def thresholds(seed: int = 8) -> torch.Tensor:
    """`[F]`, of which some are 0."""
    return (0.5 * randn(F, seed=seed) + 0.3).clamp_min(0)


def peer_weights(architecture: str = "topk", seed: int = 5) -> dict[str, torch.Tensor]:
    """In SAELens' names and layout; decoder norms between 0.5 and 2."""
    out = D_OUT if "transcoder" in architecture else D
    norms = torch.linspace(0.5, 2, F)[:, None]
    rows = torch.nn.functional.normalize(randn(F, D, seed=seed), dim=1)
    weights = {
        "W_enc": (rows + 0.3 * randn(F, D, seed=seed + 1)).T.contiguous(),
        "b_enc": 0.2 * randn(F, seed=seed + 2),
        "W_dec": (rows[:, :out] / rows[:, :out].norm(dim=1, keepdim=True)) * norms,
        "b_dec": randn(out, seed=seed + 3),
    }
    if architecture == "gated":
        weights["b_gate"] = weights.pop("b_enc")
        weights["r_mag"] = 0.3 * randn(F, seed=seed + 4)
        weights["b_mag"] = 0.2 * randn(F, seed=seed + 5)
    if architecture == "jumprelu":
        weights["threshold"] = thresholds(seed + 6)
    elif architecture.startswith("jumprelu"):
        weights["threshold"] = torch.full((F,), THRESHOLD)
    if "skip" in architecture:
        weights["W_skip"] = 0.3 * randn(out, D, seed=seed + 7)
    return weights


def peer_config(architecture: str = "topk", **changes: Any) -> dict[str, Any]:
    transcodes = "transcoder" in architecture
    return {
        "d_in": D,
        "d_sae": F,
        **({"d_out": D_OUT} if transcodes else {}),
        **({"k": K, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not transcodes,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12"},
        "architecture": architecture,
    } | changes


def write_peer(
    folder: Path,
    config: dict[str, Any] | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A folder as SAELens writes it, by default with weights of the configuration's kind."""
    config = peer_config() if config is None else config
    known = str(config.get("architecture")) in BECOMES
    weights = weights or peer_weights(config["architecture"] if known else "topk")
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


def claims(trained: str, **details: Any) -> dict[str, Any]:
    """Metadata in which SAELens says what it trained."""
    return {
        "sae_lens_version": "6.54.12",
        "training_architecture": trained,
        "training_architecture_details": details,
    }


def peer_function(
    config: dict[str, Any], weights: dict[str, torch.Tensor], x: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, F] and reconstruction of SAELens' equations, in `dtype`."""
    w = {name: t.to(dtype) for name, t in weights.items()}
    x = x.to(dtype)
    architecture = config["architecture"]
    centred = x - w["b_dec"] if config["apply_b_dec_to_input"] else x
    h = centred @ w["W_enc"] + w["b_gate" if architecture == "gated" else "b_enc"]
    rescaled = config.get("rescale_acts_by_decoder_norm", False)
    scale = w["W_dec"].norm(dim=-1) if rescaled else torch.ones(F, dtype=dtype)
    h = h * scale
    if architecture == "topk":
        top = h.topk(K, dim=-1)
        codes = torch.zeros_like(h).scatter(-1, top.indices, top.values.relu())
    elif architecture == "gated":
        magnitudes = centred @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]
        codes = magnitudes.relu() * (h > 0)
    else:
        codes = h.relu()
        if "threshold" in w:
            codes = codes * (h > w["threshold"])
    y = (codes / scale) @ w["W_dec"] + w["b_dec"]
    return codes, y + x @ w["W_skip"].T if "W_skip" in w else y


def assert_same_function(sae: SAE, wanted, eager, x: torch.Tensor) -> None:
    """Equal selections; codes and reconstructions within `eager`'s own rounding.

    Args:
        wanted, eager: codes and reconstruction of x in fp64, and in the dtype of sae.
    """
    with torch.no_grad():
        codes, y = sae.encode(x).to_dense(), sae.reconstruct(x)
    assert 0 < int((wanted[0] != 0).sum()) < wanted[0].numel()
    assert torch.equal(codes != 0, wanted[0] != 0)
    assert_accurate(codes, wanted[0], eager[0])
    assert_accurate(y, wanted[1], eager[1])
