# SPDX-License-Identifier: Apache-2.0
"""What all sparse autoencoders share; a variant is a subclass in a file of its own.

    h = (x - b_dec) w_enc^T + b_enc,  codes = activate(h) at the pairs that `slots` keeps
    y = sum_j values_j w_dec[indices_j] + b_dec
    loss = (mse or fvu) + aux_coefficient * aux_loss + sparsity      see mikernels/nn/losses.py

A variant says these things, and every training step, checkpoint and metric goes by them:

  - how the input becomes codes: `encode` (for use), `slots` (in training, of a whole batch: the
    pairs that are active or have a gradient, with their pre-activations) and `dense_acts` (the same
    in plain PyTorch, which the baseline and the tests compare with);
  - if it is `shaped`, what the pre-activations of single pairs become, `activate`, and what they
    cost, `penalty`: written once, for slots and matrices (mikernels/nn/entries.py);
  - which reconstructions its main loss sums, `levels`; which matrices its constraints act on,
    `decoders`; what it takes from the first batch of a run, `prepare_`.

The loss stands twice: `score` under autograd, and `terms` without, as codes with the gradient at
their output and the encoder's input (mikernels/nn/terms.py), from which a step makes all gradients
of the matrices in one pass over the features. What `activate` and `penalty` do is differentiated by
autograd in both, on the slots alone. A tokens x features matrix is in neither.

AuxK revives dead features: the k_aux best of them, ReLU'd, reconstruct the residual as a constant.
Its gradient reaches w_enc, b_enc and w_dec of the dead features and, through the encoder's input,
b_dec. Only the dead rows of w_enc are scored: O(N n_dead d).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import nn

from mikernels._dispatch import FLOATS, accumulate_dtype
from mikernels.nn import losses
from mikernels.nn.auxk import AuxKGradient, auxk_gradient, auxk_loss
from mikernels.nn.config import SAEConfig
from mikernels.nn.entries import Entries, codes_of
from mikernels.nn.geometric_median import geometric_median
from mikernels.nn.shaped import Shaped
from mikernels.nn.terms import Levels, Term, Terms, Workspace
from mikernels.ops.sae.decode import decode_error, sparse_decode
from mikernels.ops.sae.decode_levels import decode_levels
from mikernels.ops.sae.encode import topk_encode
from mikernels.ops.sae.gradients import gather_dot_op
from mikernels.ops.sae.threshold_encode import slots_above
from mikernels.values.batch import Batch, as_batch
from mikernels.values.codes import SparseCodes

# of an SAE that no Trainer has met: OpenAI's (arXiv 2406.04093)
DEAD_AFTER = 10_000_000


class SAEOutput(NamedTuple):
    """What `forward` returns; the losses are 0-dim, float32 for low-precision weights."""

    reconstruction: torch.Tensor
    codes: SparseCodes
    loss: torch.Tensor
    mse: torch.Tensor
    aux_loss: torch.Tensor
    fvu: torch.Tensor
    sparsity: torch.Tensor


class Parts(Protocol):
    """A clock: time that belongs to "encode", "decode", ..."""

    def part(self, name: str) -> AbstractContextManager[None]: ...


class _NoClock:
    def part(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()


class SAE(nn.Module):
    """A sparse autoencoder with AuxK and dead-feature tracking; see the variants.

    Decoder rows start as random unit vectors, encoder rows as their multiples, biases at 0.

    Args:
        config: the settings, of the variant's own type.
        dtype: of the parameters.
        generator: decides the initial decoder.
        encoder_scale: norm of the initial encoder rows. On SmolLM2-135M's layer 14 (F 4096, k 32,
            100 steps, three seeds) 0.3 leaves 0.185 of the held-out variance unexplained where 1
            leaves 0.192; with a learning rate of 3e-3 in place of 4e-3, 0.191 and 1.6 % of the
            features dead rather than 6 %. On known features 0.3 has F1 0.51 where 1 has 0.55.

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
        aux_form: whose auxiliary loss, one of mikernels.nn.auxk.FORMS.

    Attributes:
        w_enc, w_dec: `[F, d]`, features as rows. b_enc: `[F]`. b_dec: `[d]`.
        tokens_since_fired: `[F]` int64, kept up by `track_fired_`.
        config: the settings.
        sparsity_share: what `penalty` is multiplied by; a Trainer warms it up.

    Raises:
        TypeError, ValueError: for settings outside the above, by name.
    """

    architecture: ClassVar[str]
    config_type: ClassVar[Any]
    # the encoder reads x - b_dec, or x as it is
    centred: ClassVar[bool] = True
    # what its slots hold passes through `activate` and costs a `penalty`
    shaped: ClassVar[bool] = False
    # its loss in training is a reconstruction and AuxK with the matrices w_enc and w_dec, no more
    plain: ClassVar[bool] = False
    # it reconstructs something else than its input
    needs_target: ClassVar[bool] = False
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
        self.sparsity_share = 1.0
        if dtype not in FLOATS:
            raise TypeError(f"{self.name}: dtype must be one of {list(FLOATS)}, got {dtype}")
        if not (math.isfinite(encoder_scale) and encoder_scale > 0):
            raise ValueError(
                f"{self.name}: encoder_scale must be finite and above 0, got {encoder_scale}"
            )
        self._make_weights(dtype, generator, encoder_scale)
        total = self.b_enc.shape[0]
        self.register_buffer("tokens_since_fired", torch.zeros(total, dtype=torch.int64))

    def _make_weights(
        self, dtype: torch.dtype, generator: torch.Generator | None, encoder_scale: float
    ) -> None:
        f, d = self.config.n_features, self.config.d
        self.w_dec = nn.Parameter(unit_rows(f, d, dtype, generator))
        self.w_enc = nn.Parameter(self.w_dec.detach() * encoder_scale)
        self.b_enc = nn.Parameter(torch.zeros(f, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d, dtype=dtype))

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
            "w_dec": ((f, config.d_out), None),
            "b_enc": ((f,), None),
            "b_dec": ((config.d_out,), None),
            "tokens_since_fired": ((f,), torch.int64),
        }

    def _apply(self, fn: Any, recurse: bool = True) -> SAE:
        # thresholds, scales and running means stay float32: in the weights' bfloat16 a mean would
        # stand still
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, t in before.items():
            now = self._buffers[name]
            if now is not None and now.dtype != t.dtype:
                self._buffers[name] = t.to(now.device)
        return self

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

    # ---- how the input becomes codes

    def encode(self, x: torch.Tensor, k: Any = None) -> SparseCodes:
        """The codes of every token of x `[..., d]`, each on its own: for use after training."""
        raise TypeError(f"{self.name}: a variant of SAE must have encode")

    def slots(self, x: torch.Tensor, k: Any = None) -> SparseCodes:
        """Of a batch `[n, d]` in training, the pairs that are active or have a gradient.

        Their values are pre-activations if the variant is `shaped`, else activations. Here the
        codes of `encode`.
        """
        return self.encode(x, k)

    def above(self, x: torch.Tensor, threshold: torch.Tensor, wide: bool = False) -> SparseCodes:
        """The pre-activations of x `[..., d]` that are above a threshold, 0-dim or `[F]`.

        Ragged codes of `[n, d]`, else padded to the longest token (one sync); `wide` ones in the
        accumulation dtype.

        Raises:
            TypeError, ValueError: for an x that is not floating `[..., d]`.
        """
        self._check(x)
        codes = slots_above(
            x.reshape(-1, x.shape[-1]).to(self.w_enc.dtype),
            self.w_enc,
            self.b_enc,
            self.b_dec if self.centred else None,
            threshold.detach(),
            wide=wide,
        )
        return in_shape_of(codes, x)

    def activate(self, h: torch.Tensor, entries: Entries) -> torch.Tensor:
        """The activations of pre-activations, in their dtype, differentiable; 0 is inactive."""
        return h

    def penalty(
        self,
        h: torch.Tensor,
        values: torch.Tensor,
        entries: Entries,
        norms: torch.Tensor | None,
    ) -> torch.Tensor:
        """0-dim: what pre-activations and activations cost, a mean over tokens, in the mse's unit.

        Args:
            h, values: pre-activations and activations, of slots `[S]` or all `[n, F]`.
            entries: which feature each of them is of.
            norms: `[F]` of the decoder rows; None where training keeps them at 1.
        """
        return h.new_zeros(())

    def select(self, x: torch.Tensor, k: Any = None) -> SparseCodes:
        """The codes of a batch `[n, d]` in training."""
        slots = self.slots(x, k)
        return self._activated(slots, Entries(slots)) if self.shaped else slots

    def dense_acts(self, h: torch.Tensor, k: Any) -> tuple[torch.Tensor, SparseCodes]:
        """`select` in plain PyTorch: from all pre-activations `[n, F]` to activations `[n, F]`."""
        if not self.shaped:
            raise TypeError(f"{self.name}: a variant of SAE must have dense_acts")
        acts = self.activate(h, Entries(None))
        return acts, codes_of(acts)

    def levels(self) -> Levels | None:
        """The nested reconstructions that the main loss sums; None is one, of all features."""
        return None

    def decoders(self) -> list[nn.Parameter]:
        """The matrices `[F, ...]` whose rows are feature directions."""
        return [self.w_dec]

    def constrained(self) -> list[nn.Parameter]:
        """Matrices whose rows training keeps at norm 1."""
        return self.decoders() if self.config.normalize_decoder else []

    def rows(self, name: str, t: torch.Tensor, part: int) -> torch.Tensor:
        """The rows of `t`, of the shape of the parameter of this name, that belong to a part."""
        return t

    def decode(self, codes: SparseCodes) -> torch.Tensor:
        """`[..., d]` reconstructions."""
        return sparse_decode(codes, self.w_dec, self.b_dec)

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., d_out]`: what the variant in use makes of activations `[..., d]`."""
        y = self.decode(self.encode(x))
        more = self.past_codes(x)
        return y if more is None else y + more

    def output(self, codes: SparseCodes) -> torch.Tensor:
        """`decode` in the unit of `in_units`."""
        return self.decode(codes)

    def in_units(self, batch: Batch) -> Batch:
        """A batch in the unit that the loss is measured in; here the activations' own."""
        return batch

    def past_codes(self, x: torch.Tensor) -> torch.Tensor | None:
        """What the output has beside the codes' part, from the input `[n, d]`; None is nothing."""
        return None

    def extra_loss(self, slots: SparseCodes, batch: Batch) -> torch.Tensor | None:
        """0-dim under autograd: a loss of the slots that no penalty of single pairs is."""
        return None

    def extra_gradient(
        self, slots: SparseCodes, batch: Batch, share: float | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], list[Term]] | None:
        """`extra_loss` without autograd: its value, and times `share` its gradients at the slots'
        pre-activations, of whole parameters and as further terms (without their x)."""
        return None

    # ---- the loss under autograd

    def forward(self, x: torch.Tensor | Batch, k: Any = None) -> SAEOutput:
        """Reconstruct x `[..., d]` and score it; AuxK is part of the loss in training mode.

        Args:
            x: activations, or a Batch with a target `[..., d_out]` and weights.
            k: as for `encode`.

        Raises:
            TypeError, ValueError: for an x that is not floating `[..., d]`, or another k.
        """
        return self.run(as_batch(x), k)

    def run(
        self, batch: Batch, k: Any, dead: torch.Tensor | None = None, clock: Parts | None = None
    ) -> SAEOutput:
        """`forward` of a batch of `in_units`; `dead` as for `score`, and its parts timed."""
        clock = _NoClock() if clock is None else clock
        self._check_target(batch)
        penalty = None
        with clock.part("encode"):
            if not self.training:
                codes = self.encode(batch.input, k)
            else:
                codes = slots = self.slots(batch.input, k)
                if self.shaped:
                    entries = Entries(slots, batch.weights)
                    codes = self._activated(slots, entries)
                    penalty = self.shared_penalty(slots.values, codes.values, entries, self.norms())
                    if (extra := self.extra_loss(slots, batch)) is not None:
                        penalty = penalty + extra
        with clock.part("decode"):
            y = self.output(codes)
            more = self.past_codes(batch.input)
            y = y if more is None else y + more
        if penalty is None:
            return self.score(batch, codes, y, dead)
        return self.score(batch, codes, y, dead, penalty=penalty)

    def _activated(self, slots: SparseCodes, entries: Entries) -> SparseCodes:
        acc = accumulate_dtype(slots.values.dtype)
        values = self.activate(slots.values.to(acc), entries)
        return slots.with_values(values.to(self.w_dec.dtype))

    def shared_penalty(
        self,
        h: torch.Tensor,
        values: torch.Tensor,
        entries: Entries,
        norms: torch.Tensor | None,
    ) -> torch.Tensor:
        """`penalty` in the accumulation dtype, times `sparsity_share`."""
        acc = accumulate_dtype(h.dtype)
        return self.sparsity_share * self.penalty(h.to(acc), values.to(acc), entries, norms)

    def norms(self) -> torch.Tensor | None:
        """`[F]` of the decoder rows, in the accumulation dtype; None where they are kept at 1."""
        if self.config.normalize_decoder:
            return None
        acc = accumulate_dtype(self.w_dec.dtype)
        return torch.linalg.vector_norm(self.w_dec, dim=-1, dtype=acc)

    def score(
        self,
        x: torch.Tensor | Batch,
        codes: SparseCodes,
        reconstruction: torch.Tensor,
        dead: torch.Tensor | None = None,
        *,
        penalty: torch.Tensor | None = None,
    ) -> SAEOutput:
        """The losses of a reconstruction, under autograd.

        Args:
            x: `[..., d]`, or a Batch with a target and weights. codes: of its input.
            reconstruction: of the codes, of the target's shape.
            dead: indices of the features that AuxK revives; None takes `self.dead()` in training
                mode (which synchronises a GPU once) and no features otherwise.
            penalty: 0-dim, what the codes cost; None is nothing.
        """
        if dead is None and self.training and self.config.aux_coefficient:
            dead = self.dead().nonzero().squeeze(-1)
        batch = as_batch(x)
        flat = batch.map(lambda t: t.reshape(-1, t.shape[-1]) if t.dim() > 1 else t)
        acc = accumulate_dtype(reconstruction.dtype)
        target = flat.output.to(acc)
        error = reconstruction.reshape(target.shape).to(acc) - target
        inner = [y.to(acc) - target for y in self.inner(codes)]
        aux = None
        if dead is not None and dead.numel() and self.config.aux_coefficient:
            aux = self._aux(flat, dead, [*inner, error])
        return self._sum(batch, reconstruction, codes, [*inner, error], aux, penalty)

    def inner(self, codes: SparseCodes) -> list[torch.Tensor]:
        """The reconstructions `[n, d_out]` of all levels but the last, under autograd."""
        return []

    def measure(self, batch: Batch, target: torch.Tensor) -> losses.Measure:
        """What the sums of squares of a batch's residuals are divided by."""
        count = batch.count if batch.weights is not None else float(target.shape[0])
        return losses.Measure(count, losses.spread(target, batch.weights))

    def _sum(
        self,
        batch: Batch,
        reconstruction: torch.Tensor,
        codes: SparseCodes,
        errors: list[torch.Tensor],
        aux: torch.Tensor | None,
        penalty: torch.Tensor | None,
    ) -> SAEOutput:
        """The output of residuals `[n, d_out]`, one for each level."""
        target = batch.output.reshape(errors[-1].shape).to(errors[-1].dtype)
        measure = self.measure(batch, target)
        totals = [losses.weighted(e.square().sum(-1), batch.weights) for e in errors]
        mse, fvu = losses.mse(totals[-1], measure), losses.fvu(totals[-1], measure)
        loss = mse if self.config.loss == "mse" else fvu
        if (levels := self.levels()) is not None:
            mains = torch.stack([losses.main(self.config.loss, t, measure) for t in totals])
            loss = (levels.weights.to(mains.dtype) * mains).sum()
        none = torch.zeros_like(mse)
        sparsity = none if penalty is None else penalty * losses.unit(self.config.loss, measure)
        loss = loss if penalty is None else loss + sparsity
        loss = loss if aux is None else loss + self.config.aux_coefficient * aux
        return SAEOutput(
            reconstruction, codes, loss, mse, none if aux is None else aux, fvu, sparsity
        )

    def aux_parts(
        self, dead: torch.Tensor, errors: list[torch.Tensor] | torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Which dead features reconstruct which residual -e `[n, d_out]`; `errors` by level."""
        return [(dead, errors[-1])]

    def _aux(self, batch: Batch, dead: torch.Tensor, errors: list[torch.Tensor]) -> torch.Tensor:
        """AuxK's loss under autograd."""
        acc = errors[-1].dtype
        measure = self.measure(batch, batch.output.to(acc))
        total = torch.zeros((), dtype=acc, device=errors[-1].device)
        for features, error in self.aux_parts(dead, errors):
            inner = self._aux_codes(batch.input, features)
            if not self.config.auxk.encoder_gradient:
                inner = inner.detach()
            revived = sparse_decode(inner, self.w_dec.index_select(0, features)).to(acc)
            total = total + self._aux_loss(batch, revived, error, features.numel(), measure)
        return total

    def _aux_loss(
        self,
        batch: Batch,
        revived: torch.Tensor,
        error: torch.Tensor,
        n_dead: int,
        measure: losses.Measure,
    ) -> torch.Tensor:
        """0-dim: what `revived` leaves of the residual -error, both `[N, d_out]`."""
        return auxk_loss(
            self.config.auxk,
            revived,
            -error,
            batch.output.to(error.dtype),
            self.b_dec.to(error.dtype),
            n_dead,
            self.config.k_aux,
            batch.weights,
            loss=self.config.loss,
            measure=measure,
        )

    # ---- the loss in plain PyTorch

    def dense_run(self, batch: Batch, k: Any, dead: torch.Tensor, clock: Parts) -> SAEOutput:
        """`run` with tokens x features matrices, as SAE libraries compute it; a baseline."""
        with clock.part("encode"):
            h, acts, codes = self.dense_encode(batch.input, k)
            penalty = None
            if self.shaped:
                penalty = self.shared_penalty(h, acts, Entries(None, batch.weights), self.norms())
                if (extra := self.dense_extra_loss(h, batch)) is not None:
                    penalty = penalty + extra
        with clock.part("decode"):
            levels = self.levels()
            if levels is None:
                ys = [acts @ self.w_dec + self.b_dec]
            else:
                rings = [
                    acts * (levels.of_feature == p).to(acts.dtype) @ self.w_dec
                    for p in range(len(levels.weights))
                ]
                ys = self.nest(rings)
            if (more := self.past_codes(batch.input)) is not None:
                ys = [y + more for y in ys]
        errors = [y - batch.output for y in ys]
        aux = None
        if dead.numel() and self.config.aux_coefficient:
            aux = torch.zeros_like(errors[-1][0, 0])
            measure = self.measure(batch, batch.output)
            for features, error in self.aux_parts(dead, errors):
                with clock.part("encode"):
                    is_dead = torch.zeros(h.shape[-1], dtype=torch.bool, device=h.device)
                    is_dead[features] = True
                    alone = h.where(is_dead, -torch.inf)
                    count = min(self.config.k_aux, features.numel())
                    best = alone.topk(count, sorted=False)
                    kept = best.values.relu() if self.config.auxk.acts == "relu" else best.values
                    kept = kept if self.config.auxk.encoder_gradient else kept.detach()
                    some = torch.zeros_like(h).scatter(-1, best.indices, kept)
                with clock.part("decode"):
                    revived = some @ self.w_dec
                aux = aux + self._aux_loss(batch, revived, error, features.numel(), measure)
        return self._sum(batch, ys[-1], codes, errors, aux, penalty)

    def dense_encode(
        self, x: torch.Tensor, k: Any
    ) -> tuple[torch.Tensor, torch.Tensor, SparseCodes]:
        """Pre-activations and activations `[n, F]`, and the codes that these are."""
        centred = x - self.b_dec if self.centred else x
        h = torch.addmm(self.b_enc, centred, self.w_enc.T)
        return h, *self.dense_acts(h, k)

    def dense_extra_loss(self, h: torch.Tensor, batch: Batch) -> torch.Tensor | None:
        """`extra_loss` from all pre-activations `[n, F]`."""
        return None

    def nest(self, rings: list[torch.Tensor]) -> list[torch.Tensor]:
        """Reconstructions of the levels from what the features of each level alone add."""
        ys = [rings[0] + self.b_dec]
        for ring in rings[1:]:
            ys.append(ys[-1] + ring)
        return ys

    # ---- the loss without autograd

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
        """The terms of a batch's loss, times `share`: what training does without autograd.

        Args:
            batch: `[n, d]` in the accumulation dtype.
            k: as for `slots`. dead: indices of AuxK's features, or None.
            share: of the step's tokens that are in the batch.
            work: buffers that live through the run, and the clocks of its parts.
            slots: those of the batch, if they are known.
        """
        with work.part("encode"):
            codes = slots = self.slots(batch.input, k) if slots is None else slots
            shape = None
            if self.shaped:
                shape = Shaped(self, slots, batch.weights)
                codes = shape.codes
        target = batch.output
        if (more := self.past_codes(batch.input)) is not None:
            target = target - more
        # this buffer is free again before the encoder's input is needed
        rows = work.buffer("rows", batch.output.shape, batch.output)
        measure = losses.Measure(batch.count, losses.spread(batch.output, batch.weights, out=rows))
        factor = share * (2 * losses.per_square(self.config.loss, measure))
        levels = self.levels()
        with work.part("decode"):
            if levels is None:
                error, squares = decode_error(codes, self.w_dec, self.b_dec, target)
                totals = [losses.weighted(squares, batch.weights)]
                mixed = errors = error[None]
            else:
                # the factor goes into the mix: a pass over [L, N, d] less
                levels = levels._replace(mix=levels.mix * factor)
                mixed, errors, squares = self._decode_levels(codes, target, levels, dead)
                totals = [losses.weighted(s, batch.weights) for s in squares]
                factor = 1.0
        values = {"mse": losses.mse(totals[-1], measure), "fvu": losses.fvu(totals[-1], measure)}
        loss, aux_loss = values[self.config.loss], torch.zeros_like(totals[-1])
        if levels is not None:
            mains = torch.stack([losses.main(self.config.loss, t, measure) for t in totals])
            loss = (levels.weights.to(mains.dtype) * mains).sum()
        x = self._encoder_input(batch.input, work)
        found = []
        aux_direct = through_error = None
        if dead is not None and dead.numel() and self.config.aux_coefficient:
            for features, e in self.aux_parts(dead, errors):
                term, aux = self._aux_term(batch, features, e, measure, share, x, work)
                aux_loss = aux_loss + aux.loss
                found.append(term)
                if aux.d_b_dec is not None:
                    aux_direct = aux.d_b_dec if aux_direct is None else aux_direct + aux.d_b_dec
                if aux.d_residual is not None:
                    through_error = term.dy
            loss = loss + self.config.aux_coefficient * aux_loss
        dy = _scaled_(mixed, factor, batch.weights)
        if through_error is not None:
            dy[0] += through_error
        direct = {"b_dec": dy[0].sum(0)}
        if aux_direct is not None:
            direct["b_dec"] += share * self.config.aux_coefficient * aux_direct
        dh = shrink = None
        sparsity = torch.zeros_like(aux_loss)
        if shape is not None:
            with work.part("gradients"):
                unit = losses.unit(self.config.loss, measure)
                d_values = self._dots(codes, dy, levels)
                dh, others, shrink = shape.backward(d_values, share * unit)
                direct |= others
                penalty = shape.penalty.detach()
                if (extra := self.extra_gradient(slots, batch, share * unit)) is not None:
                    value, d_slots, others, terms = extra
                    penalty = penalty + value
                    dh = dh.add_(d_slots)
                    for name, g in others.items():
                        direct[name] = direct[name] + g if name in direct else g
                    found += [term._replace(x=x) for term in terms]
                sparsity = penalty * unit
                loss = loss + sparsity
        of_feature = None if levels is None else levels.of_feature
        main = Term(codes, dy if levels is not None else dy[0], x, dh, of_feature)
        values |= {"loss": loss, "aux_loss": aux_loss, "sparsity": sparsity}
        direct |= self.past_gradients(batch.input, dy[0])
        return Terms(codes, [main, *found], direct, values, shrink)

    def _decode_levels(
        self,
        codes: SparseCodes,
        target: torch.Tensor,
        levels: Levels,
        dead: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[L, N, d]` mixed residuals, the residuals that AuxK needs by level, and squares."""
        mixed, error, squares = decode_levels(
            codes, self.w_dec, self.b_dec, target, levels.of_feature, levels.mix
        )
        return mixed, error[None], squares

    def _encoder_input(self, x: torch.Tensor, work: Workspace) -> torch.Tensor:
        """`[n, d]`, what the encoder's rows are multiplied with, as it is in their dtype."""
        rounded = x.to(self.w_dec.dtype).to(x.dtype)
        if not self.centred:
            return rounded
        rows = work.buffer("rows", x.shape, x)
        return torch.sub(rounded, self.b_dec.to(x.dtype), out=rows)

    def _dots(self, codes: SparseCodes, dy: torch.Tensor, levels: Levels | None) -> torch.Tensor:
        """<dy, w_dec> of every slot, float32."""
        of_feature = None if levels is None else levels.of_feature
        rows = dy[0] if levels is None else dy
        indices, w_dec = codes.indices, self.w_dec.detach().to(dy.dtype)
        return gather_dot_op(rows, w_dec, indices, codes.row_offsets, of_feature)

    def past_gradients(self, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gradients of the parameters of `past_codes`, from that at the output `[n, d_out]`."""
        return {}

    def _aux_term(
        self,
        batch: Batch,
        features: torch.Tensor,
        error: torch.Tensor,
        measure: losses.Measure,
        share: float | torch.Tensor,
        x: torch.Tensor,
        work: Workspace,
    ) -> tuple[Term, AuxKGradient]:
        """AuxK's term, and the loss with its other gradients, which nothing has scaled yet."""
        with work.part("encode"):
            inner = self._aux_codes(batch.input, features, work)
            outer = SparseCodes._trusted(inner.values, features[inner.indices], self.b_enc.shape[0])
        with work.part("decode"):
            revived = sparse_decode(outer, self.w_dec).to(error.dtype)
        return self._aux_gradient(batch, outer, revived, error, features, measure, share, x)

    def _aux_gradient(
        self,
        batch: Batch,
        codes: SparseCodes,
        revived: torch.Tensor,
        error: torch.Tensor,
        features: torch.Tensor,
        measure: losses.Measure,
        share: float | torch.Tensor,
        x: torch.Tensor,
    ) -> tuple[Term, AuxKGradient]:
        form = self.config.auxk
        aux = auxk_gradient(
            form,
            revived,
            -error,
            batch.output,
            self.b_dec.to(error.dtype),
            features.numel(),
            self.config.k_aux,
            batch.weights,
            loss=self.config.loss,
            measure=measure,
        )
        dy = aux.d_reconstruction.mul_(share * self.config.aux_coefficient)
        dh = None if form.encoder_gradient else torch.zeros_like(codes.values, dtype=dy.dtype)
        return Term(codes, dy, x, dh), aux

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
            b_dec=self.b_dec if self.centred else None,
            relu=self.config.auxk.acts == "relu",
        )

    # ---- what training does beside the loss

    @torch.no_grad()
    def prepare_(self, batch: Batch, init_b_dec: bool) -> None:
        """What a new SAE takes from the first micro-batch of a run.

        Args:
            batch: `[n, d]`, in the unit that training uses.
            init_b_dec: start b_dec at the geometric median of the target, if it is all 0.
        """
        if init_b_dec and self.b_dec.requires_grad and not self.b_dec.any():
            self.init_b_dec_(batch.output)

    @torch.no_grad()
    def init_b_dec_(self, x: torch.Tensor) -> None:
        """Set b_dec to the geometric median of x `[..., d_out]`."""
        self._check(x, self.b_dec.shape[0])
        self.b_dec.copy_(geometric_median(x.reshape(-1, x.shape[-1])))

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
        for w in self.decoders():
            norm = torch.linalg.vector_norm(
                w, dim=-1, keepdim=True, dtype=accumulate_dtype(w.dtype)
            )
            w.div_(norm.clamp_min(torch.finfo(norm.dtype).tiny))

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Drop the part of `w_dec.grad` along each unit row: `g <- g - <g, w> w`."""
        for p in self.decoders():
            if p.grad is not None:
                acc = accumulate_dtype(p.dtype)
                g, w = p.grad.to(acc), p.to(acc)
                p.grad.copy_(g - (g * w).sum(-1, keepdim=True) * w)

    @torch.no_grad()
    def track_fired_(self, codes: SparseCodes) -> None:
        """Count the codes' tokens for every feature, and start again for those that fired."""
        self.tokens_since_fired.add_(math.prod(codes.shape[:-1]))
        self.tokens_since_fired.masked_fill_(codes.fired() > 0, 0)

    def track_(self, codes: SparseCodes) -> None:
        """What a variant keeps of every batch's codes in training."""
        self.track_fired_(codes)

    def project_(self) -> None:
        """Bring parameters back to where they are defined, after an update."""

    def dead(self) -> torch.Tensor:
        """`[F]` bool: features that have not fired for `dead_after` tokens (None: 10 M)."""
        after = DEAD_AFTER if self.config.dead_after is None else self.config.dead_after
        return self.tokens_since_fired >= after

    def _check_target(self, batch: Batch) -> None:
        if self.needs_target and batch.target is None:
            raise ValueError(
                f"{self.name}: x must be a Batch with a target [..., {self.config.d_out}], got "
                f"none; pass Batch(input, target)"
            )

    def _check(self, x: torch.Tensor, d: int | None = None) -> None:
        d = self.config.d if d is None else d
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"{self.name}: x must be a floating tensor, got {got}; use x.float()")
        if x.dim() < 1 or x.shape[-1] != d:
            raise ValueError(
                f"{self.name}: x must be [..., {d}], got {list(x.shape)}; the SAE was made for "
                f"activations of width {d}"
            )


def in_shape_of(codes: SparseCodes, x: torch.Tensor) -> SparseCodes:
    """Ragged codes of the tokens of x `[..., d]`: as they are for `[n, d]`, else padded."""
    if x.dim() == 2:
        return codes
    padded = codes.padded()
    shape = *x.shape[:-1], padded.k
    values, indices = padded.values.reshape(shape), padded.indices.reshape(shape)
    return SparseCodes._trusted(values, indices, codes.n_features)


def _scaled_(
    rows: torch.Tensor, factor: float | torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """`rows *= factor weights[:, None]`."""
    if weights is None and isinstance(factor, float) and factor == 1:
        return rows
    return rows.mul_(factor if weights is None else (factor * weights)[:, None])


def unit_rows(
    n: int, d: int, dtype: torch.dtype, generator: torch.Generator | None
) -> torch.Tensor:
    """`[n, d]` random rows of norm 1."""
    rows = torch.randn(n, d, generator=generator, dtype=accumulate_dtype(dtype))
    rows /= torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows.to(dtype)
