# SPDX-License-Identifier: Apache-2.0
"""The BatchTopK sparse autoencoder (Bussmann et al., arXiv 2412.06410).

    h = (x - b_dec) w_enc^T + b_enc
    in training:   codes = relu(the int(k N) largest entries of h [N, F])
    in use:        codes = h where h > threshold, else 0

k is an average: a token has as many features as it needs. The threshold of use is the running mean
of the smallest activation that a training batch keeps, so tokens do not depend on their batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from mikernels.nn.config import SAEConfig, split_settings
from mikernels.nn.sae import SAE
from mikernels.ops.sae.batch_topk_encode import batch_topk_encode
from mikernels.values.codes import SparseCodes

THRESHOLD_RATE = 0.01


@dataclass(frozen=True)
class BatchTopKConfig(SAEConfig):
    """The settings of a BatchTopKSAE; see there."""

    k: float = field(kw_only=True)
    threshold_rate: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("k", self.n_features), ("threshold_rate", 1)):
            value = getattr(self, name)
            if name == "threshold_rate" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{self.owner}: {name} must be a number, got {value!r}")
            if not 0 < value <= most:
                raise ValueError(
                    f"{self.owner}: {name} must be above 0, at most {most}, got {value}"
                )
        object.__setattr__(self, "k", float(self.k))


class BatchTopKSAE(SAE):
    """A sparse autoencoder with k active features per token on average over a batch.

    Args:
        d, n_features: width of the activations, number of features.
        k: mean number of active features per token, above 0, at most F; it may be fractional.
        threshold_rate: weight of a batch in the running threshold. None is 0.01, as in SAELens, or
            20 / steps of the first Trainer's run if that is more: the mean is over a twentieth of
            the run, where a run of few hundred steps would keep the threshold of its beginning.
        settings: as in SAE.

    Attributes:
        threshold: 0-dim float32 buffer; 0 before the first training batch: every positive
            activation is then kept in use.

    Raises:
        TypeError, ValueError: for settings outside those of SAE, by name.

    Example:
        >>> sae = BatchTopKSAE(64, 512, 8)
        >>> bool(sae.select(torch.randn(100, 64)).l0().sum() <= 800)
        True
    """

    architecture: ClassVar[str] = "batch_topk"
    plain: ClassVar[bool] = True
    config_type: ClassVar[Any] = BatchTopKConfig
    config: BatchTopKConfig
    threshold: torch.Tensor

    def __init__(self, d: int, n_features: int, k: float, **settings: Any):
        form = type(self).config_type
        config, more = split_settings(form, settings)
        super().__init__(form(d, n_features, k=k, **config), **more)
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))

    @classmethod
    def tensors(cls, config: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        return {**super().tensors(config), "threshold": ((), torch.float32)}

    @property
    def rate(self) -> float:
        """The threshold's rate, for an SAE that no Trainer has met too."""
        given = self.config.threshold_rate
        return THRESHOLD_RATE if given is None else given

    def encode(self, x: torch.Tensor, k: float | None = None) -> SparseCodes:
        """The features of every token of x `[..., d]` whose activation is above the threshold.

        Ragged codes of `[n, d]`, else padded to the longest token (one sync). k is not used.

        Raises:
            TypeError, ValueError: for an x that is not floating `[..., d]`.
        """
        return self.above(x, self.threshold)

    def slots(self, x: torch.Tensor, k: float | None = None) -> SparseCodes:
        """The int(k N) strongest features of all N tokens of x `[..., d]` together, ragged."""
        self._check(x)
        codes, _ = batch_topk_encode(
            x.reshape(-1, self.config.d).to(self.w_enc.dtype),
            self.w_enc,
            self.b_enc,
            k=self.config.k if k is None else float(k),
            b_dec=self.b_dec if self.centred else None,
        )
        return codes

    def dense_acts(self, h: torch.Tensor, k: float) -> tuple[torch.Tensor, SparseCodes]:
        """`relu(h)`, `torch.topk` of all its entries and a scatter, as SAE libraries do it."""
        n, f = h.shape
        values, places = h.relu().flatten().topk(int(k * n), sorted=False)
        acts = torch.zeros(n * f, dtype=h.dtype, device=h.device).scatter(0, places, values)
        places, order = places.sort()
        offsets = torch.zeros(n + 1, dtype=torch.int64, device=h.device)
        offsets[1:] = torch.bincount(places // f, minlength=n).cumsum(0)
        return acts.view(n, f), SparseCodes._trusted(values[order], places % f, f, offsets)

    @torch.no_grad()
    def track_(self, codes: SparseCodes) -> None:
        """Count what fired, and average the smallest activation into the threshold."""
        super().track_(codes)
        average_(self.threshold, smallest_active(codes), self.rate)

    @torch.no_grad()
    def rescale_(self, scale: float) -> None:
        super().rescale_(scale)
        self.threshold.mul_(scale)


def smallest_active(codes: SparseCodes) -> torch.Tensor:
    """0-dim float32: the smallest positive activation; inf where there is none."""
    values = codes.values.detach().float()
    if not values.numel():
        return values.new_full((), torch.inf)
    return values.masked_fill(~(values > 0), torch.inf).amin()


def average_(threshold: torch.Tensor, smallest: torch.Tensor, rate: float) -> None:
    """Move a running threshold, 0-dim; 0 takes the first value, and inf says nothing."""
    new = torch.where(threshold > 0, threshold.lerp(smallest, rate), smallest)
    threshold.copy_(torch.where(smallest.isfinite(), new, threshold))
