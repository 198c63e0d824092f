# SPDX-License-Identifier: Apache-2.0
"""Exact top-k encode: `h = (x - b_dec) w_enc^T + b_enc`, the k best of `h * scale` per token.

Order: score descending, then feature ascending; NaN ranks first. ReLU follows the selection, so a
token with fewer than k positive winners carries zeros (with zero gradient) in the other slots.
Slots are stored by ascending feature. The N x F matrix is never formed.

How the CPU kernel is fast and exact. Scores are *screened* in 16 bits, before that in 8 where the
processor has dot products of bytes, and only candidates are computed exactly. With x^ and w^ the
rounded rows (per-row scale; bf16 for AMX, int16 elsewhere, int8 for the coarse screen),

    |<x, w> - <x^, w^>| = |<x - x^, w> + <x^, w - w^>| <= |x - x^| |w| + |x^| |w - w^|      (1)

by Cauchy-Schwarz, with the *computed* norms of the rounding errors, rounded up. On top of (1) come

  - accumulation: none for int16 (row norms stay below 2^15, so every partial sum is exact in
    int32, again by Cauchy-Schwarz) nor for bytes (numbers up to 127, rows up to 2^15 long); at
    most 2 d u |x^| |w^| for AMX's fp32 sums of bf16 products, where u = 2^-24 and rows are scaled
    to norms in 1..2, so that flushed denormals vanish beside it;
  - before rounding to bytes, columns of x are divided and those of w multiplied by c_j, the root
    of the ratio of their sizes in a sample, which leaves `<x, w>` but for 3 u |x| |w| of
    the products' rounding: a row is as fine as its largest number allows, and real activations have
    columns far larger than the others;
  - the fp32 evaluation of `(s^ c + b_enc) scale` and of the bound itself: with the 3 u above less
    than 16 u on every term.

Let e[n, f] be the sum of these. Then s - e and s + e bracket the true score, so with tau[n] the
k-th largest lower bound seen so far, a feature whose upper bound is below tau[n] has k features
above it and cannot be selected. Nor can one whose upper bound only equals tau: features come in
ascending order, and the first win ties. Everything else is kept and rescored: a dot product in
fp64 rounded once to fp32, whose order is the fp32 order that is returned. What passes in 8 bits is
screened again in 16 at once, by a dot product of its own; where too much passes (at the start, or
for adversarial rows) a block of tokens goes on in 16 bits (csrc/cpu/screen/coarse.h). Bounds that
are not finite (NaN, inf or a norm outside 2^-40..2^40) pass the screen by construction, and a full
candidate list is rescored on the spot, so the screen decides no case alone and no list overflows.

Scratch: one panel of w_enc (16 MB, 4 MB in two widths; three times that if its rows are strided)
and, for chunks of tokens that fit 64 MB, x^ and 4k + 64 candidates of 16 bytes per token. Time
O(N F d) in products of bytes, or of 16 bits.

On a GPU the same bound rides along in one fp16 product (mikernels/kernels/sae/encode_screen.py):
values and selection are those of the CPU, whatever memory is free. bf16 and fp16 inputs without
`scale` are ranked there, as in eager torch, by fp32 sums rounded to their dtype (`encode_plain`),
in products whose shape N, F and k decide alone. Scratch: 256 MB. Tokens of zeros (after b_dec) or
with a NaN take no longer than others, nor do a few whose scores tie in more than 2 k features;
where that is so for most tokens, all of F is scored in fp64 for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mikernels._autocast import in_own_dtype
from mikernels._crossover import Dense
from mikernels._dispatch import (
    Op,
    accumulate_dtype,
    check_floating,
    check_k,
    check_shape,
)
from mikernels.ops.sae.decode import decoded
from mikernels.ops.sae.gradients import feature_sums, weighted_row_sum
from mikernels.ops.select.row_topk import reference as row_topk_reference
from mikernels.ops.select.row_topk import row_topk_op
from mikernels.values.codes import SparseCodes


def scores(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    b_dec: torch.Tensor | None,
) -> torch.Tensor:
    """h [N, F] in the accumulation dtype."""
    acc = accumulate_dtype(x.dtype)
    centred = x.to(acc) if b_dec is None else x.to(acc) - b_dec.to(acc)
    h = centred @ w_enc.to(acc).T
    return h if b_enc is None else h + b_enc.to(acc)


def reference(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    b_dec: torch.Tensor | None,
    scale: torch.Tensor | None,
    k: int,
    relu: bool,
    top_k=row_topk_reference,
) -> tuple[torch.Tensor, torch.Tensor]:
    h = scores(x, w_enc, b_enc, b_dec)
    ranked = h if scale is None else h * scale.to(h.dtype)
    _, indices = top_k(ranked, k, False)
    values = h.gather(-1, indices)
    return (values.relu() if relu else values).to(x.dtype), indices


def by_product(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    b_dec: torch.Tensor | None,
    scale: torch.Tensor | None,
    k: int,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product and row_topk: with few features a slot little is left to screen out."""
    return reference(x, w_enc, b_enc, b_dec, scale, k, relu, row_topk_op.default)


