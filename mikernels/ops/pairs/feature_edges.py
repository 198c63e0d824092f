# SPDX-License-Identifier: Apache-2.0
"""The strongest edges among many: `pairwise_topk` under the rules of a graph.

    edge_topk         writers x readers of a residual stream, of which neither side need be small
    feature_edges     upstream features x downstream features, through the residual stream alone
    qk_interactions   query features x key features of each head

Every one is a product with a selection at its end, so no writers x readers matrix exists. What may
form an edge is a comparison of ranks: row_rank[i] < col_rank[j].
"""

from __future__ import annotations

import torch

from mikernels._autocast import in_own_dtype
from mikernels._dispatch import accumulate_dtype, check_floating, check_shape
from mikernels.ops.pairs.edges import check_edges, check_prefix
from mikernels.ops.pairs.pairwise_topk import merged, nothing_found, select_pairs
from mikernels.values.interactions import Interactions


@in_own_dtype
def edge_topk(
    delta: torch.Tensor,
    grad: torch.Tensor,
    *,
    k: int,
    prefix: int | torch.Tensor | None = None,
    by: str = "abs",
    min_value: float | None = None,
    impl: str | None = None,
) -> Interactions:
    """The k strongest edges of `edge_scores(delta, grad, prefix=prefix)`, without the scores.

    Args:
        delta: `[B, P, W, d]`, as for `edge_scores`.
        grad: `[B, P, R, d]`, likewise.
        k, by, min_value, impl: as for `pairwise_topk`.
        prefix: writers that come before a reader: an int, or int64 `[R]`; None is all.

    Returns:
        Interactions of writers (rows) and readers (cols); fewer than k if fewer qualify.

    Raises:
        TypeError, ValueError: for dtypes, devices, shapes or k other than the above.

    Example:
        >>> found = mk.edge_topk(torch.randn(2, 5, 30, 8), torch.randn(2, 5, 40, 8), k=7)
        >>> found.values.shape, found.rows.shape
        (torch.Size([7]), torch.Size([7]))
    """
    name = "edge_topk"
    check_floating(name, delta=delta, grad=grad)
    check_edges(name, delta, grad)
    col_rank = check_prefix(name, prefix, grad.shape[2], delta.device)
    row_rank = None
    if col_rank is not None:
        row_rank = torch.arange(delta.shape[2], device=delta.device)
    return select_pairs(
        name, delta, grad, k=k, by=by, min_value=min_value,
        row_rank=row_rank, col_rank=col_rank, impl=impl,
    )  # fmt: skip


@in_own_dtype
def feature_edges(
    w_dec: torch.Tensor,
    w_enc: torch.Tensor,
    *,
    k: int,
    row_scale: torch.Tensor | None = None,
    col_scale: torch.Tensor | None = None,
    row_layer: torch.Tensor | None = None,
    col_layer: torch.Tensor | None = None,
    row_position: torch.Tensor | None = None,
    col_position: torch.Tensor | None = None,
    by: str = "abs",
    min_value: float | None = None,
    impl: str | None = None,
) -> Interactions:
    """Virtual weights: the strongest direct edges from upstream to downstream features.

    `E[u, v] = row_scale[u] col_scale[v] <w_dec[u], w_enc[v]>` where `row_layer[u] < col_layer[v]`
    and the positions are equal: the residual stream carries what a feature writes to later layers
    of its own position.

    Args:
        w_dec: `[n, d]` what upstream features write.
        w_enc: `[m, d]` what downstream ones read.
        k, by, min_value, impl: as for `pairwise_topk`.
        row_scale: `[n]`, e.g. activations; dtype of w_dec.
        col_scale: `[m]`, likewise.
        row_layer, col_layer: `[n]` and `[m]` int64; None allows every pair.
        row_position, col_position: `[n]` and `[m]` int64; None ignores positions.

    Returns:
        Interactions of upstream (rows) and downstream features (cols).

    Raises:
        TypeError, ValueError: for dtypes, devices, shapes or k other than the above.

    Example:
        >>> w_dec, w_enc = torch.eye(3), torch.eye(3)[[2, 0, 1]]
        >>> found = mk.feature_edges(w_dec, w_enc, k=9, min_value=0.5)
        >>> list(zip(found.rows.tolist(), found.cols.tolist()))
        [(0, 1), (1, 2), (2, 0)]
    """
    name = "feature_edges"
    check_floating(name, w_dec=w_dec, w_enc=w_enc, row_scale=row_scale, col_scale=col_scale)
    if w_dec.dim() != 2 or w_enc.dim() != 2 or w_dec.shape[1] != w_enc.shape[1]:
        raise ValueError(
            f"{name}: expected w_dec [n, d] and w_enc [m, d], got {list(w_dec.shape)} and "
            f"{list(w_enc.shape)}"
        )
    sizes = {"row": w_dec.shape[0], "col": w_enc.shape[0]}
    for what, tensors in (
        ("scale", (row_scale, col_scale)),
        ("layer", (row_layer, col_layer)),
        ("position", (row_position, col_position)),
    ):
        for side, tensor in zip(sizes, tensors, strict=True):
            check_shape(name, f"{side}_{what}", tensor, (sizes[side],))
            if what != "scale" and tensor is not None and tensor.dtype != torch.int64:
                raise TypeError(f"{name}: {side}_{what} must be int64, got {tensor.dtype}")
        if what != "scale" and (tensors[0] is None) != (tensors[1] is None):
            raise ValueError(f"{name}: row_{what} and col_{what} go together, got one of them")
    rule = {"k": k, "by": by, "impl": impl}
    parts = (row_scale, col_scale, row_layer, col_layer)
    if row_position is None or col_position is None:
        return _edges(name, w_dec, w_enc, *parts, min_value=min_value, **rule)
    # position by position; the k-th edge so far is what later ones have to reach
    found = nothing_found(accumulate_dtype(w_dec.dtype), w_dec.device)
    least = min_value
    for position in row_position.unique().tolist():
        rows = (row_position == position).nonzero()[:, 0]
        cols = (col_position == position).nonzero()[:, 0]
        own = [None if t is None else t[i] for t, i in zip(parts, (rows, cols) * 2, strict=True)]
        here = _edges(name, w_dec[rows], w_enc[cols], *own, min_value=least, **rule)
        new = here.values, rows[here.rows], cols[here.cols]
        found = merged(found, new, k, by)
        if len(found[0]) == k and not found[0][-1].isnan():
            least = float(found[0][-1].abs() if by == "abs" else found[0][-1])
    return Interactions._trusted(*found, shape=(w_dec.shape[0], w_enc.shape[0]))


