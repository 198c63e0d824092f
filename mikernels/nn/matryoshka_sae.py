# SPDX-License-Identifier: Apache-2.0
"""The Matryoshka BatchTopK sparse autoencoder (Bussmann et al., arXiv 2503.17547).

    y_p = b_dec + sum of values_j w_dec[j] over the active features j < widths[p]
    main loss = sum_p level_weights[p] (mse or fvu of y_p)

Codes are those of a BatchTopKSAE; the nested reconstructions keep general features general, in the
first levels. In training all levels are decoded, compared and differentiated in one pass
(mikernels/ops/sae/decode_levels.py).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from mikernels.nn.batch_topk_sae import BatchTopKConfig, BatchTopKSAE
from mikernels.nn.config import check_number
from mikernels.nn.terms import Levels
from mikernels.ops.sae.decode import sparse_decode
from mikernels.ops.sae.decode_levels import decode_levels
from mikernels.values.codes import SparseCodes


@dataclass(frozen=True)
class MatryoshkaConfig(BatchTopKConfig):
    """The settings of a MatryoshkaSAE; see there."""

    widths: tuple[int, ...] = field(kw_only=True)
    level_weights: tuple[float, ...] | None = field(default=None, kw_only=True)
    detach: bool = field(default=False, kw_only=True)
    by_frequency: bool = field(default=False, kw_only=True)
    frequency_rate: float = field(default=0.01, kw_only=True)
    aux_by_level: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = tuple(self.widths)
        whole = all(isinstance(w, int) and not isinstance(w, bool) for w in widths)
        ascending = whole and all(a < b for a, b in itertools.pairwise((0, *widths)))
        if not widths or not ascending or widths[-1] != self.n_features:
            raise ValueError(
                f"{self.owner}: widths must ascend from above 0 to n_features = "
                f"{self.n_features}, got {list(widths)}; e.g. "
                f"{default_widths(self.n_features, self.k)}"
            )
        if self.k > widths[0]:
            raise ValueError(
                f"{self.owner}: k must be at most the first level's width, {widths[0]}, got "
                f"{self.k:g}; widen that level or lower k"
            )
        object.__setattr__(self, "widths", widths)
        if self.level_weights is not None:
            weights = tuple(self.level_weights)
            if len(weights) != len(widths):
                raise ValueError(
                    f"{self.owner}: level_weights must be {len(widths)} numbers, one for each of "
                    f"widths, got {len(weights)}"
                )
            for weight in weights:
                check_number(self.owner, "level_weights", weight, least=0)
            object.__setattr__(self, "level_weights", weights)
        if self.auxk.residual_gradient:
            raise ValueError(
                f"{self.owner}: aux_form must be one whose residual is a constant, got "
                f"{self.aux_form!r}; nested reconstructions have several"
            )
        check_number(self.owner, "frequency_rate", self.frequency_rate, above=0, most=1)


def default_widths(n_features: int, k: float = 1, levels: int = 5) -> list[int]:
    """Widths that double to F, F / 16, F / 8, ..., F for five levels, of those at least k."""
    return sorted({w for p in range(levels) if (w := n_features >> p) >= max(1, k)})


class MatryoshkaSAE(BatchTopKSAE):
    """A BatchTopK sparse autoencoder whose first features reconstruct by themselves.

    Args:
        d, n_features: width of the activations, number of features.
        k: mean number of active features per token, at most the first level's width.
        widths: features of each level, ascending; the last is n_features. By default F / 16, F / 8,
            F / 4, F / 2 and F, as far as they are at least k.
        level_weights: of the levels in the main loss; None is 1 each, as in SAELens.
        detach: each level trains its own features alone, on what the levels before leave, and the
            last one all of them.
        by_frequency: levels hold the features by how often they fire, most often first, rather
            than by number. frequency_rate: weight of a batch in that running mean.
        aux_by_level: AuxK's dead features reconstruct the residual of their own level (SAELens'
            use_matryoshka_aux_loss), rather than the last one's.
        settings: as in BatchTopKSAE.

    Attributes:
        frequency: `[F]` float32 buffer, the running share of tokens on which a feature fires.

    Raises:
        TypeError, ValueError: for settings outside those of SAE, by name.

    Example:
        >>> sae = MatryoshkaSAE(64, 512, 8, widths=[32, 64, 128, 256, 512])
        >>> [y.shape for y in sae.decode_levels(sae.select(torch.randn(100, 64)))][0]
        torch.Size([100, 64])
    """

    architecture: ClassVar[str] = "matryoshka"
    plain: ClassVar[bool] = False
    config_type: ClassVar[Any] = MatryoshkaConfig
    config: MatryoshkaConfig  # type: ignore[assignment]
    frequency: torch.Tensor
    _widths: torch.Tensor
    _mix: torch.Tensor
    _weights: torch.Tensor

    def __init__(self, d: int, n_features: int, k: float, **settings: Any):
        settings.setdefault("widths", default_widths(n_features, k))
        super().__init__(d, n_features, k, **settings)
        self.register_buffer("frequency", torch.zeros(n_features, dtype=torch.float32))
        # settings as tensors: a step that made them would wait for their way to a GPU
        widths, given = self.config.widths, self.config.level_weights
        weights = torch.tensor(given or (1.0,) * len(widths), dtype=torch.float32)
        if self.config.detach:
            mix = torch.diag(weights)
            mix[:, -1] = weights[-1]
        else:
            mix = weights.expand(len(widths), -1).triu()
        own = {"_widths": torch.tensor(widths), "_mix": mix, "_weights": weights}
        for name, t in own.items():
            self.register_buffer(name, t, persistent=False)

    @classmethod
    def tensors(cls, config: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        return {**super().tensors(config), "frequency": ((config.n_features,), torch.float32)}

    def level_of(self) -> torch.Tensor:
        """`[F]` int64: the first level that a feature belongs to."""
        rank = torch.arange(self.config.n_features, device=self.frequency.device)
        if self.config.by_frequency:
            order = self.frequency.argsort(descending=True, stable=True)
            rank = torch.empty_like(rank).scatter_(0, order, rank)
        return torch.searchsorted(self._widths, rank, right=True)

    def levels(self) -> Levels:
        return Levels(self.level_of(), self._mix, self._weights)

    def decode_levels(self, codes: SparseCodes) -> list[torch.Tensor]:
        """The reconstruction `[..., d]` of each level."""
        return [*self.inner(codes), self.decode(codes)]

    def inner(self, codes: SparseCodes) -> list[torch.Tensor]:
        level = self.level_of()[codes.indices]
        rings = [
            sparse_decode(codes.with_values(codes.values.where(level == p, 0)), self.w_dec)
            for p in range(len(self.config.widths) - 1)
        ]
        rings = [ring.reshape(-1, ring.shape[-1]) for ring in rings]
        return self.nest([*rings, torch.zeros_like(rings[0])])[:-1] if rings else []

    def nest(self, rings: list[torch.Tensor]) -> list[torch.Tensor]:
        if not self.config.detach:
            return super().nest(rings)
        whole = super().nest(rings)
        first, *rest = rings
        inner = [first + self.b_dec]
        for ring in rest:
            inner.append(inner[-1].detach() + ring)
        return [*inner[:-1], whole[-1]]

    def aux_parts(
        self, dead: torch.Tensor, errors: list[torch.Tensor] | torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if not self.config.aux_by_level:
            return super().aux_parts(dead, errors)
        level = self.level_of()[dead]
        parts = [(dead[level == p], errors[p]) for p in range(len(self.config.widths))]
        return [(features, error) for features, error in parts if features.numel()]

    def _decode_levels(
        self,
        codes: SparseCodes,
        target: torch.Tensor,
        levels: Levels,
        dead: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not self.config.aux_by_level or dead is None or not dead.numel():
            return super()._decode_levels(codes, target, levels, dead)
        whole = torch.eye(len(levels.weights), device=levels.mix.device)
        errors, _, squares = decode_levels(
            codes, self.w_dec, self.b_dec, target, levels.of_feature, whole
        )
        mix = levels.mix.to(errors.dtype)
        return torch.einsum("gp,pnd->gnd", mix, errors), errors, squares

    @torch.no_grad()
    def track_(self, codes: SparseCodes) -> None:
        super().track_(codes)
        if self.config.by_frequency:
            share = codes.fired().float() / max(1, codes.shape[0])
            # a running mean that begins with the first batch
            rate = torch.where(self.frequency.any(), self.config.frequency_rate, 1.0)
            self.frequency.lerp_(share, rate)
