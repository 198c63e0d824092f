# SPDX-License-Identifier: Apache-2.0
"""Transcoders: sparse codes of what an MLP reads that reconstruct what it writes.

    codes = BatchTopK(x w_enc^T + b_enc)
    y = sum_j values_j w_dec[indices_j] + b_dec  (+ x w_skip^T)   compared with the target t

(Dunefsky et al., arXiv 2406.11944; the skip connection of Paulo et al., arXiv 2501.18823.) The
encoder reads x as it is, since b_dec is of the output's space. The decoder starts at 0, as in
sparsify, and is not kept at norm 1 unless told so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from mikernels.nn.batch_topk_sae import BatchTopKConfig, BatchTopKSAE
from mikernels.nn.sae import unit_rows


@dataclass(frozen=True)
class TranscoderConfig(BatchTopKConfig):
    """The settings of a Transcoder; see there."""

    d_out: int | None = field(default=None, kw_only=True)  # type: ignore[assignment]
    normalize_decoder: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.d_out is None:
            object.__setattr__(self, "d_out", self.d)
        if isinstance(self.d_out, bool) or not isinstance(self.d_out, int):
            raise TypeError(f"{self.owner}: d_out must be an int, got {self.d_out!r}")
        if self.d_out < 1:
            raise ValueError(f"{self.owner}: d_out must be at least 1, got {self.d_out}")
        super().__post_init__()

    @classmethod
    def title(cls) -> str:
        return cls.__name__.replace("Config", "")


class SkipTranscoderConfig(TranscoderConfig):
    """The settings of a SkipTranscoder; see there."""


class Transcoder(BatchTopKSAE):
    """A BatchTopK transcoder. It is trained on batches with a target.

    Args:
        d, n_features: width of the input, number of features.
        k: mean number of active features per token.
        d_out: width of the target; None is d.
        settings: as in BatchTopKSAE.

    Attributes:
        w_enc: `[F, d]`. w_dec: `[F, d_out]`. b_dec: `[d_out]`.

    Raises:
        TypeError, ValueError: for settings outside those of SAE, by name; from `forward` and a
            Trainer for a batch without a target.

    Example:
        >>> transcoder = Transcoder(64, 512, 8)
        >>> mlp_in, mlp_out = torch.randn(2, 100, 64)
        >>> transcoder(Batch(mlp_in, mlp_out)).reconstruction.shape
        torch.Size([100, 64])
    """

    architecture: ClassVar[str] = "transcoder"
    config_type: ClassVar[Any] = TranscoderConfig
    centred: ClassVar[bool] = False
    needs_target: ClassVar[bool] = True
    config: TranscoderConfig  # type: ignore[assignment]

    def _make_weights(
        self, dtype: torch.dtype, generator: torch.Generator | None, encoder_scale: float
    ) -> None:
        config = self.config
        f, d, d_out = config.n_features, config.d, int(config.d_out or config.d)
        if config.normalize_decoder:
            self.w_dec = nn.Parameter(unit_rows(f, d_out, dtype, generator))
        else:
            self.w_dec = nn.Parameter(torch.zeros(f, d_out, dtype=dtype))
        self.w_enc = nn.Parameter(unit_rows(f, d, dtype, generator) * encoder_scale)
        self.b_enc = nn.Parameter(torch.zeros(f, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d_out, dtype=dtype))


class SkipTranscoder(Transcoder):
    """A transcoder with a linear connection past its features.

    Args:
        d, n_features, k, d_out, settings: as in Transcoder.

    Attributes:
        w_skip: `[d_out, d]`, starts at 0.

    Raises:
        TypeError, ValueError: as in Transcoder.

    Example:
        >>> transcoder = SkipTranscoder(64, 512, 8)
        >>> transcoder.w_skip.shape
        torch.Size([64, 64])
    """

    architecture: ClassVar[str] = "skip_transcoder"
    plain: ClassVar[bool] = False
    config_type: ClassVar[Any] = SkipTranscoderConfig

    def __init__(self, d: int, n_features: int, k: float, **settings: Any):
        super().__init__(d, n_features, k, **settings)
        shape = self.b_dec.shape[0], d
        self.w_skip = nn.Parameter(torch.zeros(shape, dtype=self.w_dec.dtype))

    @classmethod
    def tensors(cls, config: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        return {**super().tensors(config), "w_skip": ((config.d_out, config.d), None)}

    def past_codes(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.w_skip.dtype) @ self.w_skip.T

    def past_gradients(self, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"w_skip": dy.T @ x.to(self.w_skip.dtype).to(dy.dtype)}
