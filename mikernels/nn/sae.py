# SPDX-License-Identifier: Apache-2.0
"""What all sparse autoencoders share; a variant is a subclass in a file of its own.

    codes = select(x),  y = sum_j values_j w_dec[indices_j] + b_dec
    loss = (mse or fvu) + aux_coefficient * aux_loss                 see mikernels/nn/losses.py

A variant says three things, and every training step, checkpoint and metric goes by them:

  - how the input becomes codes: `encode` (for use), `select` (in training, of a whole batch) and
    `dense_acts` (the same in plain PyTorch, which the baseline and the tests compare with);
  - which terms its loss has: `terms`, here a reconstruction and AuxK, each codes with the gradient
    at their output and the encoder's input;
  - which rows its constraints act on: `constrained`.

AuxK revives dead features: the k_aux best of them, ReLU'd, reconstruct the residual as a constant.
Its gradient reaches w_enc, b_enc and w_dec of the dead features and, through the encoder's input,
b_dec. Only the dead rows of w_enc are scored: O(N n_dead d), and never a tokens x F matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import nn

from mikernels._dispatch import FLOATS, accumulate_dtype
from mikernels.nn import losses
from mikernels.nn.geometric_median import geometric_median
from mikernels.ops.sae.decode import decode_error, sparse_decode
from mikernels.ops.sae.encode import topk_encode
from mikernels.values.batch import Batch, as_batch
from mikernels.values.codes import SparseCodes

# of an SAE that no Trainer has met: OpenAI's (arXiv 2406.04093)
DEAD_AFTER = 10_000_000


@dataclass(frozen=True)
class SAEConfig:
    """Settings that all variants have, JSON-able; see SAE. k_aux None is max(1, d // 2)."""

    d: int
    n_features: int
    k_aux: int | None = None
    aux_coefficient: float = 1 / 32
    dead_after: int | None = None
    loss: str = "mse"
    normalize_decoder: bool = True

    def __post_init__(self) -> None:
        if self.k_aux is None and isinstance(self.d, int):
            object.__setattr__(self, "k_aux", max(1, self.d // 2))
        for name in ("d", "n_features", "k_aux", "dead_after"):
            value = getattr(self, name)
            if name == "dead_after" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{self.owner}: {name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{self.owner}: {name} must be at least 1, got {value}")
        if not (math.isfinite(self.aux_coefficient) and self.aux_coefficient >= 0):
            raise ValueError(
                f"{self.owner}: aux_coefficient must be finite and at least 0, got "
                f"{self.aux_coefficient}; 0 turns AuxK off"
            )
        if self.loss not in losses.LOSSES:
            raise ValueError(
                f"{self.owner}: loss must be one of {list(losses.LOSSES)}, got {self.loss!r}"
            )

    @property
    def owner(self) -> str:
        """The module's name, for messages."""
        return type(self).__name__.replace("Config", "SAE")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def split_settings(
    form: type[SAEConfig], settings: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords of a variant's constructor: those of its configuration, and those of SAE's.

    Raises:
        TypeError: for a keyword that neither has.
    """
    names = {f.name for f in fields(form)}
    config = {name: value for name, value in settings.items() if name in names}
    more = {name: value for name, value in settings.items() if name not in names}
    if unknown := sorted(more.keys() - {"dtype", "generator", "encoder_scale"}):
        raise TypeError(
            f"{form.__name__.replace('Config', 'SAE')}: settings must be among {sorted(names)}, "
            f"dtype, generator and encoder_scale, got {unknown}"
        )
    return config, more


class SAEOutput(NamedTuple):
    """What `forward` returns; the losses are 0-dim, float32 for low-precision weights."""

    reconstruction: torch.Tensor
    codes: SparseCodes
    loss: torch.Tensor
    mse: torch.Tensor
    aux_loss: torch.Tensor
    fvu: torch.Tensor


class Term(NamedTuple):
    """A part of the loss: by feature, dw_dec += values dy and dw_enc += <dy, w_dec> x.

    Attributes:
        codes: of N tokens. dy: `[N, d]` float32, the gradient at their output.
        x: `[N, d]` float32, what the encoder's rows were multiplied with.
    """

    codes: SparseCodes
    dy: torch.Tensor
    x: torch.Tensor


class Terms(NamedTuple):
    """A batch's loss without autograd.

    Attributes:
        terms: the first is the reconstruction, whose codes are those of the batch.
        d_b_dec: `[d]`, the gradient at b_dec as a bias of the output.
        values: loss, mse, fvu and aux_loss, 0-dim.
    """

    terms: list[Term]
    d_b_dec: torch.Tensor
    values: dict[str, torch.Tensor]


class Workspace(Protocol):
    """Buffers that outlive a step, and its clock."""

    def part(self, name: str) -> AbstractContextManager[None]:
        """Time that belongs to "encode", "decode", ..."""
        ...

    def buffer(self, name: str, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        """Scratch of `like`'s dtype and device, the same memory every time."""
        ...


class SAE(nn.Module):
    """A sparse autoencoder with AuxK and dead-feature tracking; see the variants.

    Decoder rows start as random unit vectors, encoder rows as their multiples, biases at 0.

    Args:
        config: the settings, of the variant's own type.
        dtype: of the parameters.
        generator: decides the initial decoder.
        encoder_scale: norm of the initial encoder rows. On SmolLM2-135M's layer 14 (F 4096, k 32,
            100 steps, two seeds) 0.3 and 0.1 leave 0.182 and 0.180 of the held-out variance
            unexplained where 1 leaves 0.189; on data of known features 0.1 finds fewer of them.

    Settings of every variant:
        d: width of the activations. n_features: F, the number of features.
        k_aux: dead features per token in the auxiliary loss, at most the number of dead ones;
            None is d // 2.
        aux_coefficient: its weight; 0 turns it off.
        dead_after: a feature is dead when it has not fired for this many tokens. None is 10 M, or
            a sixth of the run of the first Trainer if that is less: a shorter run than dead_after
            has no dead feature, and AuxK nothing to do.
        loss: "mse" or "fvu".
        normalize_decoder: training keeps decoder rows at norm 1 (the trainer's or optimiser's job:
            `remove_parallel_gradient_` before and `normalize_decoder_` after an update).

    Attributes:
        w_enc, w_dec: `[F, d]`, features as rows. b_enc: `[F]`. b_dec: `[d]`.
        tokens_since_fired: `[F]` int64, kept up by `track_fired_`.
        config: the settings.

    Raises:
        TypeError, ValueError: for settings outside the above, by name.
    """

    architecture: ClassVar[str]
    config_type: ClassVar[Any]
    config: Any
    tokens_since_fired: torch.Tensor

    def __init__(
        self,
        config: SAEConfig,
        *,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        encoder_scale: float = 1.0,
    ):
        super().__init__()
        self.config = config
        if dtype not in FLOATS:
            raise TypeError(f"{self.name}: dtype must be one of {list(FLOATS)}, got {dtype}")
        if not (math.isfinite(encoder_scale) and encoder_scale > 0):
            raise ValueError(
                f"{self.name}: encoder_scale must be finite and above 0, got {encoder_scale}"
            )
        f, d = config.n_features, config.d
        rows = torch.randn(f, d, generator=generator, dtype=accumulate_dtype(dtype))
        rows /= torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        self.w_dec = nn.Parameter(rows.to(dtype))
        self.w_enc = nn.Parameter(self.w_dec.detach() * encoder_scale)
        self.b_enc = nn.Parameter(torch.zeros(f, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d, dtype=dtype))
        self.register_buffer("tokens_since_fired", torch.zeros(f, dtype=torch.int64))

    @classmethod
    def of(cls, config: SAEConfig, **more: Any) -> SAE:
        """A new SAE of these settings; `more` as in the constructor (dtype, generator, ...)."""
        return cls(**config.to_dict(), **more)

    @classmethod
    def tensors(cls, config: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Name -> shape and dtype (None: the weights' own) of what the state_dict holds."""
        f, d = config.n_features, config.d
        return {
            "w_enc": ((f, d), None),
            "w_dec": ((f, d), None),
            "b_enc": ((f,), None),
            "b_dec": ((d,), None),
            "tokens_since_fired": ((f,), torch.int64),
        }

    @property
    def name(self) -> str:
        """Of the class, for messages."""
        return type(self).__name__

    @property
    def k(self) -> Any:
        """Active features per token, None for a variant that has no such setting."""
        return getattr(self.config, "k", None)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.to_dict().items())

    def encode(self, x: torch.Tensor, k: Any = None) -> SparseCodes:
        """The codes of every token of x `[..., d]`, each on its own: for use after training."""
        raise TypeError(f"{self.name}: a variant of SAE must have encode")

    def select(self, x: torch.Tensor, k: Any = None) -> SparseCodes:
        """The codes of a batch `[n, d]` in training; here those of `encode`."""
        return self.encode(x, k)

    def dense_acts(self, h: torch.Tensor, k: Any) -> tuple[torch.Tensor, SparseCodes]:
        """`select` in plain PyTorch: from all pre-activations `[n, F]` to activations `[n, F]`."""
        raise TypeError(f"{self.name}: a variant of SAE must have dense_acts")

    def constrained(self) -> list[nn.Parameter]:
        """Matrices whose rows training keeps at norm 1."""
        return [self.w_dec] if self.config.normalize_decoder else []

    def decode(self, codes: SparseCodes) -> torch.Tensor:
        """`[..., d]` reconstructions."""
        return sparse_decode(codes, self.w_dec, self.b_dec)

    def forward(self, x: torch.Tensor, k: Any = None) -> SAEOutput:
        """Reconstruct x `[..., d]` and score it; AuxK is part of the loss in training mode.

        Raises:
            TypeError, ValueError: for an x that is not floating `[..., d]`, or another k.
        """
        codes = self.select(x, k) if self.training else self.encode(x, k)
        return self.score(x, codes, self.decode(codes))

    def score(
        self,
        x: torch.Tensor | Batch,
        codes: SparseCodes,
        reconstruction: torch.Tensor,
        dead: torch.Tensor | None = None,
    ) -> SAEOutput:
        """The losses of a reconstruction, under autograd.

        Args:
            x: `[..., d]`, or a Batch with a target and weights. codes: of its input.
            reconstruction: of the codes, of the target's shape.
            dead: indices of the features that AuxK revives; None takes `self.dead()` in training
                mode (which synchronises a GPU once) and no features otherwise.
        """
        if dead is None and self.training and self.config.aux_coefficient:
            dead = self.dead().nonzero().squeeze(-1)
        acc = accumulate_dtype(reconstruction.dtype)
        batch = as_batch(x)
        target = batch.output.reshape(-1, self.config.d).to(acc)
        error = reconstruction.reshape(-1, self.config.d).to(acc) - target
        count = batch.count if batch.weights is not None else float(target.shape[0])
        measure = losses.Measure(count, losses.spread(target, batch.weights))
        total = losses.weighted(error.square().sum(-1), batch.weights)
        mse, fvu = losses.mse(total, measure), losses.fvu(total, measure)
        loss = mse if self.config.loss == "mse" else fvu
        aux_loss = torch.zeros_like(mse)
        if dead is not None and dead.numel() and self.config.aux_coefficient:
            r = -error.detach()
            inner = self._aux_codes(batch.input.reshape(-1, self.config.d), dead)
            revived = sparse_decode(inner, self.w_dec.index_select(0, dead)).to(acc)
            aux_loss = self.aux_loss(batch, revived, r, measure)
            loss = loss + self.config.aux_coefficient * aux_loss
        return SAEOutput(reconstruction, codes, loss, mse, aux_loss, fvu)

    def aux_loss(
        self, batch: Batch, revived: torch.Tensor, r: torch.Tensor, measure: losses.Measure
    ) -> torch.Tensor:
        """0-dim: what `revived` leaves of the residual r, both `[N, d]`."""
        left = losses.weighted((revived - r).square().sum(-1), batch.weights)
        residual_spread = losses.spread(r, batch.weights)
        return left * losses.aux_per_square(self.config.loss, measure, residual_spread)

    @torch.no_grad()
    def terms(
        self,
        batch: Batch,
        k: Any,
        dead: torch.Tensor | None,
        share: float | torch.Tensor,
        work: Workspace,
        select: Callable[[torch.Tensor, Any], SparseCodes] | None = None,
    ) -> Terms:
        """The terms of a batch's loss, times `share`: what training does without autograd.

        Args:
            batch: `[n, d]` in the accumulation dtype.
            k: as for `select`. dead: indices of AuxK's features, or None.
            select: in place of `self.select`.
        """
        with work.part("encode"):
            codes = (select or self.select)(batch.input, k)
        with work.part("decode"):
            error, squares = decode_error(codes, self.w_dec, self.b_dec, batch.output)
        total = losses.weighted(squares, batch.weights)
        # this buffer is free again before the centred input is needed
        rows = work.buffer("rows", error.shape, error)
        measure = losses.Measure(batch.count, losses.spread(batch.output, batch.weights, out=rows))
        values = {"mse": losses.mse(total, measure), "fvu": losses.fvu(total, measure)}
        loss, aux_loss = values[self.config.loss], torch.zeros_like(total)
        rounded = batch.input.to(self.w_dec.dtype).to(error.dtype)
        centred = torch.sub(rounded, self.b_dec.to(error.dtype), out=rows)
        found = []
        if dead is not None and dead.numel() and self.config.aux_coefficient:
            with work.part("encode"):
                inner = self._aux_codes(batch.input, dead, work)
                outer = SparseCodes._trusted(
                    inner.values, dead[inner.indices], self.config.n_features
                )
            with work.part("decode"):
                # y_aux - r, with the residual r = -error
                left = sparse_decode(outer, self.w_dec).to(error.dtype).add_(error)
            residual_spread = losses.spread(error, batch.weights)
            by_square = losses.aux_per_square(self.config.loss, measure, residual_spread)
            aux_loss = losses.weighted(losses.squares(left), batch.weights) * by_square
            loss = loss + self.config.aux_coefficient * aux_loss
            by_aux = share * (2 * self.config.aux_coefficient * by_square)
            found.append(Term(outer, _scaled_(left, by_aux, batch.weights), centred))
        factor = share * (2 * losses.per_square(self.config.loss, measure))
        main = Term(codes, _scaled_(error, factor, batch.weights), centred)
        values |= {"loss": loss, "aux_loss": aux_loss}
        return Terms([main, *found], main.dy.sum(0), values)

    def _aux_codes(
        self, x: torch.Tensor, dead: torch.Tensor, work: Workspace | None = None
    ) -> SparseCodes:
        """AuxK's codes of x `[N, d]`, whose indices count within `dead`."""
        assert self.config.k_aux is not None
        shape = torch.Size((dead.numel(), self.config.d))
        rows = None if work is None else work.buffer("dead", shape, self.w_enc)
        return topk_encode(
            x.to(self.w_enc.dtype),
            torch.index_select(self.w_enc, 0, dead, out=rows),
            self.b_enc.index_select(0, dead),
            k=min(self.config.k_aux, dead.numel()),
            b_dec=self.b_dec,
        )

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
        self.tokens_since_fired.add_(math.prod(codes.shape[:-1]))
        self.tokens_since_fired.masked_fill_(codes.fired() > 0, 0)

    def track_(self, codes: SparseCodes) -> None:
        """What a variant keeps of every batch's codes in training."""
        self.track_fired_(codes)

    def dead(self) -> torch.Tensor:
        """`[F]` bool: features that have not fired for `dead_after` tokens (None: 10 M)."""
        after = DEAD_AFTER if self.config.dead_after is None else self.config.dead_after
        return self.tokens_since_fired >= after

    def _check(self, x: torch.Tensor) -> None:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"{self.name}: x must be a floating tensor, got {got}; use x.float()")
        if x.dim() < 1 or x.shape[-1] != self.config.d:
            raise ValueError(
                f"{self.name}: x must be [..., {self.config.d}], got {list(x.shape)}; the SAE "
                f"was made for activations of width {self.config.d}"
            )


def _scaled_(
    rows: torch.Tensor, factor: float | torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """`rows *= factor weights[:, None]`."""
    return rows.mul_(factor if weights is None else (factor * weights)[:, None])