def _edges(name, w_dec, w_enc, row_scale, col_scale, row_layer, col_layer, **rule) -> Interactions:
    return select_pairs(
        name, w_dec[None, None], w_enc[None, None], row_scale=row_scale, col_scale=col_scale,
        row_rank=row_layer, col_rank=col_layer, **rule,
    )  # fmt: skip


@in_own_dtype
def qk_interactions(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    *,
    k: int,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    q_position: torch.Tensor | None = None,
    k_position: torch.Tensor | None = None,
    rotary=None,
    by: str = "abs",
    min_value: float | None = None,
    impl: str | None = None,
) -> list[Interactions]:
    """Which query feature attends to which key feature, the k strongest pairs of each head.

    `S_h[i, j] = q_scale[i] k_scale[j] <q_i w_q[h], k_j w_k[h]> / sqrt(d_head)`, for keys at or
    before the query if positions are given.

    Args:
        q_features: `[n, d]` directions in the residual stream.
        k_features: `[m, d]`, same dtype.
        w_q, w_k: `[H, d, d_head]`; with grouped keys, w_k may have a divisor of H heads.
        k, by, min_value, impl: as for `pairwise_topk`.
        q_scale, k_scale: `[n]` and `[m]`, e.g. activations over the norm's scale.
        q_position, k_position: `[n]` and `[m]` int64, for causal masking and for `rotary`.
        rotary: called as rotary(x, positions) with x `[rows, d_head]`, returns x rotated; None
            leaves queries and keys as they are.

    Returns:
        H Interactions of query features (rows) and key features (cols).

    Raises:
        TypeError, ValueError: for dtypes, devices, shapes or k other than the above.

    Example:
        >>> queries, keys, w_q, w_k = torch.randn(6, 8), torch.randn(9, 8), *torch.randn(2, 4, 8, 2)
        >>> found = mk.qk_interactions(queries, keys, w_q, w_k, k=5)
        >>> len(found), found[0].values.shape  # of each of four heads
        (4, torch.Size([5]))
    """
    name = "qk_interactions"
    check_floating(
        name, q_features=q_features, k_features=k_features, w_q=w_q, w_k=w_k, q_scale=q_scale,
        k_scale=k_scale,
    )  # fmt: skip
    if q_features.dim() != 2 or k_features.dim() != 2 or k_features.shape[1] != q_features.shape[1]:
        raise ValueError(
            f"{name}: expected q_features [n, d] and k_features [m, d], got "
            f"{list(q_features.shape)} and {list(k_features.shape)}"
        )
    d = q_features.shape[1]
    if w_q.dim() != 3 or w_k.dim() != 3 or w_q.shape[1] != d or w_k.shape[1:] != w_q.shape[1:]:
        raise ValueError(
            f"{name}: expected w_q and w_k [H, {d}, d_head], got {list(w_q.shape)} and "
            f"{list(w_k.shape)}"
        )
    heads, key_heads = w_q.shape[0], w_k.shape[0]
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"{name}: w_k must have a divisor of the {heads} heads, got {key_heads}")
    if (q_position is None) != (k_position is None):
        raise ValueError(f"{name}: q_position and k_position go together, got one of them")
    if rotary is not None and q_position is None:
        raise ValueError(f"{name}: rotary needs q_position and k_position, got None")
    check_shape(name, "q_scale", q_scale, q_features.shape[:1])
    check_shape(name, "k_scale", k_scale, k_features.shape[:1])
    check_shape(name, "q_position", q_position, q_features.shape[:1])
    check_shape(name, "k_position", k_position, k_features.shape[:1])
    for side, position in (("q", q_position), ("k", k_position)):
        if position is not None and position.dtype != torch.int64:
            raise TypeError(f"{name}: {side}_position must be int64, got {position.dtype}")
    ranks: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if q_position is not None and k_position is not None:
        # a key may be at the query's own position: position_k < position_q + 1, ranks reversed
        ranks = (-q_position, 1 - k_position)
    root = max(w_q.shape[2], 1) ** -0.5
    found = []
    for head in range(heads):
        queries = q_features.detach() @ w_q[head].detach() * root
        keys = k_features.detach() @ w_k[head * key_heads // heads].detach()
        if rotary is not None:
            queries, keys = rotary(queries, q_position), rotary(keys, k_position)
        found.append(
            select_pairs(
                name,
                queries[None, None],
                keys[None, None],
                k=k,
                by=by,
                min_value=min_value,
                row_scale=q_scale,
                col_scale=k_scale,
                row_rank=ranks[0],
                col_rank=ranks[1],
                impl=impl,
            )  # fmt: skip
        )
    return found
