# SPDX-License-Identifier: Apache-2.0
"""The JumpReLU sparse autoencoder (Rajamanoharan et al., arXiv 2407.14435).

    h = (x - b_dec) w_enc^T + b_enc,  codes = h where h > theta, else 0
    L0 = sum_f 1[h_f > theta_f]
    "step":       sparsity = c L0                                      (arXiv 2407.14435)
    "quadratic":  sparsity = c 2 / target_l0 (L0 - target_l0)^2        (Gemma Scope 2)
    "tanh":       sparsity = c sum_f tanh(tanh_scale |w_dec[f]| codes_f)      (Anthropic, 2025)

theta has a straight-through gradient, from pairs within bandwidth / 2 of it (mikernels/ops/sae/
jump.py). The forms are those of SAELens 6.54, whose files are written and read.
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
from mikernels.nn.sae import SAE, Parts, SAEOutput
from mikernels.nn.terms import DeadRows, Terms, Workspace
from mikernels.ops.sae.jump import jump, jump_floor, step_above
from mikernels.values.batch import Batch
from mikernels.values.codes import SparseCodes

MODES = ("step", "quadratic", "tanh")
# pre-activations of dead features in memory at a time
PAIRS = 1 << 22


@dataclass(frozen=True)
class JumpReLUConfig(SAEConfig):
    """The settings of a JumpReLUSAE; see there."""

    target_l0: float | None = field(default=None, kw_only=True)
    sparsity: str = field(default="quadratic", kw_only=True)
    l0_coefficient: float = field(default=1.0, kw_only=True)
    bandwidth: float = field(default=0.05, kw_only=True)
    tanh_scale: float = field(default=4.0, kw_only=True)
    ste_to_input: bool = field(default=False, kw_only=True)
    pre_act_coefficient: float = field(default=0.0, kw_only=True)
    initial_l0: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity not in MODES:
            raise ValueError(
                f"{self.owner}: sparsity must be one of {list(MODES)}, got {self.sparsity!r}"
            )
        for name in ("l0_coefficient", "pre_act_coefficient"):
            check_number(self.owner, name, getattr(self, name), least=0)
        for name in ("bandwidth", "tanh_scale"):
            check_number(self.owner, name, getattr(self, name), above=0)
        for name in ("target_l0", "initial_l0"):
            if getattr(self, name) is not None:
                check_number(self.owner, name, getattr(self, name), above=0, most=self.n_features)
        if self.sparsity == "quadratic" and self.target_l0 is None:
            raise ValueError(
                f"{self.owner}: target_l0 must be a number with sparsity='quadratic', got None; "
                f"pass the mean number of active features per token to aim at"
            )
        if not isinstance(self.ste_to_input, bool):
            raise TypeError(
                f"{self.owner}: ste_to_input must be True or False, got {self.ste_to_input!r}"
            )


class JumpReLUSAE(SAE):
    """A sparse autoencoder with a learned threshold for every feature.

    Args:
        d, n_features: width of the activations, number of features.
        target_l0: active features per token that "quadratic" aims at.
        sparsity: "quadratic", "step" or "tanh"; see the equations above.
        l0_coefficient: c.
        bandwidth: width around a threshold in which the estimators see it, in the unit of
            pre-activations (a Trainer's, with scaled activations).
        tanh_scale: of "tanh".
        ste_to_input: the estimators also reach the encoder (Anthropic), not the threshold alone
            (DeepMind).
        pre_act_coefficient: of `sum |w_dec[f]| relu(theta_f - h_f)` over dead features (Anthropic).
        initial_l0: training starts at a threshold that leaves so many features active per token on
            average in the first batch; None is min(4 target_l0, F / 4), or min(d / 4, F / 4)
            without a target. A new SAE would have half of them active.
        settings: as in SAE.

    Attributes:
        threshold: `[F]` float32 parameter, at least 0 after every step.

    Raises:
        TypeError, ValueError: for settings outside those of SAE, by name.

    Example:
        >>> sae = JumpReLUSAE(64, 512, target_l0=32)
        >>> sae.encode(torch.randn(100, 64)).l0().shape
        torch.Size([100])
    """

    architecture: ClassVar[str] = "jumprelu"
    config_type: ClassVar[Any] = JumpReLUConfig
    shaped: ClassVar[bool] = True
    config: JumpReLUConfig

    def __init__(self, d: int, n_features: int, target_l0: float | None = None, **settings: Any):
        config, more = split_settings(JumpReLUConfig, settings)
        super().__init__(JumpReLUConfig(d, n_features, target_l0=target_l0, **config), **more)
        self.threshold = nn.Parameter(torch.zeros(n_features, dtype=torch.float32))

    @classmethod
    def tensors(cls, config: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        return {**super().tensors(config), "threshold": ((config.n_features,), torch.float32)}

    def _apply(self, fn: Any, recurse: bool = True) -> JumpReLUSAE:
        # a step of Adam on a threshold of 1 would round away in bfloat16
        exact = self.threshold.data
        super()._apply(fn, recurse)
        self.threshold.data = exact.to(self.threshold.device)
        return self

    def encode(self, x: torch.Tensor, k: Any = None) -> SparseCodes:
        """The pre-activations above their thresholds, of every token of x `[..., d]`.

        Ragged codes of `[n, d]`, else padded to the longest token (one sync). k is not used.

        Raises:
            TypeError, ValueError: for an x that is not floating `[..., d]`.
        """
        self.check_threshold()
        return self.above(x, self.threshold)

    def check_threshold(self) -> None:
        """No threshold is negative or NaN, or a ValueError; a GPU is not asked."""
        t = self.threshold.detach()
        if t.device.type == "cpu" and not bool((t >= 0).all()):
            bad = (~(t >= 0)).nonzero().squeeze(-1)
            raise ValueError(
                f"{self.name}: threshold must be at least 0, got {float(t[bad[0]])} for feature "
                f"{int(bad[0])} ({bad.numel()} in all); clamp it: sae.project_()"
            )

    def slots(self, x: torch.Tensor, k: Any = None) -> SparseCodes:
        self.check_threshold()
        floor = jump_floor(self.threshold.detach(), bandwidth=self.config.bandwidth)
        return self.above(x, floor, wide=True)

    def activate(self, h: torch.Tensor, entries: Entries) -> torch.Tensor:
        theta = entries.of_feature(self.threshold).to(h.dtype)
        to_input = "both" if self.config.ste_to_input else "gated"
        return jump(h, theta, bandwidth=self.config.bandwidth, input_gradient=to_input)

    def penalty(
        self, h: torch.Tensor, values: torch.Tensor, entries: Entries, norms: torch.Tensor | None
    ) -> torch.Tensor:
        config = self.config
        if config.sparsity == "tanh":
            weighted = values if norms is None else values * entries.of_feature(norms)
            counted = torch.tanh(config.tanh_scale * weighted)
        else:
            theta = entries.of_feature(self.threshold).to(h.dtype)
            counted = step_above(h, theta, bandwidth=config.bandwidth, to_input=config.ste_to_input)
        l0 = entries.per_token(counted)
        if config.sparsity == "quadratic":
            assert config.target_l0 is not None  # the configuration has seen to it
            l0 = 2 / config.target_l0 * (l0 - config.target_l0).square()
        return config.l0_coefficient * entries.mean(l0)

    def run(
        self, batch: Batch, k: Any, dead: torch.Tensor | None = None, clock: Parts | None = None
    ) -> SAEOutput:
        if dead is None and self.training and self._lifts():
            dead = self.dead().nonzero().squeeze(-1)
        out = super().run(batch, k, dead, clock)
        return self._lifted(out, batch, dead)

    def dense_run(self, batch: Batch, k: Any, dead: torch.Tensor, clock: Parts) -> SAEOutput:
        return self._lifted(super().dense_run(batch, k, dead, clock), batch, dead)

    def _lifts(self) -> bool:
        return self.config.pre_act_coefficient > 0

    def _lifted(self, out: SAEOutput, batch: Batch, dead: torch.Tensor | None) -> SAEOutput:
        """With the loss that lifts dead features towards their thresholds."""
        if dead is None or not dead.numel() or not self._lifts() or not self.training:
            return out
        dtype = self.w_enc.dtype
        x = batch.input.reshape(-1, self.config.d).to(dtype)
        x = x - self.b_dec if self.centred else x
        norms = self.norms()
        leaves = (
            self.w_enc.index_select(0, dead),
            self.b_enc.index_select(0, dead),
            self.threshold.index_select(0, dead),
            None if norms is None else norms.index_select(0, dead),
        )
        lift = self._lift(x, *leaves, batch.weights)
        measure = self.measure(batch, batch.output.reshape(-1, self.config.d_out).to(lift.dtype))
        lift = lift * losses.unit(self.config.loss, measure)
        return out._replace(loss=out.loss + lift, sparsity=out.sparsity + lift.detach())

    def _lift(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        b: torch.Tensor,
        theta: torch.Tensor,
        norms: torch.Tensor | None,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        """0-dim: the mean over tokens of `sum |w_dec| relu(theta - h)`, times its coefficient."""
        acc = accumulate_dtype(w.dtype)
        short = (theta.to(acc) - (x @ w.T + b).to(acc)).relu()
        per_token = (short if norms is None else short * norms).sum(-1)
        share = self.config.pre_act_coefficient * self.sparsity_share
        return share * Entries(None, weights).mean(per_token)

    def terms(
        self,
        batch: Batch,
        k: Any,
        dead: torch.Tensor | None,
        share: float | torch.Tensor,
        work: Workspace,
        slots: SparseCodes | None = None,
    ) -> Terms:
        found = super().terms(batch, k, dead, share, work, slots)
        if dead is None or not dead.numel() or not self._lifts():
            return found
        with work.part("gradients"):
            return self._with_lift(found, batch, dead, share)

    def _with_lift(
        self, found: Terms, batch: Batch, dead: torch.Tensor, share: float | torch.Tensor
    ) -> Terms:
        unit = losses.unit(self.config.loss, self.measure(batch, batch.output))
        x = found.terms[0].x
        shrink = None if found.shrink is None else found.shrink.clone()
        norms = self.norms()
        d_theta = found.direct.get("threshold", torch.zeros_like(self.threshold)).clone()
        total, parts = x.new_zeros(()), []
        for features in dead.split(max(1, PAIRS // max(1, x.shape[0]))):
            leaves = [
                self.w_enc.detach()[features].to(x.dtype).requires_grad_(),
                self.b_enc.detach()[features].to(x.dtype).requires_grad_(),
                self.threshold.detach()[features].requires_grad_(),
            ]
            if norms is not None:
                leaves.append(norms.detach()[features].requires_grad_())
            with torch.enable_grad():
                own = leaves[3] if norms is not None else None
                lift = self._lift(x, leaves[0], leaves[1], leaves[2], own, batch.weights)
                grads = torch.autograd.grad(lift * (share * unit), leaves)
            total += lift.detach()
            d_theta.index_add_(0, features, grads[2].to(d_theta.dtype))
            if norms is not None:
                shrink = torch.zeros_like(norms) if shrink is None else shrink
                shrink.index_add_(0, features, grads[3] / norms[features].clamp_min(1e-30))
            parts.append(DeadRows(features, grads[0], grads[1]))
        lift = total * unit
        values = {
            **found.values,
            "loss": found.values["loss"] + lift,
            "sparsity": found.values["sparsity"] + lift,
        }
        rows = DeadRows(*(torch.cat(column) for column in zip(*parts, strict=True)))
        direct = {**found.direct, "threshold": d_theta}
        return found._replace(direct=direct, values=values, shrink=shrink, rows=rows)

    @torch.no_grad()
    def prepare_(self, batch: Batch, init_b_dec: bool) -> None:
        super().prepare_(batch, init_b_dec)
        if self.threshold.requires_grad and not self.threshold.any():
            l0, target = self.config.initial_l0, self.config.target_l0
            if l0 is None and target is not None:
                l0 = min(4 * target, max(target, self.config.n_features / 4))
            self.threshold.fill_(float(threshold_of(self, batch, l0)))

    @torch.no_grad()
    def project_(self) -> None:
        """Thresholds at least 0: below, the gate would let negative pre-activations through."""
        self.threshold.clamp_min_(0)

    @torch.no_grad()
    def rescale_(self, scale: float) -> None:
        super().rescale_(scale)
        self.threshold.mul_(scale)
