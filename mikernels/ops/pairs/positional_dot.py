# SPDX-License-Identifier: Apache-2.0
"""Dot products of vectors with the gradients at their positions: `<grads[b, pos_i], v_i> scale_i`.

The step of attribution graphs that gives a row of the graph: gradients at every position against
the decoder vector of each active feature, at its position. Vectors are grouped by position, so a
position's gradients are read once for all of its features, and `grads[:, positions]` is never
formed. O(n B d) time, scratch O(n). Sums in fp32; the result is added to `out`.
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
from mikernels._indices import check_indices

# bytes of gathered gradients that the reference holds at a time
CHUNK = 16 << 20


def reference(
    grads: torch.Tensor,
    vectors: torch.Tensor,
    positions: torch.Tensor,
    scale: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    acc = accumulate_dtype(grads.dtype)
    batch, _, d = grads.shape
    rows = max(1, CHUNK // max(1, batch * d * 4))
    for first in range(0, vectors.shape[0], rows):
        here = slice(first, first + rows)
        products = torch.einsum(
            "bid,id->ib", grads.index_select(1, positions[here]).to(acc), vectors[here].to(acc)
        )
        out[here] += products if scale is None else products * scale[here, None].to(acc)


positional_dot_op = Op(
    "positional_dot_(Tensor grads, Tensor vectors, Tensor positions, Tensor? scale,"
    " Tensor(a!) out) -> ()",
    reference,
    lambda *args: None,
    operands={
        "grads": "T[B,P,d]",
        "vectors": "T[n,d]",
        "positions": "i64[n]",
        "scale": "T[n]",
        "out": "acc[n,B]",
    },
    triton="pairs.positional_dot:positional_dot_",
)


@in_own_dtype
def positional_dot(
    grads: torch.Tensor,
    vectors: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Each vector with the gradients at its position.

    `out[i, b] += scale[i] <grads[b, positions[i]], vectors[i]>`

    Equal to `einsum("bid,id->ib", grads[:, positions], vectors)` without the gathered gradients.
    (Attribution graphs: Ameisen et al., 2025; the inner step of circuit-tracer.)

    Args:
        grads: `[B, P, d]`; float32, bfloat16, float16 or float64, any strides.
        vectors: `[n, d]`, dtype of grads, any strides.
        positions: `[n]` int64 in 0..P-1, in any order.
        scale: `[n]`, dtype of grads, e.g. activations.
        out: `[n, B]` to add to; float32 (float64).
        impl: None (best for the device), "cpp", "triton" or "reference".

    Returns:
        `[n, B]` float32 whatever the dtype of grads (float64 for float64); `out` itself if given.
        Not differentiable.

    Raises:
        TypeError, ValueError: for dtypes, devices or shapes other than the above. On a GPU a
            position outside 0..P-1 is an assertion on the device.

    Example:
        >>> grads, vectors = torch.randn(2, 5, 8), torch.randn(3, 8)
        >>> rows = mk.positional_dot(grads, vectors, torch.tensor([4, 0, 4]))
        >>> rows.shape, torch.allclose(rows[1, 0], grads[0, 0] @ vectors[1])
        (torch.Size([3, 2]), True)
    """
    name = "positional_dot"
    check_floating(name, grads=grads, vectors=vectors, scale=scale)
    if grads.dim() != 3 or vectors.dim() != 2 or vectors.shape[1] != grads.shape[2]:
        raise ValueError(
            f"{name}: expected grads [B, P, d] and vectors [n, d], got {list(grads.shape)} and "
            f"{list(vectors.shape)}"
        )
    check_shape(name, "positions", positions, (vectors.shape[0],))
    check_shape(name, "scale", scale, (vectors.shape[0],))
    if positions.dtype != torch.int64 or positions.device != grads.device:
        raise TypeError(
            f"{name}: positions must be int64 on {grads.device}, got {positions.dtype} on "
            f"{positions.device}"
        )
    check_indices(name, "positions", positions, grads.shape[1])
    operands = grads.detach(), vectors.detach()
    shape, acc = (vectors.shape[0], grads.shape[0]), accumulate_dtype(grads.dtype)
    if out is None:
        total = torch.zeros(shape, dtype=acc, device=grads.device)
    else:
        read = {"grads": grads, "vectors": vectors, "positions": positions, "scale": scale}
        total = check_out(name, out, shape, (acc,), read)
    weights = None if scale is None else scale.detach()
    positional_dot_op(*operands, positions, weights, total, impl=impl)
    return total
