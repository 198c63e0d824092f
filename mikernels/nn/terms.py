# SPDX-License-Identifier: Apache-2.0
"""What a batch's loss is made of when it is trained on without autograd."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch

from mikernels.values.codes import SparseCodes


class Levels(NamedTuple):
    """Nested reconstructions: level p is made of the features whose level is at most p.

    Attributes:
        of_feature: `[F]` int64, the first level that a feature belongs to.
        mix: `[L, L]` float32: the gradient at the output of the features of level g is
            `sum_p mix[g, p] e_p`, with the residual e_p of level p, in units of the main loss.
        weights: `[L]` float32: the main loss is `sum_p weights[p] |e_p|^2` in its own unit.
    """

    of_feature: torch.Tensor
    mix: torch.Tensor
    weights: torch.Tensor


class Term(NamedTuple):
    """A part of the loss: by feature, dw_dec += values dy and dw_enc += dh x, db_enc += dh.

    Attributes:
        codes: of N tokens.
        dy: `[N, d_out]` float32, the gradient at their output; with levels `[L, N, d_out]`.
        x: `[N, d]` float32, what the encoder's rows were multiplied with.
        dh: of the shape of the codes' values, float32, the gradient at the pre-activations; None
            where it is <dy, w_dec>: codes that are their pre-activations, with no other loss.
        levels: `[F]` int64: which of dy's rows is a feature's.
        part: of the weights, for a variant that has several encoders (`SAE.rows`).
    """

    codes: SparseCodes
    dy: torch.Tensor
    x: torch.Tensor
    dh: torch.Tensor | None = None
    levels: torch.Tensor | None = None
    part: int = 0


class DeadRows(NamedTuple):
    """Gradients of some features' rows: `w_enc.grad[features] += dw_enc`, and the bias's."""

    features: torch.Tensor
    dw_enc: torch.Tensor
    db_enc: torch.Tensor


class Terms(NamedTuple):
    """A batch's loss without autograd.

    Attributes:
        codes: of the batch.
        terms: the first is the reconstruction.
        direct: gradients of whole parameters by name, beside those of the terms; b_dec's is that
            of a bias of the output.
        values: loss, mse, fvu, aux_loss and sparsity, 0-dim.
        shrink: `[F]`: `w_dec.grad[f] += shrink[f] w_dec[f]`, from penalties on decoder norms.
        rows: what reaches the rows of dead features past the terms.
    """

    codes: SparseCodes
    terms: list[Term]
    direct: dict[str, torch.Tensor]
    values: dict[str, torch.Tensor]
    shrink: torch.Tensor | None = None
    rows: DeadRows | None = None


class Workspace(Protocol):
    """Buffers that outlive a step, and its clock."""

    def part(self, name: str) -> AbstractContextManager[None]:
        """Time that belongs to "encode", "decode", ..."""
        ...

    def buffer(self, name: str, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        """Scratch of `like`'s dtype and device, the same memory every time."""
        ...
