# SPDX-License-Identifier: Apache-2.0
"""The fused step: the SAE's terms, one counting sort each, gradients by feature, clip, Adam.

No autograd graph. Gradient buffers live as long as the run, because fresh pages of F x d cost more
than the arithmetic on them. For every term (codes, dy, x) of the SAE's loss (`SAE.terms`), which is
already times the micro-batch's share of the step's tokens:

    dv = <dy, w_dec>,   dw_dec += sum value dy,   dw_enc += sum dv x,   db_enc += sum dv

or with dv as the term has it, and then db_dec = sum dy - w_enc^T db_enc: the last part is b_dec's
through the encoder's input, taken once a step from the summed db_enc.
Where nothing needs the gradients of the matrices (no clipping, no AuxK, one micro-batch), a GPU
applies them while they are in registers (`sae_update_`), and none is in memory.
A parameter whose requires_grad is False is neither moved nor part of the norm that is clipped.
Gradients are fp32 also for bfloat16 weights, where autograd rounds them to bfloat16.

A step of a variant that is not `shaped` and without AuxK never reads a device back and keeps its
shapes and addresses, so it can be recorded in a CUDA graph (mikernels/training/steps/graph.py). The
others cannot: how many slots are above their threshold, or features dead, decides the shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from mikernels.nn import SAE
from mikernels.nn.terms import Term
from mikernels.ops.sae.gradients import sae_gradients_op, weighted_row_sum
from mikernels.ops.sae.update import sae_update_op
from mikernels.optim import RowAdam
from mikernels.training.batches import shares
from mikernels.training.config import TrainConfig
from mikernels.training.optimizer import group_of, row_adam, same_settings
from mikernels.training.state.metrics import Clock, History, Means
from mikernels.values.batch import Batch


class Scratch:
    """The SAE's Workspace: memory that stays, since fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self.clock = Clock(History().parts)
        self._flat: dict[str, torch.Tensor] = {}

    def part(self, name: str) -> AbstractContextManager[None]:
        return self.clock.part(name)

    def buffer(self, name: str, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        flat, size = self._flat.get(name), shape.numel()
        if flat is None or (flat.dtype, flat.device) != (like.dtype, like.device):
            flat = self._flat[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        elif flat.numel() < size:
            # room for more: the number of dead features changes from step to step
            flat = self._flat[name] = flat.new_empty(2 * size)
        return flat[:size].view(shape)

    def tensors(self) -> list[torch.Tensor]:
        """The memory of a step without AuxK, the only kind that a graph holds."""
        return [flat for name, flat in self._flat.items() if name != "dead"]


class FusedStep:
    """One optimiser step from micro-batches.

    Args:
        sae: trained in place; float32 or bfloat16.
        config: of the run.
        optimizer: a RowAdam of the SAE's parameters, whose own clip_norm holds; None makes one.

    Raises:
        TypeError: for weights or an optimiser of another kind.
    """

    optimizer: RowAdam

    def __init__(
        self, sae: SAE, config: TrainConfig, optimizer: torch.optim.Optimizer | None = None
    ):
        dtype = config.weights_dtype(sae.w_dec.dtype)
        if dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(
                f"Trainer: step='fused' trains float32 or bfloat16 weights, got {dtype}; set dtype "
                f"in TrainConfig or use step='autograd'"
            )
        if optimizer is not None and not isinstance(optimizer, RowAdam):
            raise TypeError(
                f"Trainer: step='fused' needs a mikernels.optim.RowAdam, got "
                f"{type(optimizer).__name__}; use step='autograd' with it"
            )
        self.sae = sae
        self.optimizer = row_adam(sae, config) if optimizer is None else optimizer
        # made when first needed: sae_update_ does without those of the matrices
        self.gradients: dict[torch.Tensor, torch.Tensor] = {}
        # by bias: what reaches it past the encoder's input, in this step
        self._past_input: dict[torch.Tensor, torch.Tensor] = {}
        self._scratch = Scratch()

    @torch.no_grad()
    def __call__(
        self, batches: list[Batch], k: Any, dead: torch.Tensor, means: Means, clock: Clock
    ) -> None:
        """Train on float32 micro-batches; `dead` are the indices of AuxK's features."""
        self._scratch.clock = clock
        if len(batches) == 1 and self._updates_at_once(dead):
            self._update(batches[0], k, means)
            return
        for p in self.sae.parameters():
            if p not in self.gradients:
                self.gradients[p] = torch.zeros_like(p, dtype=torch.float32)
        self._past_input = {}
        for number, (batch, share) in enumerate(zip(batches, shares(batches), strict=True)):
            self._accumulate(batch, k, dead, share, number > 0, means)
        if self.sae.centred:
            with clock.part("gradients"):
                # b_dec's part through the encoder's input
                db_enc, db_dec = self.gradients[self.sae.b_enc], self.gradients[self.sae.b_dec]
                db_dec -= weighted_row_sum(db_enc, self.sae.w_enc)
        for bias, gradient in self._past_input.items():
            self.gradients[bias] += gradient
        with clock.part("optimizer"):
            self._apply(self.gradients)
            self.sae.project_()

    def buffers(self) -> Iterator[torch.Tensor]:
        """Every tensor that outlives a step and that a step reads or writes."""
        yield from self.sae.parameters()
        yield from self.gradients.values()
        yield from self.sae.buffers()
        yield from self._scratch.tensors()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def _apply(self, gradients: dict[torch.Tensor, torch.Tensor]) -> None:
        trained = {p: g for p, g in gradients.items() if p.requires_grad}
        self.optimizer.apply_gradients(trained)

    def _updates_at_once(self, dead: torch.Tensor) -> bool:
        """Whether Adam may run while a row's gradient is in registers: on a GPU, without clipping
        (the norm of all gradients comes first) and AuxK (which adds to them), for a variant whose
        loss is one plain term, and with the same settings for both matrices, neither frozen."""
        sae = self.sae
        if not (sae.plain and sae.w_dec.requires_grad and sae.w_enc.requires_grad):
            return False
        impl = sae_update_op.resolve(None, sae.w_dec.device)
        if impl != "triton" and not (impl == "auto" and sae.w_dec.is_cuda):
            return False
        if self.optimizer.clip_norm is not None or (dead.numel() and sae.config.aux_coefficient):
            return False
        decoder, encoder = (group_of(self.optimizer, p) for p in (sae.w_dec, sae.w_enc))
        if decoder is None or encoder is None or encoder["project"] or encoder["unit_norm"]:
            return False
        return same_settings(decoder, encoder)

    def _update(self, batch: Batch, k: Any, means: Means) -> None:
        """A whole step; the matrices' gradients stay in registers."""
        sae, optimizer, part = self.sae, self.optimizer, self._scratch.part
        found = sae.terms(batch, k, None, 1.0, self._scratch)
        codes, dy, x = found.terms[0][:3]
        optimizer.check_capture(list(sae.parameters()))
        made: dict[Any, torch.Tensor] = {}
        decoder, encoder = (group_of(optimizer, p) for p in (sae.w_dec, sae.w_enc))
        assert decoder is not None and encoder is not None  # _updates_at_once has seen to it
        moments_dec, settings = optimizer.advance(decoder, sae.w_dec, made)
        moments_enc, _ = optimizer.advance(encoder, sae.w_enc, made)
        with part("gradients"):
            db_enc, through_input = sae_update_op(
                codes.values.float(),
                codes.indices,
                *codes.by_feature(),
                codes.tokens,
                dy,
                x,
                sae.w_dec,
                sae.w_enc,
                *moments_dec,
                *moments_enc,
                None,
                None,
                *settings,
                torch.ones((), dtype=torch.float32, device=dy.device),
                decoder["project"],
                decoder["unit_norm"],
            )
        with part("optimizer"):
            d_b_dec = found.direct["b_dec"].sub_(through_input)
            self._apply({sae.b_enc: db_enc, sae.b_dec: d_b_dec})
        sae.track_(codes)
        means.add(batch, codes, found.values)

    def _accumulate(
        self,
        batch: Batch,
        k: Any,
        dead: torch.Tensor,
        share: float | torch.Tensor,
        accumulate: bool,
        means: Means,
    ) -> None:
        sae, gradients = self.sae, self.gradients
        found = sae.terms(batch, k, dead, share, self._scratch)
        with self._scratch.part("gradients"):
            written: set[int] = set()
            for term in found.terms:
                self._add_gradients(term, accumulate or term.part in written)
                written.add(term.part)
            by_terms = {id(p) for p in (sae.w_enc, sae.b_enc, *sae.decoders())}
            for name, p in sae.named_parameters():
                direct = found.direct.get(name)
                if id(p) not in by_terms and not accumulate:
                    gradients[p].zero_()
                if direct is None:
                    continue
                if id(p) in by_terms:
                    # a bias that acts on codes directly too: not through the encoder's input
                    self._past_input[p] = self._past_input.get(p, 0) + direct
                else:
                    gradients[p] += direct
            if found.shrink is not None:
                gradients[sae.w_dec].addcmul_(sae.w_dec, found.shrink[:, None])
            if found.rows is not None:
                features, dw_enc, db_enc = found.rows
                gradients[sae.w_enc].index_add_(0, features, dw_enc)
                gradients[sae.b_enc].index_add_(0, features, db_enc)
        sae.track_(found.codes)
        means.add(batch, found.codes, found.values)

    def _add_gradients(self, term: Term, accumulate: bool) -> None:
        sae, codes = self.sae, term.codes
        named = {"w_dec": sae.w_dec, "w_enc": sae.w_enc, "b_enc": sae.b_enc}
        dw_dec, dw_enc, db_enc = (
            sae.rows(name, self.gradients[p], term.part) for name, p in named.items()
        )
        sae_gradients_op(
            codes.values.float(),
            codes.indices,
            *codes.by_feature(),
            codes.tokens,
            term.dy,
            term.x,
            sae.rows("w_dec", sae.w_dec, term.part),
            term.levels,
            term.dh,
            dw_dec,
            dw_enc,
            db_enc,
            accumulate,
        )
