# SPDX-License-Identifier: Apache-2.0
"""Frobenius norms of all products of two sets of matrices: `N[i, j] = |a[i] b[j]|_F`.

Composition scores of attention heads (Elhage et al., 2021) are such norms, of a writer's output
matrix with a reader's input matrix. The `[n, m, r, r]` products that hold them exist a tile at a
time, which is squared and summed where it was made. O(n m r^2 d) time; scratch one block of columns
of b and one of products a thread.
"""

from __future__ import annotations

import torch

from mikernels._autocast import in_own_dtype
from mikernels._dispatch import Op, accumulate_dtype, check_floating


def reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    acc = accumulate_dtype(a.dtype)
    out = torch.empty(a.shape[0], b.shape[0], dtype=acc, device=a.device)
    columns = b.to(acc).movedim(0, 1).flatten(1)
    for i in range(a.shape[0]):
        products = (a[i].to(acc) @ columns).reshape(a.shape[1], b.shape[0], b.shape[2])
        out[i] = products.double().square().sum((0, 2)).sqrt()
    return out


block_norms_op = Op(
    "block_norms(Tensor a, Tensor b) -> Tensor",
    reference,
    lambda a, b: a.new_empty(a.shape[0], b.shape[0], dtype=accumulate_dtype(a.dtype)),
    operands={"a": "T[n,r,d]", "b": "T[m,d,s]"},
    triton="pairs.block_norms:block_norms",
)


@in_own_dtype
def block_norms(a: torch.Tensor, b: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """`|a[i] b[j]|_F` for every pair of matrices.

    For factored heads `u_i v_i` (`[d, r]`, `[r, d]`) pass the triangular factor of a QR
    decomposition times the inner factor: `|u v| = |R v|`; `circuits.composition_scores` does.

    Args:
        a: `[n, r, d]`; float32, bfloat16, float16 or float64, any strides.
        b: `[m, d, s]`, dtype of a, any strides.
        impl: None (best for the device), "cpp", "triton" or "reference".

    Returns:
        `[n, m]` float32 (float64 for float64). Not differentiable.

    Raises:
        TypeError, ValueError: for dtypes, devices or shapes other than the above.

    Example:
        >>> a, b = torch.randn(3, 8, 4), torch.randn(5, 4, 8)
        >>> norms = mk.block_norms(a, b)
        >>> norms.shape, torch.allclose(norms[2, 1], (a[2] @ b[1]).norm())
        (torch.Size([3, 5]), True)
    """
    name = "block_norms"
    check_floating(name, a=a, b=b)
    if a.dim() != 3 or b.dim() != 3 or a.shape[2] != b.shape[1]:
        raise ValueError(
            f"{name}: expected a [n, r, d] and b [m, d, s], got {list(a.shape)} and {list(b.shape)}"
        )
    return block_norms_op(a.detach(), b.detach(), impl=impl)
