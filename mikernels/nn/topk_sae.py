# SPDX-License-Identifier: Apache-2.0
"""The TopK sparse autoencoder (Gao et al., arXiv 2406.04093).

codes = relu(top_k((x - b_dec) w_enc^T + b_enc))        the k best features of every token
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from mikernels.nn.config import SAEConfig, split_settings
from mikernels.nn.sae import SAE
from mikernels.ops.sae.encode import topk_encode
from mikernels.values.codes import SparseCodes


@dataclass(frozen=True)
class TopKConfig(SAEConfig):
    """The settings of a TopKSAE; see there."""

    k: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.k, bool) or not isinstance(self.k, int):
            raise TypeError(f"{self.owner}: k must be an int, got {self.k!r}")
        if not 1 <= self.k <= self.n_features:
            raise ValueError(
                f"{self.owner}: k must be in 1..{self.n_features} (n_features), got {self.k}"
            )


class TopKSAE(SAE):
    """A sparse autoencoder with k active features per token.

    Args:
        d, n_features: width of the activations, number of features.
        k: active features per token, 1..F; `forward` and `encode` take another one at run time.
        settings: as in SAE: k_aux, aux_coefficient, dead_after, loss, normalize_decoder, and dtype,
            generator, encoder_scale.

    Raises:
        TypeError, ValueError: for settings outside those of SAE, by name.

    Example:
        >>> sae = TopKSAE(64, 512, 8)
        >>> sae.encode(torch.randn(3, 64)).l0()
        tensor([8, 8, 8])
    """

    architecture: ClassVar[str] = "topk"
    plain: ClassVar[bool] = True
    config_type: ClassVar[Any] = TopKConfig
    config: TopKConfig

    def __init__(self, d: int, n_features: int, k: int, **settings: Any):
        config, more = split_settings(TopKConfig, settings)
        super().__init__(TopKConfig(d, n_features, k=k, **config), **more)

    def encode(self, x: torch.Tensor, k: int | None = None) -> SparseCodes:
        """The k best features of every token of x `[..., d]`; x is taken to the weights' dtype.

        Raises:
            TypeError, ValueError: for an x that is not floating `[..., d]`, or k outside 1..F.
        """
        self._check(x)
        return topk_encode(
            x.to(self.w_enc.dtype),
            self.w_enc,
            self.b_enc,
            k=self.config.k if k is None else k,
            b_dec=self.b_dec if self.centred else None,
        )

    def dense_acts(self, h: torch.Tensor, k: int) -> tuple[torch.Tensor, SparseCodes]:
        """`relu(h)`, `torch.topk` and a scatter into `[n, F]`, as SAE libraries compute it."""
        acts = h.relu()
        values, indices = acts.topk(k, dim=-1, sorted=False)
        codes = SparseCodes._trusted(values, indices, self.config.n_features)
        return torch.zeros_like(acts).scatter(-1, indices, values), codes
