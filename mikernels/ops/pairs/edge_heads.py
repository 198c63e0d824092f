# SPDX-License-Identifier: Apache-2.0
"""Edge scores of attention heads from their `z`, without the heads' outputs.

    S[h, r] = sum_{b, p} <dz[b, p, h] w_o[h], grad[b, p, r]>        h < prefix[r]

A head writes `z w_o` (d numbers), but is determined by z (d / heads numbers): keeping z instead
divides the memory of the writers by heads + 1 over 2 (16 for Llama-3.1-8B). The rows are formed a
tile at a time: 2 B P H d_head d more operations, no `[B, P, H, d]`.
"""

from __future__ import annotations

import torch

from mikernels._autocast import in_own_dtype
from mikernels._dispatch import Op, accumulate_dtype, check_floating, check_out
from mikernels.ops.pairs.edges import check_edges, check_prefix, check_weights
from mikernels.ops.pairs.pair_products import reference as products_reference


def reference(
    dz: torch.Tensor,
    w_o: torch.Tensor,
    grad: torch.Tensor,
    weights: torch.Tensor | None,
    prefix: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    acc = accumulate_dtype(dz.dtype)
    for b in range(dz.shape[0]):  # an example at a time: the heads' outputs are the temporary
        rows = torch.einsum("phe,hed->phd", dz[b].to(acc), w_o.to(acc))[None]
        mine = None if weights is None else weights[:, b : b + 1]
        products_reference(rows, grad[b : b + 1].to(acc), None, mine, prefix, False, out)


edge_heads_op = Op(
    "edge_heads_(Tensor dz, Tensor w_o, Tensor grad, Tensor? weights, Tensor? prefix,"
    " Tensor(a!) out) -> ()",
    reference,
    lambda *args: None,
    operands={
        "dz": "T[B,P,H,e]",
        "w_o": "T[H,e,d]",
        "grad": "T[B,P,R,d]",
        "weights": "acc[Q,B]",
        "prefix": "i64[R]",
        "out": "acc[Q,H,R]",
    },
    triton="pairs.edge_heads:edge_heads_",
)


@in_own_dtype
def edge_scores_heads(
    dz: torch.Tensor,
    w_o: torch.Tensor,
    grad: torch.Tensor,
    *,
    prefix: int | torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """`edge_scores` whose writers are attention heads, given by their z.

    `S[h, r] = sum_{b, p} <dz[b, p, h] w_o[h], grad[b, p, r]>`, equal to
    `edge_scores(einsum("bphe,hed->bphd", dz, w_o), grad)` without that tensor.

    Args:
        dz: `[B, P, H, d_head]` differences of the heads' weighted values; heads of several layers
            may be stacked in H. float32, bfloat16, float16 or float64, any strides.
        w_o: `[H, d_head, d]` output projections, dtype of dz.
        grad: `[B, P, R, d]` gradients at the readers' inputs, dtype of dz.
        prefix: heads that come before a reader: an int, or int64 `[R]`; None is all.
        weights: `[Q, B]` weights of the examples, for Q score matrices from one pass.
        out: `[H, R]` (or `[Q, H, R]`) to add to; float32 (float64).
        impl: None (best for the device), "cpp", "triton" or "reference".

    Returns:
        `[H, R]`, or `[Q, H, R]`: float32 (float64 for float64), `out` itself if given. Not
        differentiable.

    Raises:
        TypeError, ValueError: for dtypes, devices or shapes other than the above.

    Example:
        >>> dz, w_o, grad = torch.randn(2, 5, 3, 4), torch.randn(3, 4, 8), torch.randn(2, 5, 6, 8)
        >>> outputs = torch.einsum("bphe,hed->bphd", dz, w_o)
        >>> scores = mk.edge_scores_heads(dz, w_o, grad)
        >>> torch.allclose(scores, mk.edge_scores(outputs, grad), atol=1e-4)
        True
    """
    name = "edge_scores_heads"
    check_floating(name, dz=dz, w_o=w_o, grad=grad)
    if dz.dim() != 4 or w_o.dim() != 3 or w_o.shape[:2] != dz.shape[2:]:
        raise ValueError(
            f"{name}: expected dz [B, P, H, d_head] and w_o [H, d_head, d], got {list(dz.shape)} "
            f"and {list(w_o.shape)}"
        )
    check_edges(name, dz.new_empty(1).expand(*dz.shape[:3], w_o.shape[2]), grad)
    prefix = check_prefix(name, prefix, grad.shape[2], dz.device)
    weights = check_weights(name, weights, dz)
    replicates = () if weights is None else weights.shape[:1]
    shape = (*replicates, dz.shape[2], grad.shape[2])
    operands = dz.detach(), w_o.detach(), grad.detach()
    acc = accumulate_dtype(dz.dtype)
    if out is None:
        total = torch.zeros(shape, dtype=acc, device=dz.device)
    else:
        read = {"dz": dz, "w_o": w_o, "grad": grad, "weights": weights, "prefix": prefix}
        total = check_out(name, out, shape, (acc,), read)
    scores = total[None] if weights is None else total
    edge_heads_op(*operands, weights, prefix, scores, impl=impl)
    return total
