# SPDX-License-Identifier: Apache-2.0
"""Edges of a transformer's graph: from every writer to every later reader of the residual stream.

    edge_scores   S[w, r] = sum_{b, p} <delta[b, p, w], grad[b, p, r]>        w < prefix[r]
    edge_mix      y[b, p, r] = base[b, p] + sum_w mask[w, r] delta[b, p, w]

They are one bilinear map: the gradient of `edge_mix` with respect to its mask *is* `edge_scores`,
and both gradients of `edge_scores` are mixes. Edge attribution patching is one call of the first;
circuit evaluation and mask learning are the second. Both read `delta` in place, once, accumulate in
fp32 or better and never form `[B, P, W, R]` or a copy of the writers before a reader.
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
from mikernels.ops.pairs.pair_products import mixed_rows, pair_products_op


def mix_reference(
    base: torch.Tensor | None, delta: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    acc = accumulate_dtype(delta.dtype)
    y = torch.einsum("wr,bpwd->bprd", mask.to(acc), delta.to(acc))
    return (y if base is None else y + base.to(acc)).to(delta.dtype).contiguous()


def _mix_fake(base, delta, mask):
    return delta.new_empty(*delta.shape[:2], mask.shape[1], delta.shape[3])


edge_mix_op = Op(
    "edge_mix(Tensor? base, Tensor delta, Tensor mask) -> Tensor",
    mix_reference,
    _mix_fake,
    operands={"base": "T[B,P,R|1,d]", "delta": "T[B,P,W,d]", "mask": "T[W,R]"},
    triton="pairs.edge_mix:edge_mix",
)


def _zeros_like_scores(delta, grad, q):
    shape = q, delta.shape[2], grad.shape[2]
    return torch.zeros(shape, dtype=accumulate_dtype(delta.dtype), device=delta.device)


def _allowed(scores: torch.Tensor, prefix: torch.Tensor | None) -> torch.Tensor:
    if prefix is None:
        return scores
    writer = torch.arange(scores.shape[-2], device=scores.device)
    return scores.where(writer[:, None] < prefix, 0)


class _EdgeScores(torch.autograd.Function):
    @staticmethod
    def forward(delta, grad, prefix, weights, impl):
        out = _zeros_like_scores(delta, grad, 1 if weights is None else weights.shape[0])
        pair_products_op(delta, grad, None, weights, prefix, False, out, impl=impl)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        delta, grad, prefix, weights, ctx.impl = inputs
        ctx.save_for_backward(delta, grad, prefix, weights)

    @staticmethod
    @in_own_dtype
    def backward(ctx, ds):
        delta, grad, prefix, weights = ctx.saved_tensors
        ds = _allowed(ds, prefix).to(accumulate_dtype(delta.dtype))

        def mixed(rows, masks):
            if weights is None:
                return _mixed(rows, masks[0].to(rows.dtype), ctx.impl)
            # an example's mask is its own mixture of the replicates'
            each = mixed_rows(weights.T, masks.flatten(1)[None], ctx.impl)[0]
            own = each.unflatten(1, masks.shape[1:]).to(rows.dtype)
            mixes = rows.new_empty(*rows.shape[:2], own.shape[2], rows.shape[3])
            for b in range(rows.shape[0]):
                mixes[b] = _mixed(rows[b : b + 1], own[b], ctx.impl)[0]
            return mixes

        ddelta = mixed(grad, ds.transpose(1, 2)) if ctx.needs_input_grad[0] else None
        dgrad = mixed(delta, ds) if ctx.needs_input_grad[1] else None
        return ddelta, dgrad, None, None, None


def check_prefix(
    op: str, prefix: int | torch.Tensor | None, readers: int, device: torch.device
) -> torch.Tensor | None:
    """An int64 tensor [R], or None."""
    if prefix is None:
        return None
    if isinstance(prefix, int) and not isinstance(prefix, bool):
        # beyond these a limit changes nothing
        prefix = max(-1, min(prefix, 2**62))
        return torch.full((readers,), prefix, dtype=torch.int64, device=device)
    if not isinstance(prefix, torch.Tensor):
        raise TypeError(
            f"{op}: prefix must be an int or an int64 tensor, got {type(prefix).__name__}"
        )
    check_shape(op, "prefix", prefix, (readers,))
    if prefix.dtype != torch.int64 or prefix.device != device:
        raise TypeError(
            f"{op}: prefix must be an int or an int64 tensor on {device}, got {prefix.dtype} on "
            f"{prefix.device}"
        )
    return prefix


@in_own_dtype
def edge_scores(
    delta: torch.Tensor,
    grad: torch.Tensor,
    *,
    prefix: int | torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Edge attribution scores: what each writer's change contributes through each reader.

    `S[w, r] = sum_{b, p} <delta[b, p, w], grad[b, p, r]>` for the writers `w < prefix[r]`, else 0.
    (EAP: Syed et al., arXiv 2310.10348; EAP-IG: Hanna et al., arXiv 2403.17806.) Summed over the
    writers before a reader it is `<change of its input, grad>`.

    Args:
        delta: `[B, P, W, d]` differences of the writers' outputs; float32, bfloat16, float16 or
            float64, any strides: a slice of a larger buffer is read in place.
        grad: `[B, P, R, d]` gradients at the readers' inputs, dtype of delta.
        prefix: writers that come before a reader: an int, or int64 `[R]`; None is all.
        weights: `[Q, B]` weights of the examples, e.g. bootstrap counts: Q score matrices from one
            pass over the activations. A weight of 0 does not hide an example's NaN.
        out: `[W, R]` (or `[Q, W, R]`) to add to, for a stream of batches; float32 (float64).
        impl: None (best for the device), "cpp", "triton" or "reference".

    Returns:
        `[W, R]`, or `[Q, W, R]`: float32 whatever the dtype of delta (float64 for float64). `out`
        itself if it was given. Gradients of any order: delta and grad, without `out`.

    Raises:
        TypeError, ValueError: for dtypes, devices or shapes other than the above.

    Example:
        >>> delta, grad = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 4, 8)
        >>> scores = mk.edge_scores(delta, grad, prefix=2)
        >>> scores.shape, scores[2].tolist()  # writer 2 comes after all readers
        (torch.Size([3, 4]), [0.0, 0.0, 0.0, 0.0])
    """
    name = "edge_scores"
    check_floating(name, delta=delta, grad=grad)
    check_edges(name, delta, grad)
    prefix = check_prefix(name, prefix, grad.shape[2], delta.device)
    weights = check_weights(name, weights, delta)
    impl = pair_products_op.resolve(impl, delta.device)
    if out is None:
        scores = _EdgeScores.apply(delta, grad, prefix, weights, impl)
        return scores[0] if weights is None else scores
    replicates = () if weights is None else weights.shape[:1]
    shape = (*replicates, delta.shape[2], grad.shape[2])
    operands = {"delta": delta, "grad": grad, "weights": weights, "prefix": prefix}
    check_out(name, out, shape, (accumulate_dtype(delta.dtype),), operands, differentiable=True)
    total = out[None] if weights is None else out
    pair_products_op(delta, grad, None, weights, prefix, False, total, impl=impl)
    return out


