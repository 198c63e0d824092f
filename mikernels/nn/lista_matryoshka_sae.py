# SPDX-License-Identifier: Apache-2.0
"""Matryoshka with a LISTA encoder (Chanin, Letting Claude do autonomous research to improve SAEs).

    x_0 = x - b_dec,  a_t = BatchTopK(x_t w_enc^T + b_enc),  x_{t+1} = x_t + eta (x_0 - a_t w_dec)

The codes are a_T. The encoder sees again what its first answer left unexplained: a step of learned
iterative shrinkage (LISTA, Gregor and LeCun, 2010), with the encoder's own weights, so that each
iteration is an encode of another input. With levels by frequency, detached, and k that decreases
over the run (`TrainConfig.k_start`) it was published as the best on SynthSAEBench-16k (F1 0.97,
BatchTopK 0.88). The tilted loss of that recipe is left out: its tilt of 0.002 moves no token's
weight by more than about a hundredth.

In use every iteration has a threshold of its own, as a BatchTopKSAE has one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from mikernels.nn.batch_topk_sae import average_, smallest_active
from mikernels.nn.config import check_number
from mikernels.nn.matryoshka_sae import MatryoshkaConfig, MatryoshkaSAE
from mikernels.nn.sae import in_shape_of
from mikernels.nn.terms import Term, Terms, Workspace
from mikernels.ops.sae.batch_topk_encode import batch_topk_encode
from mikernels.ops.sae.decode import sparse_decode
from mikernels.ops.sae.threshold_encode import slots_above
from mikernels.values.batch import Batch
from mikernels.values.codes import SparseCodes


@dataclass(frozen=True)
class LISTAMatryoshkaConfig(MatryoshkaConfig):
    """The settings of a LISTAMatryoshkaSAE; see there."""

    iterations: int = field(default=1, kw_only=True)
    eta: float = field(default=0.3, kw_only=True)
    detach: bool = field(default=True, kw_only=True)
    by_frequency: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int):
            raise TypeError(f"{self.owner}: iterations must be an int, got {self.iterations!r}")
        if self.iterations < 1:
            raise ValueError(
                f"{self.owner}: iterations must be at least 1, got {self.iterations}; without any "
                f"it is a MatryoshkaSAE"
            )
        check_number(self.owner, "eta", self.eta, above=0)


class LISTAMatryoshkaSAE(MatryoshkaSAE):
    """A Matryoshka SAE that encodes again what its first codes leave.

    Args:
        d, n_features, k: as in MatryoshkaSAE.
        iterations: T, further encodes per token; each costs an encode. eta: the step's length.
        settings: as in MatryoshkaSAE, detached and by frequency unless told otherwise.

    Attributes:
        earlier_thresholds: `[T]` float32 buffer, of all iterations but the last (`threshold`).

    Raises:
        TypeError, ValueError: for settings outside those of SAE, by name.

    Example:
        >>> sae = LISTAMatryoshkaSAE(64, 512, 8, widths=[64, 256, 512])
        >>> sae.select(torch.randn(100, 64)).n_features
        512
    """

    architecture: ClassVar[str] = "lista_matryoshka"
    config_type: ClassVar[Any] = LISTAMatryoshkaConfig
    config: LISTAMatryoshkaConfig  # type: ignore[assignment]
    earlier_thresholds: torch.Tensor

    def __init__(self, d: int, n_features: int, k: float, **settings: Any):
        super().__init__(d, n_features, k, **settings)
        earlier = torch.zeros(self.config.iterations, dtype=torch.float32)
        self.register_buffer("earlier_thresholds", earlier)
        self._smallest: list[torch.Tensor] = []

    @classmethod
    def tensors(cls, config: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        earlier = {"earlier_thresholds": ((config.iterations,), torch.float32)}
        return {**super().tensors(config), **earlier}

    def encode(self, x: torch.Tensor, k: float | None = None) -> SparseCodes:
        """The features of every token of x `[..., d]` above the last threshold, after T steps.

        Ragged codes of `[n, d]`, else padded to the longest token (one sync). k is not used.

        Raises:
            TypeError, ValueError: for an x that is not floating `[..., d]`.
        """
        self._check(x)
        start = x.reshape(-1, x.shape[-1]).to(self.w_enc.dtype) - self.b_dec
        current = start
        thresholds = [*self.earlier_thresholds, self.threshold]
        for number, threshold in enumerate(thresholds):
            codes = slots_above(current, self.w_enc, self.b_enc, None, threshold)
            if number < self.config.iterations:
                current = self._refined(current, start, sparse_decode(codes, self.w_dec))
        return in_shape_of(codes, x)

    def _refined(self, current: torch.Tensor, start: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return current + self.config.eta * (start - y)

    def _iterate(
        self, x: torch.Tensor, k: float | None
    ) -> tuple[list[torch.Tensor], list[SparseCodes]]:
        """x_t and a_t of all iterations."""
        k = self.config.k if k is None else float(k)
        start = x.reshape(-1, x.shape[-1]).to(self.w_enc.dtype) - self.b_dec
        inputs, found = [start], []
        self._smallest = []
        for number in range(self.config.iterations + 1):
            codes, _ = batch_topk_encode(inputs[-1], self.w_enc, self.b_enc, k=k)
            found.append(codes)
            if number < self.config.iterations:
                self._smallest.append(smallest_active(codes))
                y = sparse_decode(codes, self.w_dec)
                inputs.append(self._refined(inputs[-1], start, y))
        return inputs, found

    def slots(self, x: torch.Tensor, k: float | None = None) -> SparseCodes:
        self._check(x)
        return self._iterate(x, k)[1][-1]

    def dense_encode(
        self, x: torch.Tensor, k: Any
    ) -> tuple[torch.Tensor, torch.Tensor, SparseCodes]:
        start = current = x - self.b_dec
        first, self._smallest = None, []
        for number in range(self.config.iterations + 1):
            h = torch.addmm(self.b_enc, current, self.w_enc.T)
            first = h if first is None else first
            acts, codes = self.dense_acts(h, k)
            if number < self.config.iterations:
                self._smallest.append(smallest_active(codes))
                current = self._refined(current, start, acts @ self.w_dec)
        assert first is not None
        return first, acts, codes

    @torch.no_grad()
    def terms(
        self,
        batch: Batch,
        k: Any,
        dead: torch.Tensor | None,
        share: float | torch.Tensor,
        work: Workspace,
        slots: SparseCodes | None = None,
    ) -> Terms:
        if slots is not None:
            return super().terms(batch, k, dead, share, work, slots)
        with work.part("encode"):
            inputs, found = self._iterate(batch.input, k)
        whole = super().terms(batch, k, dead, share, work, found[-1])
        main, *others = whole.terms
        # the codes' gradient, and from there what reaches the inputs of the iterations before
        eta, acc = self.config.eta, batch.input.dtype
        levels = self.levels()
        with work.part("gradients"):
            dh = self._dots(found[-1], main.dy, levels)
            dh = dh.masked_fill_(found[-1].values == 0, 0)
        terms = [main._replace(x=inputs[-1].to(acc), dh=dh)]
        direct = dict(whole.direct)
        w_enc = self.w_enc.to(acc)
        later = torch.zeros_like(batch.input)
        for t in range(self.config.iterations, 0, -1):
            with work.part("gradients"):
                # d loss / d x_t, of which x_0 has eta more in each iteration after the first
                from_codes = sparse_decode(found[t].with_values(dh), w_enc)
                later = later + from_codes
                direct["b_dec"] = direct["b_dec"] - eta * later.sum(0)
                dy = -eta * later
                codes = found[t - 1]
                dh = self._dots(codes, dy[None], None).masked_fill_(codes.values == 0, 0)
            terms.append(Term(codes, dy, inputs[t - 1].to(acc), dh))
        return whole._replace(terms=[*terms, *others], direct=direct)

    @torch.no_grad()
    def track_(self, codes: SparseCodes) -> None:
        """Count what fired, and average the smallest activations into the thresholds."""
        super().track_(codes)
        for number, smallest in enumerate(self._smallest):
            average_(self.earlier_thresholds[number], smallest, self.rate)

    @torch.no_grad()
    def rescale_(self, scale: float) -> None:
        super().rescale_(scale)
        self.earlier_thresholds.mul_(scale)
