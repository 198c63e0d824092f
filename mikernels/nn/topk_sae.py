# SPDX-License-Identifier: Apache-2.0
"""The TopK sparse autoencoder (Gao et al., arXiv 2406.04093).

    codes = relu(top_k((x - b_dec) w_enc^T + b_enc)),  y = sum_j values_j w_dec[indices_j] + b_dec
    mse = mean over tokens of sum over d of (x - y)^2,  fvu = sum (x - y)^2 / sum (x - mean x)^2
    loss = (mse or fvu) + aux_coefficient * aux_loss          see mikernels/nn/losses.py

AuxK revives dead features: the k_aux best of them, ReLU'd, reconstruct the residual r = x - y as a
constant: `aux_loss = sum (y_aux - r)^2 / sum (r - mean r)^2`, times the main loss of the mean of x.
Its gradient reaches w_enc, b_enc and w_dec of the dead features and, through the encoder's input,
b_dec. Only the dead rows of w_enc are scored: O(N n_dead d), and never a tokens x F matrix.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from mikernels._dispatch import FLOATS, accumulate_dtype
from mikernels.codes import SparseCodes
from mikernels.nn.geometric_median import geometric_median
from mikernels.nn.losses import LOSSES, aux_per_square, reciprocal, spread
from mikernels.ops.decode import sparse_decode
from mikernels.ops.encode import topk_encode

# of an SAE that no Trainer has met: OpenAI's (arXiv 2406.04093)
DEAD_AFTER = 10_000_000


@dataclass(frozen=True)
class SAEConfig:
    """The settings of a TopKSAE, JSON-able; see there. k_aux None is max(1, d // 2)."""

    d: int
    n_features: int
    k: int
    k_aux: int | None = None
    aux_coefficient: float = 1 / 32
    dead_after: int | None = None
    loss: str = "mse"
    normalize_decoder: bool = True

    def __post_init__(self) -> None:
        if self.k_aux is None and isinstance(self.d, int):
            object.__setattr__(self, "k_aux", max(1, self.d // 2))
        for name in ("d", "n_features", "k", "k_aux", "dead_after"):
            value = getattr(self, name)
            if name == "dead_after" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"TopKSAE: {name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"TopKSAE: {name} must be at least 1, got {value}")
        if self.k > self.n_features:
            raise ValueError(
                f"TopKSAE: k must be in 1..{self.n_features} (n_features), got {self.k}"
            )
        if not (math.isfinite(self.aux_coefficient) and self.aux_coefficient >= 0):
            raise ValueError(
                f"TopKSAE: aux_coefficient must be finite and at least 0, got "
                f"{self.aux_coefficient}; 0 turns AuxK off"
            )
        if self.loss not in LOSSES:
            raise ValueError(f"TopKSAE: loss must be one of {list(LOSSES)}, got {self.loss!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SAEOutput(NamedTuple):
    """What `forward` returns; the losses are 0-dim, float32 for low-precision weights."""

    reconstruction: torch.Tensor
    codes: SparseCodes
    loss: torch.Tensor
    mse: torch.Tensor
    aux_loss: torch.Tensor
    fvu: torch.Tensor


class TopKSAE(nn.Module):
    """TopK sparse autoencoder with AuxK and dead-feature tracking.

    Decoder rows start as random unit vectors, encoder rows as their multiples, biases at 0.

    Args:
        d: width of the activations.
        n_features: F, the number of features.
        k: active features a token, 1..F; `forward` and `encode` take another one at run time.
        k_aux: dead features a token in the auxiliary loss, at most the number of dead ones;
            None is d // 2.
        aux_coefficient: its weight; 0 turns it off.
        dead_after: a feature is dead when it has not fired for this many tokens. None is 10 M, or
            a sixth of the run of the first Trainer if that is less: a shorter run than dead_after
            has no dead feature, and AuxK nothing to do.
        loss: "mse" or "fvu".
        normalize_decoder: training keeps decoder rows at norm 1 (the trainer's or optimiser's job:
            `remove_parallel_gradient_` before and `normalize_decoder_` after an update).
        dtype: of the parameters.
        generator: decides the initial decoder.
        encoder_scale: norm of the initial encoder rows. On SmolLM2-135M's layer 14 (F 4096, k 32,
            100 steps, two seeds) 0.3 and 0.1 leave 0.182 and 0.180 of the held-out variance
            unexplained where 1 leaves 0.189; on data of known features 0.1 finds fewer of them.

    Attributes:
        w_enc, w_dec: `[F, d]`, features as rows. b_enc: `[F]`. b_dec: `[d]`.
        tokens_since_fired: `[F]` int64, kept up by `track_fired_`.
        config: the settings.

    Raises:
        TypeError, ValueError: for settings outside the above, by name.
    """

    tokens_since_fired: torch.Tensor

    def __init__(
        self,
        d: int,
        n_features: int,
        k: int,
        *,
        k_aux: int | None = None,
        aux_coefficient: float = 1 / 32,
        dead_after: int | None = None,
        loss: str = "mse",
        normalize_decoder: bool = True,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        encoder_scale: float = 1.0,
    ):
        super().__init__()
        self.config = SAEConfig(
            d, n_features, k, k_aux, aux_coefficient, dead_after, loss, normalize_decoder
        )
        if dtype not in FLOATS:
            raise TypeError(f"TopKSAE: dtype must be one of {list(FLOATS)}, got {dtype}")
        if not (math.isfinite(encoder_scale) and encoder_scale > 0):
            raise ValueError(
                f"TopKSAE: encoder_scale must be finite and above 0, got {encoder_scale}"
            )
        rows = torch.randn(n_features, d, generator=generator, dtype=accumulate_dtype(dtype))
        rows /= torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        self.w_dec = nn.Parameter(rows.to(dtype))
        self.w_enc = nn.Parameter(self.w_dec.detach() * encoder_scale)
        self.b_enc = nn.Parameter(torch.zeros(n_features, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d, dtype=dtype))
        self.register_buffer("tokens_since_fired", torch.zeros(n_features, dtype=torch.int64))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.to_dict().items())

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
            b_dec=self.b_dec,
        )

    def decode(self, codes: SparseCodes) -> torch.Tensor:
        """`[..., d]` reconstructions."""
        return sparse_decode(codes, self.w_dec, self.b_dec)

    def forward(self, x: torch.Tensor, k: int | None = None) -> SAEOutput:
        """Reconstruct x `[..., d]` and score it; AuxK is part of the loss in training mode.

        Raises:
            TypeError, ValueError: for an x that is not floating `[..., d]`, or k outside 1..F.
        """
        codes = self.encode(x, k)
        return self.score(x, codes, self.decode(codes))

    def score(
        self,
        x: torch.Tensor,
        codes: SparseCodes,
        reconstruction: torch.Tensor,
        dead: torch.Tensor | None = None,
    ) -> SAEOutput:
        """The losses of a reconstruction.

        Args:
            x: `[..., d]`. codes: of x. reconstruction: `[..., d]`, of the codes.
            dead: indices of the features that AuxK revives; None takes `self.dead()` in training
                mode (which synchronises a GPU once) and no features otherwise.
        """
        if dead is None and self.training and self.config.aux_coefficient:
            dead = self.dead().nonzero().squeeze(-1)
        acc = accumulate_dtype(reconstruction.dtype)
        flat = x.reshape(-1, self.config.d).to(acc)
        error = reconstruction.reshape(-1, self.config.d).to(acc) - flat
        squares = error.square().sum()
        n_tokens = max(1, flat.shape[0])
        variance = spread(flat)
        mse, fvu = squares / n_tokens, squares * reciprocal(variance)
        loss = mse if self.config.loss == "mse" else fvu
        aux_loss = torch.zeros_like(mse)
        if dead is not None and dead.numel() and self.config.aux_coefficient:
            r = -error.detach()
            left = (self._revived(flat, dead) - r).square().sum()
            aux_loss = left * aux_per_square(self.config.loss, n_tokens, variance, spread(r))
            loss = loss + self.config.aux_coefficient * aux_loss
        return SAEOutput(reconstruction, codes, loss, mse, aux_loss, fvu)

    def _revived(self, x: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
        """`[N, d]`: what AuxK's features make of x `[N, d]`, without b_dec."""
        assert self.config.k_aux is not None
        codes = topk_encode(
            x.to(self.w_enc.dtype),
            self.w_enc.index_select(0, dead),
            self.b_enc.index_select(0, dead),
            k=min(self.config.k_aux, dead.numel()),
            b_dec=self.b_dec,
        )
        return sparse_decode(codes, self.w_dec.index_select(0, dead)).to(x.dtype)

    @torch.no_grad()
    def init_b_dec_(self, x: torch.Tensor) -> None:
        """Set b_dec to the geometric median of x `[..., d]`."""
        self._check(x)
        self.b_dec.copy_(geometric_median(x.reshape(-1, self.config.d)))

    @torch.no_grad()
    def rescale_(self, scale: float) -> None:
        """Become the same SAE of activations in another unit: `new(scale x) = scale old(x)`.

        The codes' values scale along. Only the biases change, since
        `(scale x - scale b_dec) w_enc^T + scale b_enc = scale h`; by a power of two, exactly.
        """
        self.b_enc.mul_(scale)
        self.b_dec.mul_(scale)

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Give every decoder row norm 1 (a zero row stays)."""
        norm = torch.linalg.vector_norm(
            self.w_dec, dim=-1, keepdim=True, dtype=accumulate_dtype(self.w_dec.dtype)
        )
        self.w_dec.div_(norm.clamp_min(torch.finfo(norm.dtype).tiny))

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Drop the part of `w_dec.grad` along each unit row: `g <- g - <g, w> w`."""
        if self.w_dec.grad is not None:
            acc = accumulate_dtype(self.w_dec.dtype)
            g, w = self.w_dec.grad.to(acc), self.w_dec.to(acc)
            self.w_dec.grad.copy_(g - (g * w).sum(-1, keepdim=True) * w)

    @torch.no_grad()
    def track_fired_(self, codes: SparseCodes) -> None:
        """Count the codes' tokens for every feature, and start again for those that fired."""
        self.tokens_since_fired.add_(codes.values.numel() // codes.k)
        self.tokens_since_fired.masked_fill_(codes.fired() > 0, 0)

    def dead(self) -> torch.Tensor:
        """`[F]` bool: features that have not fired for `dead_after` tokens (None: 10 M)."""
        after = DEAD_AFTER if self.config.dead_after is None else self.config.dead_after
        return self.tokens_since_fired >= after

    def _check(self, x: torch.Tensor) -> None:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"TopKSAE: x must be a floating tensor, got {got}; use x.float()")
        if x.dim() < 1 or x.shape[-1] != self.config.d:
            raise ValueError(
                f"TopKSAE: x must be [..., {self.config.d}], got {list(x.shape)}; the SAE was made "
                f"for activations of width {self.config.d}"
            )