def _mixed(delta: torch.Tensor, mask: torch.Tensor, impl: str) -> torch.Tensor:
    """`edge_mix` without a base, recorded for gradients if they are enabled."""
    if torch.is_grad_enabled():
        return _EdgeMix.apply(None, delta, mask, impl)
    return edge_mix_op(None, delta, mask, impl=impl)


def check_edges(op: str, delta: torch.Tensor, grad: torch.Tensor) -> None:
    if delta.dim() != 4 or grad.dim() != 4 or grad.shape[:2] != delta.shape[:2]:
        raise ValueError(
            f"{op}: expected delta [B, P, W, d] and grad [B, P, R, d] of one B and P, got "
            f"{list(delta.shape)} and {list(grad.shape)}"
        )
    if grad.shape[3] != delta.shape[3]:
        raise ValueError(
            f"{op}: grad must have the d of delta, {delta.shape[3]}, got {grad.shape[3]}"
        )


def check_weights(
    op: str, weights: torch.Tensor | None, delta: torch.Tensor
) -> torch.Tensor | None:
    if weights is None:
        return None
    if not isinstance(weights, torch.Tensor):
        raise TypeError(f"{op}: weights must be a torch.Tensor, got {type(weights).__name__}")
    if weights.dim() != 2 or weights.shape[1] != delta.shape[0]:
        raise ValueError(
            f"{op}: weights must be [Q, B] with B = {delta.shape[0]}, got {list(weights.shape)}"
        )
    return weights.detach().to(delta.device, accumulate_dtype(delta.dtype))


