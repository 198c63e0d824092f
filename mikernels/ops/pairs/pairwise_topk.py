# SPDX-License-Identifier: Apache-2.0
"""The k strongest pairs of two sets of vectors, exactly, without the n x m matrix.

    s[i, j] = row_scale[i] col_scale[j] <a[i], b[j]>      where row_rank[i] < col_rank[j]

ranked by |s| ("abs") or s ("value"), ties by row, then column; NaN first. A score is the fp64 sum
of the products, rounded once to fp32; the set returned is the one that these scores select.

How the CPU kernel is fast and exact. Pairs are *screened* in 16 bits (int16 or, with AMX, bf16),
before that in 8 where the processor has dot products of bytes, under the bound that
mikernels/ops/sae/encode.py proves: |score - screened| <= |a - a^| |b| + |a^| |b - b^| plus
rounding, with computed norms. A pair whose upper bound is below the k-th largest lower bound seen
so far has k pairs before it; every other is kept, and rescored in fp64 at the end. Each thread
keeps a list of 4 k + 64 candidates; a full list is tightened and, where bounds cannot separate it,
rescored on the spot, so that no list overflows. Symmetric (b is a): half of the products.

O(n m D) time in products of bytes or of 16 bits. Scratch: panels of a (32 MB) and b (8 MB), and the
lists.
fp64 inputs: scores in fp64. Rows of more than 16,384 numbers are screened by fp32 products instead.

On a GPU one fp16 product of rows scaled by powers of two keeps the largest upper bound of every 64
columns; groups whose bound reaches the k-th exact strength are scored in fp64
(mikernels/kernels/pairs/pairwise_topk.py). Scratch some 350 MB; the host waits for a few counts per
panel.
"""

from __future__ import annotations

import torch

from mikernels._autocast import in_own_dtype
from mikernels._dispatch import Op, accumulate_dtype, check_floating
from mikernels.values.interactions import Interactions

BY = ("abs", "value")
# scores of the reference at a time
CHUNK = 1 << 22


