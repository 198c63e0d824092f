# SPDX-License-Identifier: Apache-2.0
"""The Gated sparse autoencoder (Rajamanoharan et al., arXiv 2404.16014).

    s = (x - b_dec) w_enc^T,  pi = s + b_enc                      the gate
    codes = relu(s exp(r_mag) + b_mag) where pi > 0, else 0       the magnitude
    sparsity = l1_coefficient sum_f |w_dec[f]| relu(pi_f) + |relu(pi) w_dec + b_dec - t|^2

The second part trains the gate to reconstruct the target t by itself. In the paper w_dec and b_dec
are constants there; SAELens 6.54 lets them learn from it (`frozen_decoder=False`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from mikernels._dispatch import accumulate_dtype
from mikernels.nn import losses
from mikernels.nn.config import SAEConfig, check_number, split_settings
from mikernels.nn.entries import Entries
from mikernels.nn.relu_sae import threshold_of
from mikernels.nn.sae import SAE
from mikernels.nn.terms import Term
from mikernels.ops.sae.decode import decode_error, sparse_decode
from mikernels.values.batch import Batch
from mikernels.values.codes import SparseCodes


@dataclass(frozen=True)
class GatedConfig(SAEConfig):
    """The settings of a GatedSAE; see there."""

    l1_coefficient: float = field(default=1.0, kw_only=True)
    frozen_decoder: bool = field(default=True, kw_only=True)
    initial_l0: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.owner, "l1_coefficient", self.l1_coefficient, least=0)
        if not isinstance(self.frozen_decoder, bool):
            raise TypeError(
                f"{self.owner}: frozen_decoder must be True or False, got {self.frozen_decoder!r}"
            )
        if self.initial_l0 is not None:
            check_number(self.owner, "initial_l0", self.initial_l0, above=0, most=self.n_features)


class GatedSAE(SAE):
    """A sparse autoencoder whose gate decides which features are active, not how strongly.

    Args:
        d, n_features: width of the activations, number of features.
        l1_coefficient: of the penalty on the gate.
        frozen_decoder: the gate's own reconstruction has a constant decoder.
        initial_l0: training starts with biases that leave so many features active per token on
            average in the first batch; None is min(d / 4, F / 4). A new SAE would have half of
            them active.
        settings: as in SAE.

    Attributes:
        b_enc: `[F]`, the gate's bias. r_mag, b_mag: `[F]`, log-scale and bias of the magnitudes.

    Raises:
        TypeError, ValueError: for settings outside those of SAE, by name.

    Example:
        >>> sae = GatedSAE(64, 512, l1_coefficient=2.0)
        >>> sae.encode(torch.randn(100, 64)).l0().shape
        torch.Size([100])
    """

    architecture: ClassVar[str] = "gated"
    config_type: ClassVar[Any] = GatedConfig
    shaped: ClassVar[bool] = True
    config: GatedConfig

    def __init__(self, d: int, n_features: int, **settings: Any):
        config, more = split_settings(GatedConfig, settings)
        super().__init__(GatedConfig(d, n_features, **config), **more)
        self.r_mag = nn.Parameter(torch.zeros_like(self.b_enc))
        self.b_mag = nn.Parameter(torch.zeros_like(self.b_enc))

    @classmethod
    def tensors(cls, config: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        f = config.n_features
        return {**super().tensors(config), "r_mag": ((f,), None), "b_mag": ((f,), None)}

    def encode(self, x: torch.Tensor, k: Any = None) -> SparseCodes:
        """The magnitudes of the open gates, of every token of x `[..., d]`; k is not used.

        Raises:
            TypeError, ValueError: for an x that is not floating `[..., d]`.
        """
        slots = self.slots(x)
        return self._activated(slots, Entries(slots))

    def slots(self, x: torch.Tensor, k: Any = None) -> SparseCodes:
        return self.above(x, torch.zeros((), device=self.b_enc.device), wide=True)

    def activate(self, h: torch.Tensor, entries: Entries) -> torch.Tensor:
        # a matrix has closed gates, padded codes slots of none
        is_open = (h > 0).to(h.dtype)
        s = h - entries.of_feature(self.b_enc).to(h.dtype)
        scale = entries.of_feature(self.r_mag).to(h.dtype).exp()
        return (s * scale + entries.of_feature(self.b_mag).to(h.dtype)).relu() * is_open

    def penalty(
        self, h: torch.Tensor, values: torch.Tensor, entries: Entries, norms: torch.Tensor | None
    ) -> torch.Tensor:
        gate = h.relu()
        gate = gate if norms is None else gate * entries.of_feature(norms)
        return self.config.l1_coefficient * entries.mean(entries.per_token(gate))

    def extra_loss(self, slots: SparseCodes, batch: Batch) -> torch.Tensor:
        return self._gate_loss(sparse_decode(self._gate(slots), *self._gate_decoder()), batch)

    def dense_extra_loss(self, h: torch.Tensor, batch: Batch) -> torch.Tensor:
        w_dec, b_dec = self._gate_decoder()
        return self._gate_loss(h.relu() @ w_dec + b_dec, batch)

    def _gate_decoder(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.frozen_decoder:
            return self.w_dec.detach(), self.b_dec.detach()
        return self.w_dec, self.b_dec

    def _gate(self, slots: SparseCodes) -> SparseCodes:
        return slots.with_values(slots.values.relu().to(self.w_dec.dtype))

    def _gate_loss(self, y: torch.Tensor, batch: Batch) -> torch.Tensor:
        acc = accumulate_dtype(y.dtype)
        squares = (y.to(acc) - batch.output.reshape(y.shape).to(acc)).square().sum(-1)
        return self.sparsity_share * Entries(None, batch.weights).mean(squares)

    def extra_gradient(
        self, slots: SparseCodes, batch: Batch, share: float | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], list[Term]]:
        gate = self._gate(slots)
        error, squares = decode_error(gate, self.w_dec, self.b_dec, batch.output)
        value = self.sparsity_share * Entries(None, batch.weights).mean(squares)
        measure = losses.Measure(batch.count, squares.new_ones(()))
        factor = share * (2 * self.sparsity_share * losses.per_square("mse", measure))
        dy = error.mul_(factor if batch.weights is None else (factor * batch.weights)[:, None])
        d_gate = self._dots(gate, dy[None], None).masked_fill_(gate.values == 0, 0)
        if self.config.frozen_decoder:
            return value, d_gate, {}, []
        term = Term(gate, dy, dy, torch.zeros_like(d_gate))
        return value, d_gate, {"b_dec": dy.sum(0)}, [term]

    @torch.no_grad()
    def prepare_(self, batch: Batch, init_b_dec: bool) -> None:
        super().prepare_(batch, init_b_dec)
        if self.b_enc.requires_grad and not self.b_enc.any():
            self.b_enc.sub_(threshold_of(self, batch, self.config.initial_l0))

    @torch.no_grad()
    def rescale_(self, scale: float) -> None:
        super().rescale_(scale)
        self.b_mag.mul_(scale)
