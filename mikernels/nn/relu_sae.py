# SPDX-License-Identifier: Apache-2.0
"""The ReLU sparse autoencoder with an L1 penalty (Bricken et al., Towards Monosemanticity, 2023).

    h = (x - b_dec) w_enc^T + b_enc,  codes = relu(h)
    sparsity = l1_coefficient sum_f |w_dec[f]| codes_f + l0_coefficient sum_f tanh(l0_scale codes_f)

The number of active features, L0, has no gradient. In its place stands the sum of tanh, which
counts activations well above 1 / l0_scale and falls to 0 with them (a choice of this library: a
loss that adds L0 itself trains as if it were not there).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from mikernels.nn.config import SAEConfig, check_number, split_settings
from mikernels.nn.entries import Entries
from mikernels.nn.sae import SAE
from mikernels.ops.sae.batch_topk_encode import batch_topk_encode
from mikernels.values.batch import Batch
from mikernels.values.codes import SparseCodes


@dataclass(frozen=True)
class ReLUConfig(SAEConfig):
    """The settings of a ReLUSAE; see there."""

    l1_coefficient: float = field(default=1.0, kw_only=True)
    l0_coefficient: float = field(default=0.0, kw_only=True)
    l0_scale: float = field(default=4.0, kw_only=True)
    initial_l0: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("l1_coefficient", "l0_coefficient"):
            check_number(self.owner, name, getattr(self, name), least=0)
        check_number(self.owner, "l0_scale", self.l0_scale, above=0)
        if self.initial_l0 is not None:
            check_number(self.owner, "initial_l0", self.initial_l0, above=0, most=self.n_features)


class ReLUSAE(SAE):
    """A sparse autoencoder with ReLU and an L1 penalty.

    Args:
        d, n_features: width of the activations, number of features.
        l1_coefficient: of the L1 penalty; with a Trainer's scaled activations (mean norm sqrt(d))
            it means the same for every model.
        l0_coefficient, l0_scale: of the tanh penalty in the place of L0.
        initial_l0: training starts with biases that leave so many features active per token on
            average in the first batch; None is min(d / 4, F / 4). A new SAE would have half of
            them active.
        settings: as in SAE.

    Raises:
        TypeError, ValueError: for settings outside those of SAE, by name.

    Example:
        >>> sae = ReLUSAE(64, 512, l1_coefficient=2.0)
        >>> sae.encode(torch.randn(100, 64)).is_ragged
        True
    """

    architecture: ClassVar[str] = "relu"
    config_type: ClassVar[Any] = ReLUConfig
    shaped: ClassVar[bool] = True
    config: ReLUConfig

    def __init__(self, d: int, n_features: int, **settings: Any):
        config, more = split_settings(ReLUConfig, settings)
        super().__init__(ReLUConfig(d, n_features, **config), **more)

    def encode(self, x: torch.Tensor, k: Any = None) -> SparseCodes:
        """The positive pre-activations of every token of x `[..., d]`; k is not used.

        Raises:
            TypeError, ValueError: for an x that is not floating `[..., d]`.
        """
        return self.above(x, torch.zeros((), device=self.b_enc.device))

    def penalty(
        self, h: torch.Tensor, values: torch.Tensor, entries: Entries, norms: torch.Tensor | None
    ) -> torch.Tensor:
        config = self.config
        weighted = values if norms is None else values * entries.of_feature(norms)
        cost = config.l1_coefficient * weighted
        if config.l0_coefficient:
            cost = cost + config.l0_coefficient * torch.tanh(config.l0_scale * values)
        return entries.mean(entries.per_token(cost))

    def activate(self, h: torch.Tensor, entries: Entries) -> torch.Tensor:
        return h.relu()

    @torch.no_grad()
    def prepare_(self, batch: Batch, init_b_dec: bool) -> None:
        super().prepare_(batch, init_b_dec)
        if self.b_enc.requires_grad and not self.b_enc.any():
            self.b_enc.sub_(threshold_of(self, batch, self.config.initial_l0))


@torch.no_grad()
def threshold_of(sae: SAE, batch: Batch, l0: float | None) -> torch.Tensor:
    """0-dim float32: what leaves `l0` features per token of a batch above it, on average.

    None is min(d / 4, F / 4). At least 0.
    """
    f, d = sae.w_enc.shape
    k = min(float(f), max(1.0, min(d, f) / 4) if l0 is None else float(l0))
    _, threshold = batch_topk_encode(
        batch.input.to(sae.w_enc.dtype),
        sae.w_enc,
        sae.b_enc,
        k=k,
        b_dec=sae.b_dec if sae.centred else None,
    )
    return threshold.float().nan_to_num(posinf=0.0).clamp_min(0)
