# SPDX-License-Identifier: Apache-2.0
"""Sparse decode: `y[n] = sum_j values[n, j] w_dec[indices[n, j]] + b_dec`.

With `prefixes = [F1, F2, ...]` it returns one reconstruction per prefix, each from the features
below F_p only (Matryoshka). Sums run over the slots in stored order, in fp32; O(N k d) time, no
temporary beyond the output. A slot whose value is 0 is inactive and adds nothing, whatever its row
holds; otherwise NaN and inf in a value or a row propagate to that token. Where k / F is not small
the product with the scattered codes may be faster and takes its place: there a row that is not
finite reaches every token.

Codes are padded, `[N, k]`, or ragged, `[S]` with `row_offsets` (mikernels/_ragged.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mikernels._autocast import in_own_dtype
from mikernels._crossover import Dense
from mikernels._dispatch import Op, accumulate_dtype, check_floating, check_shape
from mikernels._ragged import n_tokens, tokens_of
from mikernels.ops.sae.gradients import SLOTS, feature_sums, gather_dots

if TYPE_CHECKING:
    from mikernels.values.codes import SparseCodes


def reference(
    values: torch.Tensor,
    indices: torch.Tensor,
    row_offsets: torch.Tensor | None,
    w: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    acc = accumulate_dtype(values.dtype)
    n = n_tokens(values, row_offsets)
    y = torch.zeros(n, w.shape[1], dtype=acc, device=values.device)

    def add(v: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        v = v[:, None].to(acc)
        return torch.where(v != 0, v * w.index_select(0, i).to(acc), 0)

    if row_offsets is None:
        for j in range(values.shape[1]):  # slot by slot: the temporary is [N, d], not [N, k, d]
            y += add(values[:, j], indices[:, j])
    else:
        tokens = tokens_of("decode", row_offsets, values.shape[0])
        for piece in zip(*(t.split(SLOTS) for t in (tokens, values, indices)), strict=True):
            y.index_add_(0, piece[0], add(*piece[1:]))
    return (y if bias is None else y + bias.to(acc)).to(values.dtype)


def _fake(values, indices, row_offsets, w, bias):
    n = n_tokens(values, row_offsets)
    return values.new_empty(n, w.shape[1])


# bytes of the dense codes of one chunk of tokens
DENSE_SCRATCH = 64 << 20


def _dense(
    values: torch.Tensor,
    indices: torch.Tensor,
    row_offsets: torch.Tensor | None,
    w: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """By a product with the scattered codes, in chunks of tokens: where k / F is not small."""
    n = n_tokens(values, row_offsets)
    f = w.shape[0]
    out = values.new_empty(n, w.shape[1])
    tokens = None if row_offsets is None else tokens_of("decode", row_offsets, values.shape[0])
    rows = max(1, DENSE_SCRATCH // max(1, f * values.element_size()))
    for first in range(0, n, rows):
        here = slice(first, first + rows)
        codes = values.new_zeros(out[here].shape[0], f)
        if tokens is None:
            codes.scatter_(1, indices[here], values[here])
        else:
            # where a chunk's slots begin is known to the device alone: others add 0 to one place
            inside = (tokens >= first) & (tokens < first + rows)
            places = ((tokens - first) * f + indices).where(inside, 0)
            codes.view(-1).scatter_add_(0, places, values.where(inside, 0))
        torch.mm(codes, w, out=out[here])
    return out if bias is None else out.add_(bias)


def _width(values, indices, row_offsets, w, *_) -> tuple[torch.Tensor, int]:
    """w and the slots a token, rounded up where they are ragged."""
    if row_offsets is None:
        return w, values.shape[1]
    return w, -(-values.shape[0] // max(1, n_tokens(values, row_offsets)))


CODES = {
    "values": "T[N,k] or T[S] with row_offsets",
    "indices": "i64[N,k] or i64[S] with row_offsets",
    "row_offsets": "i64[N+1]",
}

decode_op = Op(
    "decode(Tensor values, Tensor indices, Tensor? row_offsets, Tensor w, Tensor? bias) -> Tensor",
    reference,
    _fake,
    operands={**CODES, "w": "T[F,d]", "bias": "T[d]"},
    triton="sae.decode:decode",
    dense=Dense("decode", _dense, _width),
)


def error_reference(
    values: torch.Tensor,
    indices: torch.Tensor,
    row_offsets: torch.Tensor | None,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    bias = None if bias is None else bias.to(x.dtype)
    error = reference(values.to(x.dtype), indices, row_offsets, w.to(x.dtype), bias) - x
    return error, error.square().sum(-1)


def _dense_error(*args) -> tuple[torch.Tensor, torch.Tensor]:
    *operands, x = args
    error = _dense(*operands).to(x.dtype).sub_(x)
    return error, torch.linalg.vector_norm(error, dim=-1).square()


# the residual y - x and its squares [N] for a loss, x in the accumulation dtype: y is not rounded
# to w's dtype in between, and [N, d] is written once instead of read and written three times
decode_error_op = Op(
    "decode_error(Tensor values, Tensor indices, Tensor? row_offsets, Tensor w, Tensor? bias,"
    " Tensor x) -> (Tensor error, Tensor squares)",
    error_reference,
    lambda values, indices, row_offsets, w, bias, x: (
        x.new_empty(x.shape),
        x.new_empty(x.shape[0]),
    ),
    operands={**CODES, "w": "T[F,d]", "bias": "T[d]", "x": "acc[N,d]"},
    triton="sae.decode:decode_error",
    dense=Dense("decode", _dense_error, _width),
)


@in_own_dtype
def decode_error(
    codes: SparseCodes, w_dec: torch.Tensor, b_dec: torch.Tensor | None, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual `sparse_decode(codes, w_dec, b_dec) - x` and its squares, for a loss.

    Args:
        codes: of N tokens, values `[N, k]` (or ragged) in the dtype of `w_dec`.
        x: `[N, d]` float32 (float64 for float64 weights).

    Returns:
        error `[N, d]` and |error|^2 `[N]` in the dtype of `x`. Neither is differentiable.
    """
    values = codes.values.detach()
    return decode_error_op(values, codes.indices, codes.row_offsets, w_dec.detach(), b_dec, x)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(values, indices, row_offsets, w, bias, impl):
        return decode_op(values, indices, row_offsets, w, bias, impl=impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, indices, row_offsets, w, _, ctx.impl = inputs
        ctx.save_for_backward(values, indices, row_offsets, w)

    @staticmethod
    @in_own_dtype
    def backward(ctx, dy):
        values, indices, row_offsets, w = ctx.saved_tensors
        dvalues = dw = dbias = None
        if ctx.needs_input_grad[0]:
            dvalues = gather_dots(dy, w, indices, row_offsets, ctx.impl)
        if ctx.needs_input_grad[3]:
            # sorted again here rather than kept: 1 ms against the 60 ms of the sums (S1, 2 cores)
            dw, _ = feature_sums(values, dy, indices, row_offsets, w.shape[0], ctx.impl)
        if ctx.needs_input_grad[4]:
            dbias = dy.sum(0, dtype=accumulate_dtype(dy.dtype)).to(dy.dtype)
        return dvalues, None, None, dw, dbias, None


def decoded(
    values: torch.Tensor,
    indices: torch.Tensor,
    row_offsets: torch.Tensor | None,
    w: torch.Tensor,
    impl: str,
) -> torch.Tensor:
    """`decode` by its slots, recorded for gradients if they are enabled."""
    if torch.is_grad_enabled():
        return _Decode.apply(values, indices, row_offsets, w, None, impl)
    return decode_op(values, indices, row_offsets, w, None, impl=impl, dense=False)


@in_own_dtype
def sparse_decode(
    codes: SparseCodes,
    w_dec: torch.Tensor,
    b_dec: torch.Tensor | None = None,
    *,
    prefixes: Sequence[int] | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Reconstruct activations from sparse codes.

    `y[..., :] = sum_j values[..., j] w_dec[indices[..., j]] + b_dec`

    Args:
        codes: values `[..., k]`, or ragged, in the dtype of `w_dec`; indices below F.
        w_dec: `[F, d]` feature vectors as rows, any strides (pass `W.T` of a `[d, F]` matrix).
        b_dec: `[d]` or None.
        prefixes: ascending feature counts in 1..F; adds a leading dimension of that length, entry
            p reconstructed from the features below `prefixes[p]` only.
        impl: None (best for the device and k / F), "cpp", "triton" or "reference".

    Returns:
        `[..., d]` (`[N, d]` of ragged codes), or `[len(prefixes), ..., d]`. Gradients of any order:
        values, w_dec, b_dec.

    Raises:
        TypeError, ValueError: for dtypes, devices or shapes other than the above.

    Example:
        >>> codes = mk.SparseCodes(torch.tensor([[2.0, 1.0]]), torch.tensor([[0, 2]]), n_features=3)
        >>> mk.sparse_decode(codes, torch.tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 1.0]]))
        tensor([[2., 1.]])
    """
    check_floating("sparse_decode", w_dec=w_dec, values=codes.values, b_dec=b_dec)
    if w_dec.dim() != 2:
        raise ValueError(f"sparse_decode: w_dec must be [F, d], got {list(w_dec.shape)}")
    if codes.n_features != w_dec.shape[0]:
        raise ValueError(
            f"sparse_decode: codes have {codes.n_features} features, w_dec has {w_dec.shape[0]} "
            f"rows; pass w_dec as [F, d]"
        )
    d = w_dec.shape[1]
    check_shape("sparse_decode", "b_dec", b_dec, (d,))
    impl = decode_op.resolve(impl, w_dec.device)
    values, indices = codes.flat()
    row_offsets, leading = codes.row_offsets, codes.shape[:-1]
    if prefixes is None:
        return _Decode.apply(values, indices, row_offsets, w_dec, b_dec, impl).reshape(*leading, d)
    bounds = [0, *prefixes]
    if not prefixes or sorted(set(bounds)) != bounds or bounds[-1] > w_dec.shape[0]:
        raise ValueError(
            f"sparse_decode: prefixes must ascend within 1..{w_dec.shape[0]}, got {list(prefixes)}"
        )
    # each ring of features is decoded once and the rings are summed: nested prefixes in one pass
    rings = []
    for low, high in zip(bounds, bounds[1:], strict=False):
        inside = (indices >= low) & (indices < high)
        bias = b_dec if low == 0 else None
        kept = values.where(inside, 0)
        rings.append(_Decode.apply(kept, indices, row_offsets, w_dec, bias, impl))
    return torch.stack(rings).cumsum(0).reshape(len(rings), *leading, d)
