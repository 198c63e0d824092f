# SPDX-License-Identifier: Apache-2.0
"""Pairwise products: `S[q, i, j] = sum_s weights[q, s] sum_p <a[s, p, i] * scale, b[s, p, j]>`.

The core of edge scores, gradient products and second moments: rows a against rows b, summed over
examples s and positions p. Pairs with `i >= prefix[j]` are not in the sum and their entries stay as
they are. Operands are read in place with any strides. Symmetric (b is a): half of the tiles. NaN
and inf propagate to the pairs that they are part of.

O(S P n m D) time. On the CPU, products of at most 768 numbers (in 16 lanes with AVX-512; of 128
where b is transposed) are summed in fp32 and all else in fp64, so thousands of positions lose
nothing; scratch is one block of pairs a thread (below 2 MB); the number of threads changes no bit.
On a GPU sums are fp32 in a fixed order, scratch at most 64 MB (or one n x m).
"""

from __future__ import annotations

import torch

from mikernels._autocast import in_own_dtype
from mikernels._dispatch import (
    Op,
    accumulate_dtype,
    check_floating,
    check_out,
    check_shape,
)


def reference(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: torch.Tensor | None,
    weights: torch.Tensor | None,
    prefix: torch.Tensor | None,
    symmetric: bool,
    out: torch.Tensor,
) -> None:
    acc = accumulate_dtype(a.dtype)
    allowed = None
    if prefix is not None:
        allowed = torch.arange(a.shape[2], device=a.device)[:, None] < prefix
    for s in range(a.shape[0]):
        left = a[s].to(acc) if scale is None else a[s].to(acc) * scale.to(acc)
        products = torch.einsum("pid,pjd->ij", left, b[s].to(acc))
        if allowed is not None:
            products = products.where(allowed, 0)
        for q in range(out.shape[0]):
            term = products if weights is None else products * weights[q, s].to(acc)
            out[q] += term if allowed is None else term.where(allowed, 0)


pair_products_op = Op(
    "pair_products_(Tensor a, Tensor b, Tensor? scale, Tensor? weights, Tensor? prefix,"
    " bool symmetric, Tensor(a!) out) -> ()",
    reference,
    lambda *args: None,
    operands={
        "a": "T[S,P,n,D]",
        "b": "T[S,P,m,D]",
        "scale": "T[D]",
        "weights": "acc[Q,S]",
        "prefix": "i64[m]",
        "symmetric": "n==m",
        "out": "acc[Q,n,m]",
    },
    triton="pairs.pair_products:pair_products_",
)


class _Products(torch.autograd.Function):
    """S[n, m] of a [B, n, D] and b [B, m, D] (or a itself), times scale [D]."""

    @staticmethod
    def forward(a, b, scale, impl):
        right = a if b is None else b
        out = torch.zeros(
            1, a.shape[1], right.shape[1], dtype=accumulate_dtype(a.dtype), device=a.device
        )
        pair_products_op(a[:, None], right[:, None], scale, None, None, b is None, out, impl=impl)
        return out[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, scale, ctx.impl = inputs
        ctx.save_for_backward(a, b, scale)

    @staticmethod
    @in_own_dtype
    def backward(ctx, ds):
        a, b, scale = ctx.saved_tensors
        need = ctx.needs_input_grad
        if b is None:
            # S is symmetric in a: both factors collect
            ds = ds + ds.T
        right = a if b is None else b
        da = db = dscale = None
        acc = ds.dtype
        factor = None if scale is None else scale.to(acc)
        if need[0] or need[2]:
            from_right = mixed_rows(ds, right, ctx.impl)
            if need[2]:
                terms = (a.to(acc) * from_right).sum((0, 1))
                dscale = (terms / 2 if b is None else terms).to(scale.dtype)
            if need[0]:
                da = (from_right if factor is None else from_right * factor).to(a.dtype)
        if need[1]:
            from_left = mixed_rows(ds.T, a, ctx.impl)
            db = (from_left if factor is None else from_left * factor).to(b.dtype)
        return da, db, dscale, None


class _MixedRows(torch.autograd.Function):
    @staticmethod
    def forward(s, rows, impl):
        return s @ rows.to(s.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        s, rows, ctx.impl = inputs
        ctx.save_for_backward(s, rows)

    @staticmethod
    @in_own_dtype
    def backward(ctx, dy):
        s, rows = ctx.saved_tensors
        ds = drows = None
        if ctx.needs_input_grad[0]:
            ds = _Products.apply(dy, rows.to(dy.dtype), None, ctx.impl)
        if ctx.needs_input_grad[1]:
            drows = mixed_rows(s.T, dy, ctx.impl).to(rows.dtype)
        return ds, drows, None


def mixed_rows(s: torch.Tensor, rows: torch.Tensor, impl: str) -> torch.Tensor:
    """`s rows[b]` of s [n, m] and rows [B, m, D], in the dtype of s; recorded for gradients if they
    are enabled, which a plain product would be too, but autocast would round its backward."""
    if torch.is_grad_enabled():
        return _MixedRows.apply(s, rows, impl)
    return _MixedRows.forward(s, rows, impl)


@in_own_dtype
def pairwise_products(
    a: torch.Tensor,
    b: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """All inner products of two sets of vectors, summed over a batch.

    `S[i, j] = sum_b <a[b, i] * weight, b[b, j]>`; with b = None, of a with itself.

    Args:
        a: `[n, D]` or `[B, n, D]`; float32, bfloat16, float16 or float64, any strides.
        b: `[m, D]` or `[B, m, D]`, dtype of a; None is a, at half the work.
        weight: `[D]`, dtype of a.
        out: `[n, m]` to add to, for a stream of batches; float32 (float64 for float64).
        impl: None (best for the device), "cpp", "triton" or "reference".

    Returns:
        `[n, m]` float32 whatever the dtype of a (float64 for float64): sums over batches would
        drown in 16 bits. `out` itself if it was given. Gradients of any order: a, b, weight,
        without `out`.

    Raises:
        TypeError, ValueError: for dtypes, devices or shapes other than the above.

    Example:
        >>> total = torch.zeros(4, 4)
        >>> for batch in torch.ones(3, 4, 8):
        ...     total = mk.pairwise_products(batch, out=total)
        >>> total[0]
        tensor([24., 24., 24., 24.])
    """
    name = "pairwise_products"
    check_floating(name, a=a, b=b, weight=weight)
    if a.dim() not in (2, 3):
        raise ValueError(f"{name}: a must be [n, D] or [B, n, D], got {list(a.shape)}")
    if b is not None and (
        b.dim() != a.dim() or b.shape[-1] != a.shape[-1] or b.shape[:-2] != a.shape[:-2]
    ):
        raise ValueError(
            f"{name}: b must be {['[m, D]', '[B, m, D]'][a.dim() - 2]} with the B and D of a "
            f"{list(a.shape)}, got {list(b.shape)}"
        )
    check_shape(name, "weight", weight, (a.shape[-1],))
    impl = pair_products_op.resolve(impl, a.device)
    left = a if a.dim() == 3 else a[None]
    right = None if b is None else (b if b.dim() == 3 else b[None])
    if out is None:
        return _Products.apply(left, right, weight, impl)
    n, m = a.shape[-2], (a if b is None else b).shape[-2]
    acc, operands = (accumulate_dtype(a.dtype),), {"a": a, "b": b, "weight": weight}
    check_out(name, out, (n, m), acc, operands, differentiable=True)
    other = left if right is None else right
    pair_products_op(
        left[:, None], other[:, None], weight, None, None, b is None, out[None], impl=impl
    )
    return out
