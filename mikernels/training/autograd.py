# SPDX-License-Identifier: Apache-2.0
"""The same step under autograd, with any torch optimiser: the operators, or plain dense PyTorch.

`SparseForward` is what a user would write with this library; `DenseForward` is what they write
without it: `relu(addmm)`, `torch.topk`, a scatter into tokens x F, a dense product, torch's Adam.
It is the baseline of the demo and the benchmarks.

How far they agree. In exact arithmetic the three steps are one function of (weights, batch). In
fp32 they round differently: losses agree to about 1e-7 in the first steps and 1e-6 over hundreds,
until a score within rounding of the k-th best selects another feature in one of them. That token's
loss then differs, and the runs part as two runs from nearby weights do: curves lie on each
other, weights are not equal. Larger batches hide a single selection better.
"""

from __future__ import annotations

from typing import Protocol

import torch

from mikernels.codes import SparseCodes
from mikernels.nn import SAEOutput, TopKSAE
from mikernels.nn.losses import aux_per_square, spread
from mikernels.training.config import TrainConfig
from mikernels.training.metrics import Clock, Means
from mikernels.training.optimizer import row_adam


class Forward(Protocol):
    """Codes, reconstruction and losses of a batch `[n, d]`, with AuxK on the features `dead`."""

    def __call__(
        self, sae: TopKSAE, x: torch.Tensor, k: int, dead: torch.Tensor, clock: Clock
    ) -> SAEOutput: ...


def sparse_forward(
    sae: TopKSAE, x: torch.Tensor, k: int, dead: torch.Tensor, clock: Clock
) -> SAEOutput:
    """This library's operators."""
    with clock.part("encode"):
        codes = sae.encode(x, k)
    with clock.part("decode"):
        y = sae.decode(codes)
    return sae.score(x, codes, y, dead)


def dense_forward(
    sae: TopKSAE, x: torch.Tensor, k: int, dead: torch.Tensor, clock: Clock
) -> SAEOutput:
    """Plain PyTorch, with tokens x F matrices, as SAE libraries compute it."""
    with clock.part("encode"):
        h = torch.addmm(sae.b_enc, x - sae.b_dec, sae.w_enc.T).relu()
        values, indices = h.topk(k, dim=-1, sorted=False)
        acts = torch.zeros_like(h).scatter(-1, indices, values)
    with clock.part("decode"):
        y = acts @ sae.w_dec + sae.b_dec
    none = torch.empty(0, dtype=torch.int64, device=x.device)
    out = sae.score(x, SparseCodes(values, indices, sae.config.n_features), y, none)
    if not dead.numel() or not sae.config.aux_coefficient:
        return out
    assert sae.config.k_aux is not None
    with clock.part("encode"):
        is_dead = torch.zeros(h.shape[-1], dtype=torch.bool, device=h.device)
        is_dead[dead] = True
        best = h.where(is_dead, -torch.inf).topk(min(sae.config.k_aux, dead.numel()), sorted=False)
        acts = torch.zeros_like(h).scatter(-1, best.indices, best.values)
    with clock.part("decode"):
        revived = acts @ sae.w_dec
    r = (x - y).detach()
    scale = aux_per_square(sae.config.loss, x.shape[0], spread(x), spread(r))
    aux_loss = (revived - r).square().sum() * scale
    return out._replace(loss=out.loss + sae.config.aux_coefficient * aux_loss, aux_loss=aux_loss)


class AutogradStep:
    """One optimiser step from micro-batches, by `loss.backward()`.

    Projection of the decoder's gradient, clipping, the optimiser and renormalisation, in the order
    of dictionary_learning and sparsify.

    Args:
        sae: trained in place.
        config: of the run.
        optimizer: of the SAE's parameters. None makes torch.optim.Adam; for low-precision weights,
            whose state torch would keep in low precision, a RowAdam.
        forward: `sparse_forward` or `dense_forward`.
    """

    def __init__(
        self,
        sae: TopKSAE,
        config: TrainConfig,
        optimizer: torch.optim.Optimizer | None = None,
        forward: Forward = sparse_forward,
    ):
        dtype = config.weights_dtype(sae.w_dec.dtype)
        low = dtype.itemsize < 4
        if forward is dense_forward and low:
            raise TypeError(
                f"Trainer: step='dense' is the float32 baseline, got {dtype} weights; leave dtype "
                f"out of TrainConfig or use step='autograd'"
            )
        self.sae = sae
        self.clip_norm = config.clip_norm
        self.forward = forward
        if optimizer is None and low:
            optimizer = row_adam(sae, config)
        self.optimizer = optimizer or torch.optim.Adam(
            sae.parameters(),
            lr=config.peak_lr(sae.config.n_features),
            betas=config.betas,
            eps=config.eps,
        )

    def __call__(
        self, batches: list[torch.Tensor], k: int, dead: torch.Tensor, means: Means, clock: Clock
    ) -> None:
        """Train on float32 micro-batches `[n, d]`; `dead` are the indices of AuxK's features."""
        sae = self.sae
        # a gradient that somebody left, on a frozen parameter too, is not this step's
        sae.zero_grad(set_to_none=True)
        total = sum(x.shape[0] for x in batches)
        for x in batches:
            out = self.forward(sae, x, k, dead, clock)
            with clock.part("gradients"):
                (out.loss * (x.shape[0] / total)).backward()
            sae.track_fired_(out.codes)
            means.add(out.codes, loss=out.loss, mse=out.mse, fvu=out.fvu, aux_loss=out.aux_loss)
        with clock.part("optimizer"):
            constrained = sae.config.normalize_decoder and sae.w_dec.requires_grad
            if constrained:
                sae.remove_parallel_gradient_()
            if self.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(sae.parameters(), self.clip_norm)
            self.optimizer.step()
            if constrained:
                sae.normalize_decoder_()
            self.optimizer.zero_grad(set_to_none=True)
