# SPDX-License-Identifier: Apache-2.0
"""Crosscoders: one set of features for several layers (Lindsey et al., Anthropic, 2024).

    codes = BatchTopK((s o x - b_dec) w_enc^T + b_enc),  y = (codes w_dec + b_dec) / s

x holds the layers' activations side by side, `[L d_layer]`; so do the rows of w_enc and w_dec. The
loss is the sum over layers. s is a power of two for every layer, which brings its mean norm near
sqrt(d_layer): layers' norms differ by an order of magnitude, and the largest would be all that is
learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from mikernels.nn.batch_topk_sae import BatchTopKConfig, BatchTopKSAE
from mikernels.nn.config import SAEConfig
from mikernels.nn.sae import SAEOutput
from mikernels.values.batch import Batch, as_batch
from mikernels.values.codes import SparseCodes


def check_layers(config: SAEConfig, n_layers: object, names: tuple[str, ...]) -> None:
    """n_layers is an int that divides the widths, or a TypeError or ValueError."""
    if isinstance(n_layers, bool) or not isinstance(n_layers, int):
        raise TypeError(f"{config.owner}: n_layers must be an int, got {n_layers!r}")
    if n_layers < 1:
        raise ValueError(f"{config.owner}: n_layers must be at least 1, got {n_layers}")
    for name in names:
        if getattr(config, name) % n_layers:
            raise ValueError(
                f"{config.owner}: {name} must be {n_layers} (n_layers) layers of one width, got "
                f"{getattr(config, name)}; layers of different widths do not fit side by side"
            )


@dataclass(frozen=True)
class CrosscoderConfig(BatchTopKConfig):
    """The settings of a Crosscoder; see there."""

    n_layers: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self, self.n_layers, ("d",))

    @classmethod
    def title(cls) -> str:
        return "Crosscoder"


def layer_scales(x: torch.Tensor, n_layers: int) -> torch.Tensor:
    """`[L]` float32: the powers of two that bring layers' mean norms nearest to sqrt(d_layer)."""
    parts = x.reshape(x.shape[0], n_layers, -1)
    mean = torch.linalg.vector_norm(parts, dim=-1, dtype=torch.float64).mean(0)
    ideal = math.sqrt(parts.shape[-1]) / mean
    exponents = torch.log2(ideal).round().clamp(-64, 64)
    return torch.exp2(exponents.where(mean.isfinite() & (mean > 0), 0)).float()


def scaled_layers(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Layers side by side `[..., L d]`, each times its scale `[L]`."""
    layers = x.reshape(*x.shape[:-1], len(scale), x.shape[-1] // len(scale))
    return (layers * scale[:, None].to(x.dtype)).reshape(x.shape)


class Crosscoder(BatchTopKSAE):
    """A BatchTopK crosscoder of several layers.

    Args:
        d, n_features: width of all layers together, number of features.
        k: mean number of active features per token.
        n_layers: L; d is L times the width of a layer.
        settings: as in BatchTopKSAE.

    Attributes:
        w_enc, w_dec: `[F, L d_layer]`; a row of w_dec is kept at norm 1 over all layers.
        layer_scale: `[L]` float32 buffer, s of the equation; taken from the first batch.

    Raises:
        TypeError, ValueError: for settings outside those of SAE, by name.

    Example:
        >>> crosscoder = Crosscoder(3 * 64, 512, 8, n_layers=3)
        >>> crosscoder.layer_norms().shape  # where features live
        torch.Size([512, 3])
    """

    architecture: ClassVar[str] = "crosscoder"
    config_type: ClassVar[Any] = CrosscoderConfig
    config: CrosscoderConfig  # type: ignore[assignment]
    layer_scale: torch.Tensor

    def __init__(self, d: int, n_features: int, k: float, **settings: Any):
        if "n_layers" not in settings:
            raise TypeError("Crosscoder: n_layers must be given, got none; pass n_layers=L")
        super().__init__(d, n_features, k, **settings)
        ones = torch.ones(self.config.n_layers, dtype=torch.float32)
        self.register_buffer("layer_scale", ones)

    @classmethod
    def tensors(cls, config: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        scale = {"layer_scale": ((config.n_layers,), torch.float32)}
        return {**super().tensors(config), **scale}

    def in_units(self, batch: Batch) -> Batch:
        target = None if batch.target is None else scaled_layers(batch.target, self.layer_scale)
        return replace(batch, input=scaled_layers(batch.input, self.layer_scale), target=target)

    def encode(self, x: torch.Tensor, k: float | None = None) -> SparseCodes:
        self._check(x)
        return super().encode(scaled_layers(x, self.layer_scale), k)

    def output(self, codes: SparseCodes) -> torch.Tensor:
        return super().decode(codes)

    def decode(self, codes: SparseCodes) -> torch.Tensor:
        return scaled_layers(self.output(codes), 1 / self.layer_scale)

    def forward(self, x: torch.Tensor | Batch, k: Any = None) -> SAEOutput:
        batch = as_batch(x)
        units = self.in_units(batch)
        if self.training:
            out = self.run(units, k)
        else:
            codes = self.encode(batch.input, k)
            out = self.score(units, codes, self.output(codes))
        return out._replace(reconstruction=scaled_layers(out.reconstruction, 1 / self.layer_scale))

    def layer_norms(self) -> torch.Tensor:
        """`[F, L]`: norms of a feature's decoder in every layer, which tell where it lives."""
        rows = self.w_dec.detach().float().reshape(self.config.n_features, self.config.n_layers, -1)
        return torch.linalg.vector_norm(rows, dim=-1)

    @torch.no_grad()
    def prepare_(self, batch: Batch, init_b_dec: bool) -> None:
        if bool((self.layer_scale == 1).all()) and not self.b_dec.any():
            self.layer_scale.copy_(layer_scales(batch.input, self.config.n_layers))
        super().prepare_(self.in_units(batch), init_b_dec)