def _fake(x, w_enc, b_enc, b_dec, scale, k, relu):
    shape = (x.shape[0], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


encode_op = Op(
    "encode(Tensor x, Tensor w_enc, Tensor? b_enc, Tensor? b_dec, Tensor? scale, SymInt k,"
    " bool relu) -> (Tensor values, Tensor indices)",
    reference,
    _fake,
    operands={
        "x": "T[N,d]",
        "w_enc": "T[F,d]",
        "b_enc": "T[F]",
        "b_dec": "T[d]",
        "scale": "T[F]",
        "k": "1..F",
    },
    triton="sae.encode:encode",
    dense=Dense("encode", by_product, lambda x, w_enc, b_enc, b_dec, scale, k, relu: (w_enc, k)),
)


def encode_gradients(
    dvalues: torch.Tensor,
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_dec: torch.Tensor | None,
    values: torch.Tensor,
    indices: torch.Tensor,
    row_offsets: torch.Tensor | None,
    relu: bool,
    need: Sequence[bool],
    impl: str,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, w_enc, b_enc and b_dec, as far as needed, from those of the codes' values."""
    if relu:
        # NaN passes, so that a diverged run shows it
        dvalues = dvalues.masked_fill(values == 0, 0)
    dx = dw = db_enc = db_dec = None
    if need[1] or need[2] or need[3]:
        centred = x if b_dec is None else x - b_dec
        dw, db_enc = feature_sums(dvalues, centred, indices, row_offsets, w_enc.shape[0], impl)
        if need[3]:
            db_dec = -weighted_row_sum(db_enc, w_enc).to(x.dtype)
    if need[0]:
        dx = decoded(dvalues, indices, row_offsets, w_enc, impl)
    return dx, dw if need[1] else None, db_enc if need[2] else None, db_dec


def check_operands(
    op: str,
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    b_dec: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> torch.Size:
    """The operands of an encoder fit each other; returns (F, d)."""
    check_floating(op, x=x, w_enc=w_enc, b_enc=b_enc, b_dec=b_dec, scale=scale)
    if w_enc.dim() != 2 or x.dim() < 1 or x.shape[-1] != w_enc.shape[1]:
        raise ValueError(
            f"{op}: expected x [..., d] and w_enc [F, d], got {list(x.shape)} and "
            f"{list(w_enc.shape)}; pass w_enc.T if it is stored as [d, F]"
        )
    n_features, d = w_enc.shape
    check_shape(op, "b_enc", b_enc, (n_features,))
    check_shape(op, "scale", scale, (n_features,))
    check_shape(op, "b_dec", b_dec, (d,))
    return w_enc.shape


class Encode(torch.autograd.Function):
    @staticmethod
    def forward(x, w_enc, b_enc, b_dec, scale, k, relu, impl):
        return encode_op(x, w_enc, b_enc, b_dec, scale, k, relu, impl=impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w_enc, _, b_dec, _, _, ctx.relu, ctx.impl = inputs
        ctx.save_for_backward(x, w_enc, b_dec, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @in_own_dtype
    def backward(ctx, dvalues, _):
        x, w_enc, b_dec, values, indices = ctx.saved_tensors
        saved = x, w_enc, b_dec, values, indices, None
        found = encode_gradients(dvalues, *saved, ctx.relu, ctx.needs_input_grad, ctx.impl)
        return *found, None, None, None, None


@in_own_dtype
def topk_encode(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None = None,
    *,
    k: int,
    b_dec: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    relu: bool = True,
    precision: torch.dtype | None = None,
    impl: str | None = None,
) -> SparseCodes:
    """The k best features of every token, exactly, without the tokens x features matrix.

    `h = (x - b_dec) w_enc^T + b_enc`; the k largest `h * scale` of each token are kept with value
    `relu(h)`. For fp32 inputs the selected set is that of fp32 scores; for
    16-bit inputs on a GPU, that of scores rounded to their dtype.

    Args:
        x: `[..., d]` activations; float32, bfloat16, float16 or float64, any strides.
        w_enc: `[F, d]` encoder directions as rows, any strides (pass `W.T` of a `[d, F]` matrix).
        b_enc: `[F]` or None.
        k: active features a token, 1..F; a run-time value.
        b_dec: `[d]` subtracted from x, or None.
        scale: `[F]` ranking weights, e.g. decoder norms; not differentiated.
        relu: clamp the winners at 0; slots at 0 get no gradient.
        precision: round x and the weights to this dtype first; None keeps theirs, also under
            autocast.
        impl: None (best for the device, dtype and k / F), "cpp", "triton" or "reference".

    Returns:
        SparseCodes with values `[..., k]` in the dtype of x and indices `[..., k]` int64 ascending.
        Gradients of any order: x, w_enc, b_enc, b_dec, from the k slots only, accumulated in fp32;
        the selection is constant.

    Raises:
        TypeError, ValueError: for dtypes, devices, shapes or k other than the above.

    Example:
        >>> x, w_enc = torch.randn(4, 16), torch.randn(64, 16)
        >>> codes = mk.topk_encode(x, w_enc, k=3)
        >>> codes.values.shape, codes.n_features
        (torch.Size([4, 3]), 64)
    """
    n_features, d = check_operands("topk_encode", x, w_enc, b_enc, b_dec, scale)
    check_k("topk_encode", k, n_features, "rows of w_enc")
    impl = encode_op.resolve(impl, x.device)
    out_dtype = x.dtype
    ranks = None if scale is None else scale.detach()
    rows = x.reshape(x.shape[:-1].numel(), d)
    operands: tuple[torch.Tensor | None, ...] = (rows, w_enc, b_enc, b_dec, ranks)
    if precision is not None:
        operands = tuple(None if t is None else t.to(precision) for t in operands)
    values, indices = Encode.apply(*operands, k, relu, impl)
    shape = (*x.shape[:-1], k)
    values = values.to(out_dtype).reshape(shape)
    return SparseCodes._trusted(values, indices.reshape(shape), n_features)