def strongest(
    values: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, k: int, by: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k strongest of a list of pairs, strongest first."""
    strength = values.abs() if by == "abs" else values
    # stable sorts, the least significant key first; sort() puts NaN first when descending
    order = cols.argsort(stable=True)
    order = order[rows[order].argsort(stable=True)]
    order = order[strength[order].sort(descending=True, stable=True).indices[:k]]
    return values[order], rows[order], cols[order]


Pairs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def nothing_found(dtype: torch.dtype, device: torch.device) -> Pairs:
    """No pairs: values, rows, cols."""
    index = torch.empty(0, dtype=torch.int64, device=device)
    return torch.empty(0, dtype=dtype, device=device), index, index


def merged(found: Pairs, more: Pairs, k: int, by: str) -> Pairs:
    """The k strongest of two lists of pairs."""
    values, rows, cols = (torch.cat(both) for both in zip(found, more, strict=True))
    return strongest(values, rows, cols, k, by)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[B, P, n, D] as [n, B P D]."""
    return x.movedim(2, 0).flatten(1)


def reference(
    a: torch.Tensor,
    b: torch.Tensor,
    row_scale: torch.Tensor | None,
    col_scale: torch.Tensor | None,
    row_rank: torch.Tensor | None,
    col_rank: torch.Tensor | None,
    k: int,
    by: str,
    min_value: float,
    symmetric: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a, b = _rows(a), _rows(b)
    n, m = a.shape[0], b.shape[0]
    out_dtype = accumulate_dtype(a.dtype)
    wide = b.double() if col_scale is None else b.double() * col_scale.double()[:, None]
    found = nothing_found(out_dtype, a.device)
    rows_at_once = max(1, CHUNK // max(1, m))
    for first in range(0, n, rows_at_once):
        here = slice(first, first + rows_at_once)
        left = a[here].double()
        if row_scale is not None:
            left = left * row_scale[here].double()[:, None]
        scores = (left @ wide.T).to(out_dtype)
        strength = scores.abs() if by == "abs" else scores
        kept = ~(strength < min_value)
        if row_rank is not None and col_rank is not None:
            kept &= row_rank[here, None] < col_rank
        i, j = kept.nonzero(as_tuple=True)
        found = merged(found, (scores[i, j], i + first, j), k, by)
    missing = min(k, n * m) - len(found[0])
    values = torch.cat([found[0], found[0].new_zeros(missing)])
    rows, cols = (torch.cat([t, t.new_full((missing,), -1)]) for t in found[1:])
    return values, rows, cols


def _fake(a, b, row_scale, col_scale, row_rank, col_rank, k, by, min_value, symmetric):
    size = (min(k, a.shape[2] * b.shape[2]),)
    values = a.new_empty(size, dtype=accumulate_dtype(a.dtype))
    return values, *(a.new_empty(size, dtype=torch.int64) for _ in range(2))


# a [B, P, n, D], b [B, P, m, D]; padded to min(k, n m) entries: value 0, row and column -1 where
# fewer pairs qualify
pairwise_topk_op = Op(
    "pairwise_topk(Tensor a, Tensor b, Tensor? row_scale, Tensor? col_scale, Tensor? row_rank,"
    " Tensor? col_rank, SymInt k, str by, float min_value, bool symmetric)"
    " -> (Tensor values, Tensor rows, Tensor cols)",
    reference,
    _fake,
    operands={
        "a": "T[B,P,n,D]",
        "b": "T[B,P,m,D]",
        "row_scale": "T[n]",
        "col_scale": "T[m]",
        "row_rank": "i64[n]",
        "col_rank": "i64[m]",
        "symmetric": "n==m",
        "k": "1..",
    },
    triton="pairs.pairwise_topk:pairwise_topk",
)


def check_selection(op: str, k: int, by: str, min_value: float | None) -> float:
    """Checks the arguments of a selection of pairs; min_value as a number."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{op}: k must be an int, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"{op}: k must be at least 1, got {k}")
    if by not in BY:
        raise ValueError(f"{op}: by must be one of {list(BY)}, got {by!r}")
    if min_value is not None and min_value != min_value:
        raise ValueError(f"{op}: min_value must be a number or None, got nan")
    return float("-inf") if min_value is None else float(min_value)


def select_pairs(
    op: str,
    a: torch.Tensor,
    b: torch.Tensor | None,
    *,
    k: int,
    by: str,
    min_value: float | None,
    row_scale: torch.Tensor | None = None,
    col_scale: torch.Tensor | None = None,
    row_rank: torch.Tensor | None = None,
    col_rank: torch.Tensor | None = None,
    impl: str | None = None,
) -> Interactions:
    """The operator on validated `[B, P, n, D]` and `[B, P, m, D]`, without the padding."""
    least = check_selection(op, k, by, min_value)
    symmetric = b is None and col_scale is None and row_scale is None
    right = a if b is None else b
    scales = [None if t is None else t.detach() for t in (row_scale, col_scale)]
    values, rows, cols = pairwise_topk_op(
        a.detach(), right.detach(), *scales, row_rank, col_rank, k, by, least,
        symmetric, impl=impl,
    )  # fmt: skip
    if row_rank is not None or least != float("-inf"):
        # how many pairs qualify is known to the data alone
        found = int((rows >= 0).sum())
        values, rows, cols = values[:found], rows[:found], cols[:found]
    return Interactions._trusted(values, rows, cols, (a.shape[2], right.shape[2]))


@in_own_dtype
def pairwise_topk(
    a: torch.Tensor,
    b: torch.Tensor | None = None,
    *,
    k: int,
    by: str = "abs",
    upper: bool = False,
    min_value: float | None = None,
    impl: str | None = None,
) -> Interactions:
    """The k strongest entries of `a b^T`, exactly and deterministically, without the matrix.

    Args:
        a: `[n, D]`, or `[B, n, D]` for the sum over b of `a[b] b[b]^T`; float32, bfloat16, float16
            or float64, any strides.
        b: `[m, D]` or `[B, m, D]`, dtype of a; None is a.
        k: pairs to keep; fewer are returned if fewer qualify.
        by: "abs" ranks by |score|, "value" by the score.
        upper: only pairs with row < column: each pair of different vectors once.
        min_value: only pairs whose |score| (or score) is at least this.
        impl: None (best for the device), "cpp", "triton" or "reference".

    Returns:
        Interactions: values `[k']` float32 (float64 for float64), rows and cols, strongest first;
        ties by row, then column; NaN first. Not differentiable.

    Raises:
        TypeError, ValueError: for dtypes, devices, shapes or k other than the above.

    Example:
        >>> a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
        >>> found = mk.pairwise_topk(a, k=2, upper=True)
        >>> found.rows, found.cols, found.values
        (tensor([0, 1]), tensor([2, 2]), tensor([2., 1.]))
    """
    name = "pairwise_topk"
    check_floating(name, a=a, b=b)
    if a.dim() not in (2, 3):
        raise ValueError(f"{name}: a must be [n, D] or [B, n, D], got {list(a.shape)}")
    if b is not None and (
        b.dim() != a.dim() or b.shape[-1] != a.shape[-1] or b.shape[:-2] != a.shape[:-2]
    ):
        raise ValueError(
            f"{name}: b must have the B and D of a {list(a.shape)}, got {list(b.shape)}"
        )
    row_rank = col_rank = None
    if upper:
        row_rank = torch.arange(a.shape[-2], device=a.device)
        col_rank = row_rank if b is None else torch.arange(b.shape[-2], device=a.device)
    operands = _four_dimensional(a), None if b is None else _four_dimensional(b)
    return select_pairs(
        name, *operands, k=k, by=by, min_value=min_value, row_rank=row_rank, col_rank=col_rank,
        impl=impl,
    )  # fmt: skip


def _four_dimensional(x: torch.Tensor) -> torch.Tensor:
    return x[None, None] if x.dim() == 2 else x[:, None]
