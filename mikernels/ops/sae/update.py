# SPDX-License-Identifier: Apache-2.0
"""The fused update: an SAE's by-feature gradients, applied by Adam while a row is in registers.

`sae_gradients_` and then `adam_rows_` on both weight matrices, in one pass over the features:

    dw_dec[f], dw_enc[f], db_enc[f]     as sae_gradients_ (mikernels/ops/sae/gradients.py)
    w_dec[f] <- Adam, between the projection (`project`) and the renormalisation (`unit_norm`)
    w_enc[f] <- Adam                    both with `clip` (mikernels/ops/sae/adam.py)
    shadow_dec[f], shadow_enc[f]        the new rows in another dtype, for the next forward
    db_enc[f], d_input = sum_f db_enc[f] w_enc_old[f]     returned; neither is clipped or applied

b_dec's gradient is sum dy - d_input. On a GPU no F x d gradient is ever in memory: 24 bytes a
parameter (weight and two moments, read and written), 26 with a bf16 shadow, where gradients in
memory take 32 and a cast 6 more. Features without slots are updated with a gradient of zero.
Deterministic: no atomics, sums in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mikernels._dispatch import Op, accumulate_dtype
from mikernels.ops.sae import adam
from mikernels.ops.sae.gradients import (
    BY_FEATURE,
    sae_gradients_op,
    sae_gradients_reference,
    weighted_row_sum_op,
    weighted_row_sum_reference,
)


def _compose(
    sae_gradients: Callable[..., None],
    row_sum: Callable[..., torch.Tensor],
    adam_rows: Callable[..., None],
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def update(
        values: torch.Tensor,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        order: torch.Tensor,
        tokens: torch.Tensor | None,
        dy: torch.Tensor,
        x: torch.Tensor,
        w_dec: torch.Tensor,
        w_enc: torch.Tensor,
        m_dec: torch.Tensor,
        v_dec: torch.Tensor,
        m_enc: torch.Tensor,
        v_enc: torch.Tensor,
        shadow_dec: torch.Tensor | None,
        shadow_enc: torch.Tensor | None,
        lr: torch.Tensor,
        beta1: float,
        beta2: float,
        eps: float,
        step: torch.Tensor,
        clip: torch.Tensor,
        project: bool,
        unit_norm: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        acc = accumulate_dtype(w_dec.dtype)
        dw_dec, dw_enc = (w_dec.new_empty(w_dec.shape, dtype=acc) for _ in range(2))
        db_enc = w_dec.new_empty(w_dec.shape[0], dtype=acc)
        slots = values, indices, offsets, order, tokens
        sae_gradients(*slots, dy, x, w_dec, None, None, dw_dec, dw_enc, db_enc, False)
        d_input = row_sum(db_enc, w_enc)
        settings = lr, beta1, beta2, eps, step, clip
        adam_rows(w_dec, dw_dec, m_dec, v_dec, *settings, project, unit_norm)
        adam_rows(w_enc, dw_enc, m_enc, v_enc, *settings, False, False)
        for shadow, weight in ((shadow_dec, w_dec), (shadow_enc, w_enc)):
            if shadow is not None:
                shadow.copy_(weight)
        return db_enc, d_input

    return update


reference = _compose(sae_gradients_reference, weighted_row_sum_reference, adam.reference)
# looked up at each call, since a call log replaces `default` while it is on
_by_operators = _compose(
    lambda *args: sae_gradients_op.default(*args),
    lambda *args: weighted_row_sum_op.default(*args),
    lambda *args: adam.adam_rows_op.default(*args),
)


def _on_cpu(*args):
    # the extension's gradients are float32
    return (reference if args[7].dtype == torch.float64 else _by_operators)(*args)


def _fake(*args):
    w_dec = args[7]
    acc = accumulate_dtype(w_dec.dtype)
    return w_dec.new_empty(w_dec.shape[0], dtype=acc), w_dec.new_empty(w_dec.shape[1], dtype=acc)


# weights and moments are contiguous, moments float32 (float64 for float64 weights)
sae_update_op = Op(
    "sae_update_(Tensor values, Tensor indices, Tensor offsets, Tensor order, Tensor? tokens,"
    " Tensor dy, Tensor x, Tensor(a!) w_dec, Tensor(b!) w_enc, Tensor(c!) m_dec, Tensor(d!) v_dec,"
    " Tensor(e!) m_enc, Tensor(f!) v_enc, Tensor(g!)? shadow_dec, Tensor(h!)? shadow_enc,"
    " Tensor lr, float beta1, float beta2, float eps, Tensor step, Tensor clip, bool project,"
    " bool unit_norm) -> (Tensor db_enc, Tensor d_input)",
    reference,
    _fake,
    operands={
        **BY_FEATURE,
        "dy": "T[N,d]",
        "x": "T[N,d]",
        "w_dec": "U[F,d]",
        "w_enc": "U[F,d]",
        "m_dec": "float[F,d]",
        "v_dec": "float[F,d]",
        "m_enc": "float[F,d]",
        "v_enc": "float[F,d]",
        "shadow_dec": "float[F,d]",
        "shadow_enc": "float[F,d]",
        "lr": "float[]",
        "step": "number[]",
        "clip": "float[]",
    },
    triton="sae.update:sae_update_",
    cpu=_on_cpu,
)
