# SPDX-License-Identifier: Apache-2.0
"""By-feature gradients: everything that a sparse layer's backward needs, from k slots a token.

With `slots(f)` the slots s, of tokens n, whose index is f, in token order:

    gather_dot   out[s] = <rows[n], w[indices[s]]>                        SDDMM, k dots a token
    feature_sum  dw[f] = sum_{slots(f)} coefficients[s] rows[n]       and db[f], of coefficients
    sae_gradients_  all of an SAE's weight gradients in one pass over the features:
                 dv = <dy[n], w_dec[f]> where the value is not 0,  dw_dec[f] += value dy[n],
                 dw_enc[f] += dv x[n],  db_enc[f] += dv
                 with `d_pre`, the gradient at every slot's pre-activation: dv = d_pre, also where
                 the value is 0, and w_dec is not read. x and dy may differ in width
    by_feature   offsets, order: a stable counting sort of the indices, O(N k + F)
    weighted_row_sum  sum_f weights[f] rows[f], in two launches on a GPU whatever F is

With `levels`, one of L for each feature, rows (of gather_dot) and dy are `[L, N, d]`, and a slot's
row is rows[levels[indices[s]], n]: Matryoshka, where each ring of features has its own gradient at
the output.

Slots are padded, `[N, k]`, or ragged, `[S]`: then `row_offsets`, or the `tokens` of the slots, say
which token is which slot's (mikernels/_ragged.py).

Where gradients of gradients are wanted, `gather_dots` and `feature_sums` record the operators:
values, w and dy of `sum values <w[index], dy>` meet in one trilinear form, so the derivative of
each contraction (decode, gather_dot, feature_sum) is made of the other two, to any order.

No atomics: a feature's sum is taken in token order by one thread, so results do not depend on the
thread count. fp32 accumulation (fp64 for fp64). No `[N k, d]` temporary anywhere.
"""

from __future__ import annotations

import torch

from mikernels._autocast import in_own_dtype
from mikernels._dispatch import Op, accumulate_dtype
from mikernels._indices import check_indices, check_size
from mikernels._ragged import tokens_of


