# SPDX-License-Identifier: Apache-2.0
"""Sparse decode: `y[n] = sum_j values[n, j] w_dec[indices[n, j]] + b_dec`.

With `prefixes = [F1, F2, ...]` it returns one reconstruction per prefix, each from the features
below F_p only (Matryoshka). Sums run over the slots in stored order, in fp32; O(N k d) time, no
temporary beyond the output. A slot whose value is 0 is inactive and adds nothing, whatever its row
holds; otherwise NaN and inf in a value or a row propagate to that token. Where k / F is not small
the product with the scattered codes may be faster and takes its place: there a row that is not
finite reaches every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mikernels._autocast import in_own_dtype
from mikernels._crossover import sparse_wins
from mikernels._dispatch import Op, accumulate_dtype, check_floating, check_shape, resolve_impl
from mikernels.ops.gradients import feature_sums, gather_dots

if TYPE_CHECKING:
    from mikernels.codes import SparseCodes


def reference(
    values: torch.Tensor, indices: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    acc = accumulate_dtype(values.dtype)
    y = torch.zeros(values.shape[0], w.shape[1], dtype=acc, device=values.device)
    for j in range(values.shape[1]):  # slot by slot: the temporary is [N, d], not [N, k, d]
        v = values[:, j : j + 1].to(acc)
        y += torch.where(v != 0, v * w.index_select(0, indices[:, j]).to(acc), 0)
    return (y if bias is None else y + bias.to(acc)).to(values.dtype)


decode_op = Op(
    "decode(Tensor values, Tensor indices, Tensor w, Tensor? bias) -> Tensor",
    reference,
    lambda values, indices, w, bias: values.new_empty(values.shape[0], w.shape[1]),
    operands={"values": "T[N,k]", "indices": "i64[N,k]", "w": "T[F,d]", "bias": "T[d]"},
    triton="decode:decode",
)


def error_reference(
    values: torch.Tensor,
    indices: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    bias = None if bias is None else bias.to(x.dtype)
    error = reference(values.to(x.dtype), indices, w.to(x.dtype), bias) - x
    return error, error.square().sum(-1)


# the residual y - x and its squares [N] for a loss, x in the accumulation dtype: y is not rounded
# to w's dtype in between, and [N, d] is written once instead of read and written three times
decode_error_op = Op(
    "decode_error(Tensor values, Tensor indices, Tensor w, Tensor? bias, Tensor x)"
    " -> (Tensor error, Tensor squares)",
    error_reference,
    lambda values, indices, w, bias, x: (x.new_empty(x.shape), x.new_empty(x.shape[0])),
    operands={
        "values": "T[N,k]",
        "indices": "i64[N,k]",
        "w": "T[F,d]",
        "bias": "T[d]",
        "x": "acc[N,d]",
    },
    triton="decode:decode_error",
)


# bytes of the dense codes of one chunk of tokens
DENSE_SCRATCH = 64 << 20


def _dense(
    values: torch.Tensor, indices: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """By a product with the scattered codes, in chunks of tokens: where k / F is not small."""
    n, f = values.shape[0], w.shape[0]
    out = values.new_empty(n, w.shape[1])
    rows = max(1, DENSE_SCRATCH // max(1, f * values.element_size()))
    for first in range(0, n, rows):
        here = slice(first, first + rows)
        codes = values.new_zeros(out[here].shape[0], f).scatter_(1, indices[here], values[here])
        torch.mm(codes, w, out=out[here])
    return out if bias is None else out.add_(bias)


def _forward(values, indices, w, bias, impl) -> torch.Tensor:
    (f, d), k = w.shape, values.shape[1]
    if impl == "auto" and not sparse_wins("decode", w.device, w.dtype, d, f, k):
        return _dense(values, indices, w, bias)
    return decode_op(values, indices, w, bias, impl=impl)


@in_own_dtype
def decode_error(
    codes: SparseCodes, w_dec: torch.Tensor, b_dec: torch.Tensor | None, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual `sparse_decode(codes, w_dec, b_dec) - x` and its squares, for a loss.

    Args:
        codes: of N tokens, values `[N, k]` in the dtype of `w_dec`.
        x: `[N, d]` float32 (float64 for float64 weights).

    Returns:
        error `[N, d]` and |error|^2 `[N]` in the dtype of `x`. Neither is differentiable.
    """
    (f, d), impl = w_dec.shape, resolve_impl(decode_error_op, None, w_dec.device)
    operands = codes.values.detach(), codes.indices, w_dec.detach(), b_dec
    if impl == "auto" and not sparse_wins("decode", w_dec.device, w_dec.dtype, d, f, codes.k):
        error = _dense(*operands).to(x.dtype).sub_(x)
        return error, torch.linalg.vector_norm(error, dim=-1).square()
    return decode_error_op(*operands, x, impl=impl)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(values, indices, w, bias, impl):
        return _forward(values, indices, w, bias, impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, indices, w, _, ctx.impl = inputs
        ctx.save_for_backward(values, indices, w)

    @staticmethod
    @in_own_dtype
    def backward(ctx, dy):
        values, indices, w = ctx.saved_tensors
        dvalues = dw = dbias = None
        if ctx.needs_input_grad[0]:
            dvalues = gather_dots(dy, w, indices, ctx.impl)
        if ctx.needs_input_grad[2]:
            # sorted again here rather than kept: 1 ms against the 60 ms of the sums (S1, 2 cores)
            dw, _ = feature_sums(values, dy, indices, w.shape[0], ctx.impl)
        if ctx.needs_input_grad[3]:
            dbias = dy.sum(0, dtype=accumulate_dtype(dy.dtype)).to(dy.dtype)
        return dvalues, None, dw, dbias, None


def decoded(
    values: torch.Tensor, indices: torch.Tensor, w: torch.Tensor, impl: str
) -> torch.Tensor:
    """`decode` by its slots, recorded for gradients if they are enabled."""
    if torch.is_grad_enabled():
        return _Decode.apply(values, indices, w, None, impl)
    return decode_op(values, indices, w, None, impl=impl)


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
        codes: values `[..., k]` in the dtype of `w_dec`; indices below F.
        w_dec: `[F, d]` feature vectors as rows, any strides (pass `W.T` of a `[d, F]` matrix).
        b_dec: `[d]` or None.
        prefixes: ascending feature counts in 1..F; adds a leading dimension of that length, entry
            p reconstructed from the features below `prefixes[p]` only.
        impl: None (best for the device and k / F), "cpp", "triton" or "reference".

    Returns:
        `[..., d]`, or `[len(prefixes), ..., d]`. Gradients of any order: values, w_dec, b_dec.

    Raises:
        TypeError, ValueError: for dtypes, devices or shapes other than the above.
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
    impl = resolve_impl(decode_op, impl, w_dec.device)
    values, indices = codes.flat()
    leading = codes.values.shape[:-1]
    if prefixes is None:
        return _Decode.apply(values, indices, w_dec, b_dec, impl).reshape(*leading, d)
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
        rings.append(_Decode.apply(values.where(inside, 0), indices, w_dec, bias, impl))
    return torch.stack(rings).cumsum(0).reshape(len(rings), *leading, d)
