# SPDX-License-Identifier: Apache-2.0
"""Gradients of attention whose softmax is differentiated at a temperature, from q, k and v alone.

For each head, query i and the keys j that it may attend to,

    S_ij = softcap(scale q_i k_j) + bias_ij        softcap(x) = c tanh(x / c), x without one
    P = softmax(S)        O = P V        P' = softmax(S / temperature)

    dV = P^T dO        dP = dO V^T        dS = P' (dP - sum_j P' dP)        elementwise
    dQ = scale (dS softcap'(S)) K        dK = scale (dS softcap'(S))^T Q

At temperature 1 that is the gradient of O; at others the rule of GIM (Edin et al., arXiv
2505.17630), without a factor 1 / temperature. A query that may attend to no key has O = 0 and no
gradients. Key and value heads that groups of query heads share get the sum over their group.
What is not finite goes where these equations carry it; from a pair that is masked (0 times NaN) a
kernel that leaves the pair out may spare what the reference does not.

No statistics of the forward pass are needed: a block of queries meets all its keys, which gives P,
P' and their sums before dS. So whoever computed O, in whatever way, can have these gradients; and
that it was this O is part of the result (`checks`), since P is here anyway. 5 products as in
FlashAttention's backward, and one for the check of O; memory O(T), no T x S matrix.
"""

from __future__ import annotations

import math

import torch

from mikernels._autocast import in_own_dtype
from mikernels._dispatch import Op, accumulate_dtype, check_floating

CHECKS = 4


def _kept(
    shape: tuple[int, int],
    keep: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal: bool,
    window: int,
    like: torch.Tensor,
) -> torch.Tensor:
    """Which keys each query of one head may attend to, `[T, S]`."""
    i = torch.arange(shape[0], device=like.device)[:, None]
    j = torch.arange(shape[1], device=like.device)
    kept = torch.ones(shape, dtype=torch.bool, device=like.device)
    if keep is not None:
        kept &= keep
    if bias is not None:
        kept &= bias != -math.inf
    if causal:
        kept &= j <= i
    if window:
        kept &= j > i - window
    return kept


def reference(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    keep: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    causal: bool,
    window: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    acc = accumulate_dtype(q.dtype)
    heads, group = q.shape[:3], q.shape[1] // max(1, k.shape[1])
    shape = (q.shape[2], k.shape[2])
    dq = torch.zeros(q.shape, dtype=acc, device=q.device)
    dk, dv = (torch.zeros(t.shape, dtype=acc, device=q.device) for t in (k, v))
    checks = torch.zeros(*heads, CHECKS, dtype=acc, device=q.device)
    masks = [None if m is None else m.expand(*heads, shape[1]) for m in (keep, bias)]
    for b in range(heads[0]):
        # a head at a time: T x S is the temporary
        for h in range(heads[1]):
            g = h // group
            mine, added = (None if m is None else m[b, h] for m in masks)
            added = None if added is None else added.to(acc)
            kept = _kept(shape, mine, added, causal, window, q)
            qh, kh, vh, do, o = (
                t.to(acc) for t in (q[b, h], k[b, g], v[b, g], grad[b, h], out[b, h])
            )
            raw = scale * (qh @ kh.T)
            capped = softcap * (raw / softcap).tanh() if softcap else raw
            s = capped if added is None else capped + added
            s = s.masked_fill(~kept, -math.inf)
            some = kept.any(-1, keepdim=True)
            # a row without keys would be NaN
            p, tempered = (
                torch.softmax(x, -1).where(some, 0) if shape[1] else x for x in (s, s / temperature)
            )
            dp = do @ vh.T
            ds = tempered * (dp - (tempered * dp).sum(-1, keepdim=True))
            plain = p * (dp - (p * dp).sum(-1, keepdim=True))
            slope = 1 - (capped / softcap).square() if softcap else None
            through = ds if slope is None else ds * slope
            dq[b, h] = scale * (through @ kh)
            dk[b, g] += scale * (through.T @ qh)
            dv[b, g] += p.T @ do
            if shape[1] and vh.shape[1]:
                distance = (p @ vh - o).abs() / vh.abs().amax(0)
                # 0 / 0: a column of zeros that gave zero
                checks[b, h, :, 0] = distance.where((p @ vh) != o, 0).amax(-1)
                checks[b, h, :, 1] = raw.abs().masked_fill(~kept, 0).amax(-1)
            checks[b, h, :, 2] = (ds - plain).square().sum(-1)
            checks[b, h, :, 3] = plain.square().sum(-1)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), checks


