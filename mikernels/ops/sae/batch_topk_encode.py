# SPDX-License-Identifier: Apache-2.0
"""BatchTopK encode: `h = (x - b_dec) w_enc^T + b_enc`, the `total` best of `h * scale` in a batch.

With total = int(k N) a token has k features on average, and as many as it needs (BatchTopK,
arXiv 2412.06410). Order: score descending, then flat position `token * F + feature` ascending; NaN
ranks first. ReLU follows the selection, so pairs that are not positive are kept as zeros, with zero
gradient, where there are fewer than `total` positive ones. Slots are stored by token, then by
feature.

On the CPU the screen of mikernels/ops/sae/encode.py finds the pairs, with one bound for the whole
batch in place of one for each token: tau, which every thread may raise, is at most the total-th
largest lower bound of the pairs seen, so a pair whose upper bound is below it has `total` pairs
above it.
Neither the N x F matrix nor a sort of it is made. Scratch: encode's panels, 64 MB of packed tokens
at most, and some 100 bytes for each of the `total` pairs. On a GPU the scores of a few tokens at a
time are torch's own product, without the matrix either (kernels/sae/batch_topk_encode.py).
"""

from __future__ import annotations

import math

import torch

from mikernels._autocast import in_own_dtype
from mikernels._dispatch import Op, accumulate_dtype
from mikernels.ops.sae.encode import check_operands, encode_gradients, scores
from mikernels.ops.select.row_topk import reference as row_topk_reference
from mikernels.values.codes import SparseCodes


