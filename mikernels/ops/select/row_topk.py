# SPDX-License-Identifier: Apache-2.0
"""Exact row top-k: for every row the k largest scores and where they are.

Order: value descending, then index ascending, so ties at the k-th place go to the lowest index;
NaN ranks first and is kept; -0 == +0. `sorted=False` returns the k winners by ascending index,
`sorted=True` by rank. O(N F) time with one read of the matrix, O(F) bytes of scratch a thread.
"""

from __future__ import annotations

import torch

from mikernels._autocast import in_own_dtype
from mikernels._dispatch import Op, check_floating, check_k


def reference(scores: torch.Tensor, k: int, sorted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    # a stable descending sort is the definition: it keeps index order at ties and puts NaN first
    indices = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    if not sorted:
        indices = indices.sort(dim=-1).values
    return scores.gather(-1, indices), indices.contiguous()


def _fake(scores: torch.Tensor, k: int, sorted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (scores.shape[0], k)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


row_topk_op = Op(
    "row_topk(Tensor scores, SymInt k, bool sorted) -> (Tensor values, Tensor indices)",
    reference,
    _fake,
    operands={"scores": "T[N,F]", "k": "1..F"},
    triton="select.row_topk:row_topk",
    cuda=True,
)


class _RowTopK(torch.autograd.Function):
    @staticmethod
    def forward(scores, k, sorted, impl):
        return row_topk_op(scores, k, sorted, impl=impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1])
        ctx.shape = inputs[0].shape
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @in_own_dtype
    def backward(ctx, d_values, _):
        (indices,) = ctx.saved_tensors
        return d_values.new_zeros(ctx.shape).scatter_(-1, indices, d_values), None, None, None


@in_own_dtype
def row_topk(
    scores: torch.Tensor, k: int, *, sorted: bool = False, impl: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest entries of every row, exactly and deterministically.

    Args:
        scores: `[..., F]` float32, bfloat16, float16 or float64, any strides.
        k: entries to keep, 1..F.
        sorted: order the winners by rank (value descending, index ascending) instead of by index.
        impl: None (best for the device), "cpp", "triton", "cuda" or "reference".

    Returns:
        values `[..., k]` in the dtype of `scores` and indices `[..., k]` int64. The gradient of
        `values`, of any order, flows back to the selected entries.

    Raises:
        TypeError, ValueError: for a dtype or k outside the above.

    Example:
        >>> values, indices = mk.row_topk(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2)
        >>> values, indices
        (tensor([[3., 3.]]), tensor([[1, 2]]))
    """
    check_floating("row_topk", scores=scores)
    if scores.dim() < 1:
        raise ValueError("row_topk: scores must have at least one dimension, got a scalar")
    check_k("row_topk", k, scores.shape[-1], "columns of scores")
    impl = row_topk_op.resolve(impl, scores.device)
    rows = scores.reshape(-1, scores.shape[-1])
    values, indices = _RowTopK.apply(rows, k, sorted, impl)
    shape = (*scores.shape[:-1], k)
    return values.reshape(shape), indices.reshape(shape)
