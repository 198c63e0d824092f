# SPDX-License-Identifier: Apache-2.0
"""Second moments: `C = sum_n x_n x_n^T`, over a stream of batches.

The uncentred covariance of rank-one editing (ROME, MEMIT) and of whitening. `pair_products_` of the
columns of x with themselves: only the upper triangle is computed, half of a product. The CPU's
kernel reads the tokens where they are; a GPU's, transposed in pieces of 16 MB at the most. With a
float64 `out` the pieces add up without rounding.
"""

from __future__ import annotations

import torch

from mikernels._autocast import in_own_dtype
from mikernels._dispatch import (
    accumulate_dtype,
    check_floating,
    check_out,
    check_shape,
)
from mikernels.ops.pairs.pair_products import pair_products_op

PIECE = 16 << 20


@in_own_dtype
def second_moment(
    x: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """`C[i, j] = sum_n x[n, i] x[n, j]` over the tokens.

    Args:
        x: `[..., d]`; float32, bfloat16, float16 or float64, any strides.
        mask: `[...]` bool, the tokens that count; None is all.
        out: `[d, d]` to add to, float32 or float64 (which a long stream deserves).
        impl: None (best for the device), "cpp", "triton" or "reference".

    Returns:
        `[d, d]` float32 (float64 for float64), or `out`. Divide by the number of tokens for the
        mean. Not differentiable.

    Raises:
        TypeError, ValueError: for dtypes, devices or shapes other than the above.

    Example:
        >>> total, tokens = torch.zeros(8, 8, dtype=torch.float64), 0
        >>> for x in torch.randn(3, 100, 8):
        ...     total, tokens = mk.second_moment(x, out=total), tokens + len(x)
        >>> (total / tokens).shape
        torch.Size([8, 8])
    """
    name = "second_moment"
    check_floating(name, x=x)
    if x.dim() < 1:
        raise ValueError(f"{name}: x must be [..., d], got a scalar")
    check_shape(name, "mask", mask, tuple(x.shape[:-1]))
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"{name}: mask must be bool, got {mask.dtype}; pass mask != 0")
    d = x.shape[-1]
    acc = accumulate_dtype(x.dtype)
    if out is not None:
        check_out(name, out, (d, d), (acc, torch.float64), {"x": x, "mask": mask})
    impl = pair_products_op.resolve(impl, x.device)
    rows = x.detach().reshape(x.shape[:-1].numel(), d)
    if mask is not None:
        rows = rows[mask.reshape(-1)]
    total = torch.zeros(d, d, dtype=acc, device=x.device) if out is None else out
    piece = total if total.dtype == acc else torch.zeros(d, d, dtype=acc, device=x.device)
    whole = x.device.type == "cpu"
    tokens = max(1, len(rows) if whole else PIECE // max(1, d * x.element_size()))
    for part in rows.split(tokens):
        columns = (part.T if whole else part.T.contiguous())[None, None]
        pair_products_op(columns, columns, None, None, None, True, piece[None], impl=impl)
        if piece is not total:
            total += piece
            piece.zero_()
    return total
