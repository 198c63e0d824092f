# SPDX-License-Identifier: Apache-2.0
"""The fused step: encode, decode, residual, one counting sort, gradients by feature, clip, Adam.

No autograd graph. Gradient buffers live as long as the run, because fresh pages of F x d cost more
than the arithmetic on them.

With e = y - x and s the derivative of the loss by |e|^2 (`per_square` of mikernels/nn/losses.py),
times the micro-batch's share of the step's tokens:

    dy = 2 s e,   dv = <dy, w_dec>,   dw_dec = sum value dy,   dw_enc = sum dv (x - b_dec),
    db_enc = sum dv,   db_dec = sum dy - w_enc^T db_enc

The last term is b_dec's part through the encoder's input, taken once a step from the summed db_enc.
AuxK adds a second pass over the same buffers, with the dead features' codes against the residual.
Where nothing needs the gradients of the matrices (no clipping, no AuxK, one micro-batch), a GPU
applies them while they are in registers (`sae_update_`), and none is in memory.
A parameter whose requires_grad is False is neither moved nor part of the norm that is clipped.
Gradients are fp32 also for bfloat16 weights, where autograd rounds them to bfloat16.

A step without AuxK never reads a device back and keeps its shapes and addresses, so it can be
recorded in a CUDA graph (`mikernels.training.graph`). AuxK cannot: the number of dead features, a
result of the steps before, decides the shapes of its pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mikernels._dispatch import resolve_impl
from mikernels.codes import SparseCodes
from mikernels.nn import TopKSAE
from mikernels.nn.losses import aux_per_square, per_square, reciprocal, spread, sum_squares
from mikernels.ops.decode import decode_error, sparse_decode
from mikernels.ops.encode import topk_encode
from mikernels.ops.gradients import sae_gradients_op, weighted_row_sum
from mikernels.ops.update import sae_update_op
from mikernels.optim import RowAdam
from mikernels.training.config import TrainConfig
from mikernels.training.metrics import Clock, Means
from mikernels.training.optimizer import group_of, row_adam, same_settings


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
        self, sae: TopKSAE, config: TrainConfig, optimizer: torch.optim.Optimizer | None = None
    ):
        if sae.w_dec.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(
                f"Trainer: step='fused' trains float32 or bfloat16 weights, got {sae.w_dec.dtype}; "
                f"set dtype in TrainConfig or use step='autograd'"
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
        self._centred = torch.empty(0, dtype=torch.float32)
        self._dead_rows = torch.empty(0, dtype=torch.float32)

    @torch.no_grad()
    def __call__(
        self, batches: list[torch.Tensor], k: int, dead: torch.Tensor, means: Means, clock: Clock
    ) -> None:
        """Train on float32 micro-batches `[n, d]`; `dead` are the indices of AuxK's features."""
        if len(batches) == 1 and self._updates_at_once(dead):
            self._update(batches[0], k, means, clock)
            return
        for p in self._parameters():
            if p not in self.gradients:
                self.gradients[p] = torch.zeros_like(p, dtype=torch.float32)
        total = sum(x.shape[0] for x in batches)
        for number, x in enumerate(batches):
            self._accumulate(x, k, dead, x.shape[0] / total, number > 0, means, clock)
        with clock.part("gradients"):
            self._input_bias_gradient()
        with clock.part("optimizer"):
            self._apply(self.gradients)

    def buffers(self) -> Iterator[torch.Tensor]:
        """Every tensor that outlives a step and that a step reads or writes."""
        yield from self._parameters()
        yield from self.gradients.values()
        yield self.sae.tokens_since_fired
        yield self._centred
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def _parameters(self) -> tuple[torch.Tensor, ...]:
        return self.sae.w_dec, self.sae.w_enc, self.sae.b_enc, self.sae.b_dec

    def _apply(self, gradients: dict[torch.Tensor, torch.Tensor]) -> None:
        trained = {p: g for p, g in gradients.items() if p.requires_grad}
        self.optimizer.apply_gradients(trained)

    def _updates_at_once(self, dead: torch.Tensor) -> bool:
        """Whether Adam may run while a row's gradient is in registers: on a GPU, without clipping
        (the norm of all gradients comes first) and AuxK (which adds to them), and with the same
        settings for both matrices, neither of them frozen."""
        sae = self.sae
        if not (sae.w_dec.requires_grad and sae.w_enc.requires_grad):
            return False
        impl = resolve_impl(sae_update_op, None, sae.w_dec.device)
        if impl != "triton" and not (impl == "auto" and sae.w_dec.is_cuda):
            return False
        if self.optimizer.clip_norm is not None or (dead.numel() and sae.config.aux_coefficient):
            return False
        decoder, encoder = (group_of(self.optimizer, p) for p in (sae.w_dec, sae.w_enc))
        if decoder is None or encoder is None or encoder["project"] or encoder["unit_norm"]:
            return False
        return same_settings(decoder, encoder)

    def _update(self, x: torch.Tensor, k: int, means: Means, clock: Clock) -> None:
        """A whole step; the matrices' gradients stay in registers."""
        sae, optimizer = self.sae, self.optimizer
        codes, dy, centred, _, losses = self._forward(x, k, None, 1.0, clock)
        optimizer.check_capture(list(self._parameters()))
        made: dict[Any, torch.Tensor] = {}
        decoder, encoder = (group_of(optimizer, p) for p in (sae.w_dec, sae.w_enc))
        assert decoder is not None and encoder is not None  # _updates_at_once has seen to it
        moments_dec, settings = optimizer.advance(decoder, sae.w_dec, made)
        moments_enc, _ = optimizer.advance(encoder, sae.w_enc, made)
        with clock.part("gradients"):
            db_enc, through_input = sae_update_op(
                codes.values.float(),
                codes.indices,
                *codes.by_feature(),
                codes.tokens,
                dy,
                centred,
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
                impl=resolve_impl(sae_update_op, None, dy.device),
            )
        with clock.part("optimizer"):
            db_dec = dy.sum(0).sub_(through_input)
            self._apply({sae.b_enc: db_enc, sae.b_dec: db_dec})
        sae.track_fired_(codes)
        means.add(codes, **losses)

    def _forward(
        self, x: torch.Tensor, k: int, dead: torch.Tensor | None, share: float, clock: Clock
    ) -> tuple[
        SparseCodes,
        torch.Tensor,
        torch.Tensor,
        tuple[SparseCodes, torch.Tensor] | None,
        dict[str, torch.Tensor],
    ]:
        """Codes, dy, the centred input, AuxK's (codes, dy), and the losses."""
        sae = self.sae
        with clock.part("encode"):
            codes = sae.encode(x, k)
        with clock.part("decode"):
            error, squares = decode_error(codes, sae.w_dec, sae.b_dec, x)
        squares = squares.sum()
        # the mean's buffer is free again before the centred input is needed
        variance = spread(x, out=self._scratch(x))
        mse, fvu = squares / x.shape[0], squares * reciprocal(variance)
        rounded = x.to(sae.w_dec.dtype).float()
        centred = torch.sub(rounded, sae.b_dec.float(), out=self._scratch(x))
        loss = mse if sae.config.loss == "mse" else fvu
        aux_loss = torch.zeros_like(mse)
        aux = None
        if dead is not None and dead.numel() and sae.config.aux_coefficient:
            by_square = aux_per_square(sae.config.loss, x.shape[0], variance, spread(error))
            aux_codes, aux_error = self._auxiliary(x, error, dead, clock)
            aux_loss = sum_squares(aux_error) * by_square
            loss = loss + sae.config.aux_coefficient * aux_loss
            aux = aux_codes, aux_error.mul_(2 * share * sae.config.aux_coefficient * by_square)
        dy = error.mul_(2 * share * per_square(sae.config.loss, x.shape[0], variance))
        losses = {"loss": loss, "mse": mse, "fvu": fvu, "aux_loss": aux_loss}
        return codes, dy, centred, aux, losses

    def _accumulate(
        self,
        x: torch.Tensor,
        k: int,
        dead: torch.Tensor,
        share: float,
        accumulate: bool,
        means: Means,
        clock: Clock,
    ) -> None:
        codes, dy, centred, aux, losses = self._forward(x, k, dead, share, clock)
        with clock.part("gradients"):
            self._add_gradients(codes, dy, centred, accumulate)
            db_dec = self.gradients[self.sae.b_dec]
            if accumulate:
                db_dec += dy.sum(0)
            else:
                torch.sum(dy, 0, out=db_dec)
            if aux is not None:
                self._add_gradients(*aux, centred, True)
        self.sae.track_fired_(codes)
        means.add(codes, **losses)

    def _add_gradients(
        self, codes: SparseCodes, dy: torch.Tensor, centred: torch.Tensor, accumulate: bool
    ) -> None:
        sae = self.sae
        outputs = (self.gradients[p] for p in (sae.w_dec, sae.w_enc, sae.b_enc))
        sae_gradients_op(
            codes.values.float(),
            codes.indices,
            *codes.by_feature(),
            codes.tokens,
            dy,
            centred,
            sae.w_dec,
            *outputs,
            accumulate,
            impl=resolve_impl(sae_gradients_op, None, dy.device),
        )

    def _auxiliary(
        self, x: torch.Tensor, error: torch.Tensor, dead: torch.Tensor, clock: Clock
    ) -> tuple[SparseCodes, torch.Tensor]:
        """Codes of the dead features (global indices), and what they leave of the residual."""
        sae = self.sae
        assert sae.config.k_aux is not None
        with clock.part("encode"):
            compact = topk_encode(
                x.to(sae.w_enc.dtype),
                self._rows_of(dead),
                sae.b_enc[dead],
                k=min(sae.config.k_aux, dead.numel()),
                b_dec=sae.b_dec,
            )
            codes = SparseCodes(compact.values, dead[compact.indices], sae.config.n_features)
        with clock.part("decode"):
            y = sparse_decode(codes, sae.w_dec).float()
        # y - r with the residual r = -error, which is a constant
        return codes, y.add_(error)

    def _input_bias_gradient(self) -> None:
        sae = self.sae
        db_enc, db_dec = self.gradients[sae.b_enc], self.gradients[sae.b_dec]
        db_dec -= weighted_row_sum(db_enc, sae.w_enc)

    def _scratch(self, x: torch.Tensor) -> torch.Tensor:
        if self._centred.shape != x.shape or self._centred.device != x.device:
            self._centred = torch.empty_like(x, dtype=torch.float32)
        return self._centred

    def _rows_of(self, dead: torch.Tensor) -> torch.Tensor:
        w_enc = self.sae.w_enc.detach()
        if self._dead_rows.shape[0] < dead.numel() or self._dead_rows.dtype != w_enc.dtype:
            self._dead_rows = w_enc.new_empty(min(w_enc.shape[0], 2 * dead.numel()), w_enc.shape[1])
        return torch.index_select(w_enc, 0, dead, out=self._dead_rows[: dead.numel()])