def reference(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    b_dec: torch.Tensor | None,
    scale: torch.Tensor | None,
    total: int,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    h = scores(x, w_enc, b_enc, b_dec)
    n, f = h.shape
    ranked = h if scale is None else h * scale.to(h.dtype)
    best, flat = (t[0] for t in row_topk_reference(ranked.reshape(1, n * f), total, False))
    values = h.reshape(-1).gather(0, flat)
    # NaN ranks first, so only among NaN is the last one NaN
    worst = best.masked_fill(best.isnan(), torch.inf).amin() if total else h.new_tensor(torch.inf)
    threshold = torch.where(best.isnan().all() & (total > 0), torch.nan, worst)
    bounds = torch.arange(n + 1, device=x.device) * f
    row_offsets = torch.searchsorted(flat, bounds)
    if relu:
        values, threshold = values.relu(), threshold.relu()
    return values.to(x.dtype), flat % max(f, 1), row_offsets, threshold


def _fake(x, w_enc, b_enc, b_dec, scale, total, relu):
    return (
        x.new_empty(total),
        x.new_empty(total, dtype=torch.int64),
        x.new_empty(x.shape[0] + 1, dtype=torch.int64),
        x.new_empty((), dtype=accumulate_dtype(x.dtype)),
    )


batch_topk_encode_op = Op(
    "batch_topk_encode(Tensor x, Tensor w_enc, Tensor? b_enc, Tensor? b_dec, Tensor? scale,"
    " SymInt total, bool relu)"
    " -> (Tensor values, Tensor indices, Tensor row_offsets, Tensor threshold)",
    reference,
    _fake,
    operands={
        "x": "T[N,d]",
        "w_enc": "T[F,d]",
        "b_enc": "T[F]",
        "b_dec": "T[d]",
        "scale": "T[F]",
        "total": "0..N*F",
    },
    triton="sae.batch_topk_encode:batch_topk_encode",
)


class _BatchEncode(torch.autograd.Function):
    @staticmethod
    def forward(x, w_enc, b_enc, b_dec, scale, total, relu, impl):
        return batch_topk_encode_op(x, w_enc, b_enc, b_dec, scale, total, relu, impl=impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w_enc, _, b_dec, _, _, ctx.relu, ctx.impl = inputs
        values, indices, row_offsets, threshold = output
        ctx.save_for_backward(x, w_enc, b_dec, values, indices, row_offsets)
        ctx.mark_non_differentiable(indices, row_offsets, threshold)

    @staticmethod
    @in_own_dtype
    def backward(ctx, dvalues, *_):
        x, w_enc, b_dec, values, indices, row_offsets = ctx.saved_tensors
        saved = x, w_enc, b_dec, values, indices, row_offsets
        found = encode_gradients(dvalues, *saved, ctx.relu, ctx.needs_input_grad, ctx.impl)
        return *found, None, None, None, None


@in_own_dtype
def batch_topk_encode(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None = None,
    *,
    k: float,
    b_dec: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    relu: bool = True,
    impl: str | None = None,
) -> tuple[SparseCodes, torch.Tensor]:
    """The int(k N) best features of a batch of N tokens, exactly.

    `h = (x - b_dec) w_enc^T + b_enc`; the int(k N) pairs of token and feature with the largest
    `h * scale` are kept with value `relu(h)` (BatchTopK, arXiv 2412.06410). For fp32 inputs the
    selected set is that of fp32 scores.

    Args:
        x: `[..., d]` activations, N tokens in all; float32, bfloat16, float16 or float64, any
            strides.
        w_enc: `[F, d]` encoder directions as rows, any strides (pass `W.T` of a `[d, F]` matrix).
        b_enc: `[F]` or None.
        k: mean active features a token, above 0 and at most F; a fraction counts.
        b_dec: `[d]` subtracted from x, or None.
        scale: `[F]` ranking weights, e.g. decoder norms; not differentiated.
        relu: clamp the winners at 0; slots at 0 get no gradient.
        impl: None (best for the device), "cpp", "triton" or "reference".

    Returns:
        Ragged SparseCodes of the N tokens: values `[int(k N)]` in the dtype of x, by token, indices
        ascending within one. Gradients of any order: x, w_enc, b_enc, b_dec, from the kept slots
        only, accumulated in fp32; the selection is constant.

        threshold, 0-dim in the accumulation dtype: the smallest score that was kept, after ReLU if
        `relu`; inf if int(k N) is 0. What BatchTopK's running threshold averages.

    Raises:
        TypeError, ValueError: for dtypes, devices, shapes or k other than the above.

    Example:
        >>> x, w_enc = torch.randn(4, 16), torch.randn(64, 16)
        >>> codes, threshold = mk.batch_topk_encode(x, w_enc, k=2.5)
        >>> len(codes.values), bool((codes.values >= threshold).all())
        (10, True)
    """
    n_features, _ = check_operands("batch_topk_encode", x, w_enc, b_enc, b_dec, scale)
    if isinstance(k, bool) or not isinstance(k, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"batch_topk_encode: k must be a number, got {type(k).__name__}")
    if not (0 < k <= n_features) or not math.isfinite(k):
        raise ValueError(
            f"batch_topk_encode: k must be above 0 and at most {n_features} (rows of w_enc), got "
            f"{k}"
        )
    total = torch.sym_int(k * x.shape[:-1].numel())
    return batch_topk_total(
        x, w_enc, b_enc, total=total, b_dec=b_dec, scale=scale, relu=relu, impl=impl
    )


@in_own_dtype
def batch_topk_total(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    *,
    total: int,
    b_dec: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    relu: bool = True,
    impl: str | None = None,
) -> tuple[SparseCodes, torch.Tensor]:
    """`batch_topk_encode` of checked operands, for a number of pairs in all."""
    n_features, d = w_enc.shape
    impl = batch_topk_encode_op.resolve(impl, x.device)
    rows = x.reshape(x.shape[:-1].numel(), d)
    ranks = None if scale is None else scale.detach()
    values, indices, row_offsets, threshold = _BatchEncode.apply(
        rows, w_enc, b_enc, b_dec, ranks, total, relu, impl
    )
    return SparseCodes._trusted(values, indices, n_features, row_offsets), threshold