def by_feature_reference(
    indices: torch.Tensor, n_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    order = indices.argsort(stable=True)
    offsets = torch.zeros(n_features + 1, dtype=torch.int64, device=indices.device)
    # unlike bincount it refuses an index beyond F, for which that would make room
    offsets[1:].scatter_add_(0, indices, torch.ones_like(indices))
    return offsets.cumsum_(0), order


def _by_feature_fake(indices, n_features):
    return (
        indices.new_empty(n_features + 1, dtype=torch.int64),
        indices.new_empty(indices.shape[0], dtype=torch.int64),
    )


by_feature_op = Op(
    "by_feature(Tensor indices, SymInt n_features) -> (Tensor offsets, Tensor order)",
    by_feature_reference,
    _by_feature_fake,
    operands={"indices": "i64[M]", "n_features": "0.."},
    triton="sae.gradients:by_feature",
    cuda=True,
)


# slots whose rows the references gather at a time from ragged codes
SLOTS = 4096


@in_own_dtype
def by_feature(indices: torch.Tensor, n_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stable counting sort of flat feature indices.

    Args:
        indices: `[M]` int64 in 0..n_features-1.
        n_features: F.

    Returns:
        offsets `[F + 1]` and order `[M]`, int64: positions of feature f, ascending, are
        `order[offsets[f]:offsets[f + 1]]`.

    Raises:
        TypeError, ValueError: for a dtype, shape or index other than the above.

    Example:
        >>> offsets, order = mk.by_feature(torch.tensor([2, 0, 2, 1]), 3)
        >>> order[offsets[2] : offsets[3]]  # where feature 2 is
        tensor([0, 2])
    """
    check_size("by_feature", "n_features", n_features)
    if indices.dim() != 1:
        raise ValueError(
            f"by_feature: indices must be flat [M], got {list(indices.shape)}; pass .reshape(-1)"
        )
    check_indices("by_feature", "indices", indices, n_features)
    return by_feature_op(indices, n_features)


class _Rows:
    """The rows that slots take: of their tokens, from `[L, N, d]` at the levels of their features.

    Raises ValueError for a level outside 0..L-1.
    """

    def __init__(self, op: str, rows: torch.Tensor, levels: torch.Tensor | None):
        self.levels = levels
        self.n, self.flat = rows.shape[-2], rows
        if levels is not None:
            check_indices(op, "levels", levels, rows.shape[0])
            self.flat = rows.flatten(0, 1)

    def of(self, features: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        """For slots of these features and tokens; None is all tokens, a slot each."""
        if self.levels is None:
            return self.flat if tokens is None else self.flat.index_select(0, tokens)
        if tokens is None:
            tokens = torch.arange(self.n, device=features.device)
        return self.flat.index_select(0, self.levels.index_select(0, features) * self.n + tokens)


def _dots_reference(
    rows: torch.Tensor,
    w: torch.Tensor,
    indices: torch.Tensor,
    tokens: torch.Tensor | None,
    levels: torch.Tensor | None,
) -> torch.Tensor:
    acc = accumulate_dtype(rows.dtype)
    out = rows.new_empty(indices.shape)
    taken = _Rows("gather_dot", rows, levels)

    def dots(r: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return (r.to(acc) * w.index_select(0, i).to(acc)).sum(-1).to(rows.dtype)

    if tokens is None:
        for j in range(indices.shape[1]):  # a slot at a time: the temporary is [N, d], not [N k, d]
            out[:, j] = dots(taken.of(indices[:, j], None), indices[:, j])
    else:
        for o, n, i in zip(*(t.split(SLOTS) for t in (out, tokens, indices)), strict=True):
            o.copy_(dots(taken.of(i, n), i))
    return out


def gather_dot_reference(
    rows: torch.Tensor,
    w: torch.Tensor,
    indices: torch.Tensor,
    row_offsets: torch.Tensor | None,
    levels: torch.Tensor | None,
) -> torch.Tensor:
    tokens = None if row_offsets is None else tokens_of("gather_dot", row_offsets, len(indices))
    return _dots_reference(rows, w, indices, tokens, levels)


gather_dot_op = Op(
    "gather_dot(Tensor rows, Tensor w, Tensor indices, Tensor? row_offsets, Tensor? levels)"
    " -> Tensor",
    gather_dot_reference,
    lambda rows, w, indices, row_offsets, levels: rows.new_empty(indices.shape),
    operands={
        "rows": "T[N,d] or T[L,N,d] with levels",
        "w": "T[F,d]",
        "indices": "i64[N,k] or i64[S] with row_offsets",
        "row_offsets": "i64[N+1]",
        "levels": "i64[F]",
    },
    triton="sae.gradients:gather_dot",
)


def feature_sum_reference(
    coefficients: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    order: torch.Tensor,
    tokens: torch.Tensor | None,
    levels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    acc = accumulate_dtype(rows.dtype)
    n_features = offsets.shape[0] - 1
    counts = offsets.diff()
    ends = int(offsets[0]), int(offsets[-1])
    # before the repetition, which would make room for as many slots as there are said to be
    if ends != (0, order.shape[0]) or bool((counts < 0).any()):
        raise ValueError(
            f"feature_sum: offsets must ascend from 0 to {order.shape[0]}, got ones from {ends[0]} "
            f"to {ends[1]}"
        )
    features = torch.arange(n_features, device=rows.device).repeat_interleave(counts)
    flat = torch.empty_like(order).scatter_(0, order, features).reshape(coefficients.shape)
    dw = torch.zeros(n_features, rows.shape[-1], dtype=acc, device=rows.device)
    taken = _Rows("feature_sum", rows, levels)

    def add(f: torch.Tensor, c: torch.Tensor, r: torch.Tensor) -> None:
        c = c[:, None].to(acc)
        # as the kernels do, which skip such rows: 0 times inf is not NaN
        dw.index_add_(0, f, torch.where(c != 0, r.to(acc) * c, 0))

    if tokens is None:
        for j in range(coefficients.shape[1]):
            add(flat[:, j], coefficients[:, j], taken.of(flat[:, j], None))
    else:
        for f, c, n in zip(*(t.split(SLOTS) for t in (flat, coefficients, tokens)), strict=True):
            add(f, c, taken.of(f, n))
    db = torch.zeros(n_features, dtype=acc, device=rows.device)
    db.index_add_(0, flat.reshape(-1), coefficients.reshape(-1).to(acc))
    return dw.to(rows.dtype), db.to(rows.dtype)


def _feature_sum_fake(coefficients, rows, offsets, order, tokens):
    n_features = offsets.shape[0] - 1
    return rows.new_empty(n_features, rows.shape[1]), rows.new_empty(n_features)


feature_sum_op = Op(
    "feature_sum(Tensor coefficients, Tensor rows, Tensor offsets, Tensor order, Tensor? tokens)"
    " -> (Tensor dw, Tensor db)",
    feature_sum_reference,
    _feature_sum_fake,
    operands={
        "coefficients": "T[N,k] or T[S] with tokens",
        "rows": "T[N,d]",
        "offsets": "i64[F+1]",
        "order": "i64[N*k] or i64[S] with tokens",
        "tokens": "i64[S]",
    },
    triton="sae.gradients_sum:feature_sum",
)


class _GatherDot(torch.autograd.Function):
    @staticmethod
    def forward(rows, w, indices, row_offsets, impl):
        return gather_dot_op(rows, w, indices, row_offsets, None, impl=impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *saved, ctx.impl = inputs
        ctx.save_for_backward(*saved)

    @staticmethod
    @in_own_dtype
    def backward(ctx, d_out):
        from mikernels.ops.sae.decode import decoded

        rows, w, indices, row_offsets = ctx.saved_tensors
        d_rows = d_w = None
        if ctx.needs_input_grad[0]:
            d_rows = decoded(d_out, indices, row_offsets, w, ctx.impl)
        if ctx.needs_input_grad[1]:
            d_w, _ = feature_sums(d_out, rows, indices, row_offsets, w.shape[0], ctx.impl)
        return d_rows, d_w, None, None, None


def gather_dots(
    rows: torch.Tensor,
    w: torch.Tensor,
    indices: torch.Tensor,
    row_offsets: torch.Tensor | None,
    impl: str,
) -> torch.Tensor:
    """`gather_dot` without levels, recorded for gradients if they are enabled.

    With levels it is for hand-written backward passes only: its own would need sums by level.
    """
    if torch.is_grad_enabled():
        return _GatherDot.apply(rows, w, indices, row_offsets, impl)
    return gather_dot_op(rows, w, indices, row_offsets, None, impl=impl)


class _FeatureSum(torch.autograd.Function):
    @staticmethod
    def forward(coefficients, rows, indices, row_offsets, n_features, impl):
        slots = by_feature_op(indices.reshape(-1), n_features, impl=impl)
        tokens = None
        if row_offsets is not None:
            tokens = tokens_of("feature_sum", row_offsets, indices.shape[0])
        return feature_sum_op(coefficients, rows, *slots, tokens, impl=impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        coefficients, rows, indices, row_offsets, _, ctx.impl = inputs
        ctx.save_for_backward(coefficients, rows, indices, row_offsets)

    @staticmethod
    @in_own_dtype
    def backward(ctx, d_dw, d_db):
        from mikernels.ops.sae.decode import decoded

        coefficients, rows, indices, row_offsets = ctx.saved_tensors
        d_coefficients = d_rows = None
        if ctx.needs_input_grad[0]:
            d_coefficients = gather_dots(rows, d_dw, indices, row_offsets, ctx.impl)
            d_coefficients = d_coefficients + d_db.gather(0, indices.reshape(-1)).view_as(indices)
        if ctx.needs_input_grad[1]:
            d_rows = decoded(coefficients, indices, row_offsets, d_dw, ctx.impl)
        return d_coefficients, d_rows, None, None, None, None


def feature_sums(
    coefficients: torch.Tensor,
    rows: torch.Tensor,
    indices: torch.Tensor,
    row_offsets: torch.Tensor | None,
    n_features: int,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`feature_sum` by indices, recorded for gradients if they are enabled."""
    run = _FeatureSum.apply if torch.is_grad_enabled() else _FeatureSum.forward
    return run(coefficients, rows, indices, row_offsets, n_features, impl)


def sae_gradients_reference(
    values: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    order: torch.Tensor,
    tokens: torch.Tensor | None,
    dy: torch.Tensor,
    x: torch.Tensor,
    w_dec: torch.Tensor,
    levels: torch.Tensor | None,
    d_pre: torch.Tensor | None,
    dw_dec: torch.Tensor,
    dw_enc: torch.Tensor,
    db_enc: torch.Tensor,
    accumulate: bool,
) -> None:
    values, dy, x = (t.to(dw_dec.dtype) for t in (values, dy, x))
    if d_pre is None:
        dvalues = _dots_reference(dy, w_dec.to(dw_dec.dtype), indices, tokens, levels)
        dvalues.masked_fill_(values == 0, 0)
    else:
        dvalues = d_pre.to(dw_dec.dtype)
    from_dec, _ = feature_sum_reference(values, dy, offsets, order, tokens, levels)
    from_enc, from_bias = feature_sum_reference(dvalues, x, offsets, order, tokens)
    pairs = ((dw_dec, from_dec), (dw_enc, from_enc), (db_enc, from_bias))
    for out, term in pairs:
        if accumulate:
            out.add_(term)
        else:
            out.copy_(term)


BY_FEATURE = {
    "values": "T[N,k] or T[S] with tokens",
    "indices": "i64[N,k] or i64[S] with tokens",
    "offsets": "i64[F+1]",
    "order": "i64[N*k] or i64[S] with tokens",
    "tokens": "i64[S]",
}

# mutates caller-owned fp32 gradient buffers: fresh pages cost more than the arithmetic
sae_gradients_op = Op(
    "sae_gradients_(Tensor values, Tensor indices, Tensor offsets, Tensor order, Tensor? tokens,"
    " Tensor dy, Tensor x, Tensor w_dec, Tensor? levels, Tensor? d_pre, Tensor(a!) dw_dec,"
    " Tensor(b!) dw_enc, Tensor(c!) db_enc, bool accumulate) -> ()",
    sae_gradients_reference,
    lambda *args: None,
    operands={
        **BY_FEATURE,
        "dy": "T[N,out] or T[L,N,out] with levels",
        "x": "T[N,in]",
        "w_dec": "float[F,out]",
        "levels": "i64[F]",
        "d_pre": "T[N,k] or T[S] with tokens",
        "dw_dec": "float[F,out]",
        "dw_enc": "float[F,in]",
        "db_enc": "float[F]",
    },
    triton="sae.gradients_sum:sae_gradients_",
)


# rows taken to fp32 at a time, and rows of one partial sum: one fp32 sum over all F rows would be
# 20 times less accurate than autograd's
PIECE, BLOCK = 8192, 128


def weighted_row_sum_reference(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    acc = accumulate_dtype(rows.dtype)
    total = torch.zeros(rows.shape[1], dtype=acc, device=rows.device)
    for w, r in zip(weights.split(PIECE), rows.split(PIECE), strict=True):
        w, r = w.to(acc), r.to(acc)
        count = w.shape[0] // BLOCK
        whole = count * BLOCK
        blocks = torch.bmm(
            w[:whole].reshape(count, 1, BLOCK), r[:whole].reshape(count, BLOCK, rows.shape[1])
        )
        total += blocks.sum((0, 1)) + w[whole:] @ r[whole:]
    return total


weighted_row_sum_op = Op(
    "weighted_row_sum(Tensor weights, Tensor rows) -> Tensor",
    weighted_row_sum_reference,
    lambda weights, rows: rows.new_empty(rows.shape[1], dtype=accumulate_dtype(rows.dtype)),
    operands={"weights": "float[F]", "rows": "float[F,d]"},
    triton="sae.gradients_row_sum:weighted_row_sum",
    # products of torch's
    cpu=weighted_row_sum_reference,
)


class _WeightedRowSum(torch.autograd.Function):
    @staticmethod
    def forward(weights, rows):
        return weighted_row_sum_op.default(weights, rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @in_own_dtype
    def backward(ctx, d_total):
        weights, rows = ctx.saved_tensors
        # without a product, whose own backward autocast would round
        d_weights = (rows.to(d_total.dtype) * d_total).sum(1).to(weights.dtype)
        d_rows = (weights.to(d_total.dtype)[:, None] * d_total).to(rows.dtype)
        return d_weights, d_rows


def weighted_row_sum(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`weights @ rows` for `[F]` and `[F, d]`, in the accumulation dtype, without a wide copy.

    It is b_dec's gradient through the encoder's input: F d products instead of N k d. Recorded for
    gradients if they are enabled.
    """
    if torch.is_grad_enabled():
        return _WeightedRowSum.apply(weights, rows)
    return weighted_row_sum_op.default(weights, rows)