def _fake(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    *rest: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    checks = q.new_empty(*q.shape[:3], CHECKS, dtype=accumulate_dtype(q.dtype))
    return *(t.new_empty(t.shape) for t in (q, k, v)), checks  # type: ignore[return-value]


attention_gradients_op = Op(
    "attention_gradients(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor? keep,"
    " Tensor? bias, float scale, float softcap, bool causal, int window, float temperature)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference,
    _fake,
    triton="attention.attention_gradients:attention_gradients",
    operands={
        "grad": "T[B,H,T,f]",
        "q": "T[B,H,T,e]",
        "k": "T[B,G,S,e]",
        "v": "T[B,G,S,f]",
        "out": "T[B,H,T,f]",
        "keep": "bool[B|1,H|1,T|1,S]",
        "bias": "float[B|1,H|1,T|1,S]",
        "window": "0..",
    },
)


@in_own_dtype
def attention_gradients(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    *,
    keep: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
    temperature: float = 1.0,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `softmax(softcap(scale q k^T) + bias) v`, the softmax's at a temperature.

    Args:
        grad: `[B, H, T, f]` gradient at the output; float32, bfloat16, float16 or float64. Any
            strides, here and below.
        q: `[B, H, T, e]` queries, dtype of grad.
        k: `[B, G, S, e]` keys; each serves H / G heads that follow each other.
        v: `[B, G, S, f]` values, likewise.
        out: `[B, H, T, f]` the output, of whatever computed it; for `checks`.
        keep: bool `[B or 1, H or 1, T or 1, S]`, True where a query may attend to a key.
        bias: of that shape, any floating dtype, added to the scores; -inf is "may not" too.
        scale: of the products, 1 / sqrt(e) by default.
        softcap: c of `c tanh(x / c)`, 0 without.
        causal: query i attends to keys j <= i only.
        window: query i attends to keys j > i - window only, 0 for all.
        temperature: of the softmax's gradient; 1 is the true one.
        impl: None (best for the device), "cpp", "triton" or "reference".

    Returns:
        dq, dk, dv, in the shapes and the dtype of q, k and v; and `checks [B, H, T, 4]`, float32
        (float64 for float64), of each query: the largest of `|P v - out|` over the largest |v| of
        its column; the largest |scale q k| of its keys; the squared sums over the keys of what the
        temperature changes in dS, and of dS at temperature 1. Not differentiable.

    Raises:
        TypeError, ValueError: for dtypes, devices, shapes or numbers other than the above.

    Source: GIM (Edin et al., arXiv 2505.17630); the recomputation is FlashAttention's (Dao et al.,
    arXiv 2205.14135).

    Example:
        >>> q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
        >>> out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> dq, dk, dv, checks = mk.attention_gradients(
        ...     torch.ones_like(out), q, k, v, out, causal=True, temperature=2.0
        ... )
        >>> dq.shape, bool((checks[..., 0] < 1e-5).all())  # `out` was this attention's
        (torch.Size([1, 2, 5, 8]), True)
    """
    name = "attention_gradients"
    check_floating(name, grad=grad, q=q, k=k, v=v, out=out)
    if any(t.dim() != 4 for t in (grad, q, k, v, out)):
        raise ValueError(
            f"{name}: q, k and v must be [B, H, T, e], [B, G, S, e] and [B, G, S, f], got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{name}: k must have heads of which H is a multiple, got {k.shape[1]} for "
            f"{q.shape[1]} in q"
        )
    if not (softcap >= 0 and math.isfinite(softcap)):
        raise ValueError(f"{name}: softcap must be a finite number, 0 for none, got {softcap}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{name}: temperature must be positive and finite, got {temperature}")
    scale = 1 / math.sqrt(max(1, q.shape[-1])) if scale is None else float(scale)
    operands = (t.detach() for t in (grad, q, k, v, out))
    return attention_gradients_op(
        *operands, keep, None if bias is None else bias.detach(), scale, float(softcap), causal,
        window, float(temperature), impl=impl,
    )  # fmt: skip