class _EdgeMix(torch.autograd.Function):
    @staticmethod
    def forward(base, delta, mask, impl):
        return edge_mix_op(base, delta, mask, impl=impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        base, delta, mask, ctx.impl = inputs
        ctx.save_for_backward(delta, mask)
        ctx.base_shape = None if base is None else base.shape

    @staticmethod
    @in_own_dtype
    def backward(ctx, dy):
        delta, mask = ctx.saved_tensors
        dbase = ddelta = dmask = None
        if ctx.needs_input_grad[0]:
            dbase = dy.sum_to_size(ctx.base_shape)
        if ctx.needs_input_grad[1]:
            ddelta = _mixed(dy, mask.T, ctx.impl)
        if ctx.needs_input_grad[2]:
            scored = _EdgeScores.apply if torch.is_grad_enabled() else _EdgeScores.forward
            dmask = scored(delta, dy, None, None, ctx.impl)[0].to(mask.dtype)
        return dbase, ddelta, dmask, None


@in_own_dtype
def edge_mix(
    base: torch.Tensor | None,
    delta: torch.Tensor,
    mask: torch.Tensor,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """The readers' inputs under a mask of edges.

    `y[b, p, r] = base[b, p] + sum_w mask[w, r] delta[b, p, w]`. With base the clean input of a
    reader, delta = corrupted - clean and a 0/1 mask of the edges to cut, y is the input in the
    circuit; with a learned mask, its gradient is `edge_scores(delta, dy)`.

    Args:
        base: `[B, P, d]` (for every reader), `[B, P, R, d]`, or None for 0; dtype of delta.
        delta: `[B, P, W, d]`; float32, bfloat16, float16 or float64, any strides.
        mask: `[W, R]`, dtype of delta.
        impl: None (best for the device), "cpp", "triton" or "reference".

    Returns:
        `[B, P, R, d]`, dtype of delta. Gradients of any order: base, delta, mask; nothing but the
        inputs is kept for them.

    Raises:
        TypeError, ValueError: for dtypes, devices or shapes other than the above.

    Example:
        >>> base, delta = torch.zeros(1, 1, 2), torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
        >>> mask = torch.tensor([[1.0, 0.0], [0.0, 0.5]])  # writer 0 to reader 0, half of 1 to 1
        >>> mk.edge_mix(base, delta, mask)
        tensor([[[[1.0000, 0.0000],
                  [0.0000, 0.5000]]]])
    """
    name = "edge_mix"
    check_floating(name, delta=delta, base=base, mask=mask)
    if delta.dim() != 4 or mask.dim() != 2 or mask.shape[0] != delta.shape[2]:
        raise ValueError(
            f"{name}: expected delta [B, P, W, d] and mask [W, R], got {list(delta.shape)} and "
            f"{list(mask.shape)}"
        )
    batch, positions, _, d = delta.shape
    if base is not None:
        base = base[:, :, None] if base.dim() == 3 else base
        readers = 1 if base.dim() == 4 and base.shape[2] == 1 else mask.shape[1]
        check_shape(name, "base", base, (batch, positions, readers, d))
    impl = edge_mix_op.resolve(impl, delta.device)
    return _EdgeMix.apply(base, delta, mask, impl)
