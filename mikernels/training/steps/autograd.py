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

from typing import Any, Protocol

import torch

from mikernels.nn import SAE, SAEOutput
from mikernels.training.batches import shares
from mikernels.training.config import TrainConfig
from mikernels.training.optimizer import row_adam
from mikernels.training.state.metrics import Clock, Means
from mikernels.values.batch import Batch


class Forward(Protocol):
    """Codes, reconstruction and losses of a batch, with AuxK on the features `dead`."""

    def __call__(
        self, sae: SAE, batch: Batch, k: Any, dead: torch.Tensor, clock: Clock
    ) -> SAEOutput: ...


def sparse_forward(sae: SAE, batch: Batch, k: Any, dead: torch.Tensor, clock: Clock) -> SAEOutput:
    """This library's operators."""
    return sae.run(batch, k, dead, clock)


def dense_forward(sae: SAE, batch: Batch, k: Any, dead: torch.Tensor, clock: Clock) -> SAEOutput:
    """Plain PyTorch, with tokens x F matrices, as SAE libraries compute it."""
    return sae.dense_run(batch, k, dead, clock)


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
        sae: SAE,
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
        self, batches: list[Batch], k: Any, dead: torch.Tensor, means: Means, clock: Clock
    ) -> None:
        """Train on float32 micro-batches; `dead` are the indices of AuxK's features."""
        sae = self.sae
        # a gradient that somebody left, on a frozen parameter too, is not this step's
        sae.zero_grad(set_to_none=True)
        for batch, share in zip(batches, shares(batches), strict=True):
            out = self.forward(sae, batch, k, dead, clock)
            with clock.part("gradients"):
                (out.loss * share).backward()
            sae.track_(out.codes)
            means.add(batch, out.codes, out._asdict())
        with clock.part("optimizer"):
            constrained = any(p.requires_grad for p in sae.constrained())
            if constrained:
                sae.remove_parallel_gradient_()
            if self.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(sae.parameters(), self.clip_norm)
            self.optimizer.step()
            if constrained:
                sae.normalize_decoder_()
            sae.project_()
            self.optimizer.zero_grad(set_to_none=True)
