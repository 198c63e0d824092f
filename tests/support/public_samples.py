# SPDX-License-Identifier: Apache-2.0
"""Every public operator: operands by sizes, the call, and what it computes in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from oracle import randn, random_indices

import mikernels as mk

SIZES = dict(
    N=6,
    d=5,
    F=40,
    K=3,
    B=2,
    P=3,
    W=4,
    R=5,
    H=4,
    G=2,
    e=3,
    n=6,
    m=7,
    D=5,
    Q=2,
    T=2,
    i=4,
    o=3,
    r=3,
    s=4,
)


@dataclass
class Public:
    """`call(impl, *tensors)` is `plain(*tensors)`; `refused` are the sizes that cannot be 0, with
    a part of the message."""

    shapes: list[str]
    call: Callable
    plain: Callable
    refused: dict[str, str] = field(default_factory=dict)
    # of the tensors, those with gradients
    differentiable: bool = False

    def tensors(self, dtype=torch.float32, **sizes):
        sizes = SIZES | sizes
        return [
            randn(*(sizes[letter] for letter in shape), dtype=dtype, seed=seed)
            for seed, shape in enumerate(self.shapes)
        ]


def indices_for(values, w):
    if len(w) < values.shape[1]:
        return torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    return random_indices(*values.shape, len(w)).to(values.device)


def plain_encode(x, w, b, c):
    h = (x - c) @ w.T + b
    return h.gather(-1, h.sort(dim=-1, descending=True, stable=True).indices[:, :2].sort().values)


def decoded(values, w, b):
    dense = values.new_zeros(len(values), len(w))
    return dense.scatter_add(1, indices_for(values, w), values) @ w + b


def total_of(x, w):
    return int(min(2.5, len(w)) * len(x))


def plain_batch_encode(x, w, b, c):
    h = ((x - c) @ w.T + b).reshape(-1)
    return h.gather(0, h.sort(descending=True, stable=True).indices[: total_of(x, w)].sort().values)


def plain_groupmax(x, w, b, c):
    h = ((x - c) @ w.T + b).relu()
    return h.unflatten(-1, (4, len(w) // 4)).max(-1).values


def plain_threshold(x, w, b, c):
    h = (x - c) @ w.T + b
    return h.where(h > 0.5, 0)


def ragged_codes(values, w):
    """[N, K] values as codes of 0 to 2 K - 1 slots a token."""
    n, k = values.shape
    ends = torch.arange(n + 1) * k
    ends[1:-1] += torch.arange(max(0, n - 1)) % max(1, k)
    places = torch.arange(n * k)
    indices = places - ends[torch.searchsorted(ends[1:-1], places, right=True)]
    return mk.SparseCodes.ragged(values.reshape(-1), indices, ends, len(w))


def below(scores, limits):
    return scores.where(torch.arange(scores.shape[-2])[:, None] < limits, 0)


def limits(grad):
    return torch.arange(grad.shape[2]) % 3 + 1


def plain_attention_gradients(g, q, k, v):
    """dq, dk and dv end to end, at temperature 2."""
    group = q.shape[1] // 2
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scale = max(1, q.shape[-1]) ** -0.5
    s, dp = scale * q @ k.mT, g @ v.mT
    p, tempered = torch.softmax(s, -1), torch.softmax(s / 2, -1)
    ds = scale * tempered * (dp - (tempered * dp).sum(-1, keepdim=True))
    dk, dv = (t.unflatten(1, (2, group)).sum(2) for t in (ds.mT @ q, p.mT @ g))
    return flat(ds @ k, dk, dv)


def flat(*tensors):
    """Of any dtype under autocast, which torch.cat is not."""
    flattened = tensors[0].new_empty(sum(t.numel() for t in tensors))
    parts = flattened.split([t.numel() for t in tensors])
    for part, t in zip(parts, tensors, strict=True):
        part.copy_(t.reshape(-1))
    return flattened


def everything(interactions):
    found = interactions if isinstance(interactions, list) else [interactions]
    return torch.stack([i.to_dense() for i in found])


def positions_for(grads, vectors):
    return torch.arange(len(vectors)) % max(1, grads.shape[1])


def plain_heads(dz, w_o, grad):
    scores = torch.einsum("bphe,hed,bprd->hr", dz, w_o, grad)
    return below(scores, 2)


def plain_gram(acts, grads):
    each = torch.einsum("nti,nto->nio", acts, grads).flatten(1)
    return each @ each.T


ALL = 1 << 20

PUBLIC = {
    "attention_gradients": Public(
        ["BHPd", "BHPe", "BGNe", "BGNd"],
        lambda impl, g, q, k, v: flat(
            *mk.attention_gradients(g, q, k, v, g, temperature=2.0, impl=impl)[:3]
        ),
        plain_attention_gradients,
        {"G": "k must have heads of which H is a multiple"},
    ),
    "row_topk": Public(
        ["NF"],
        lambda impl, s: mk.row_topk(s, 1, impl=impl)[0],
        lambda s: s.max(-1, keepdim=True).values,
        {"F": "k must be in 1..0"},
        differentiable=True,
    ),
    "topk_encode": Public(
        ["Nd", "Fd", "F", "d"],
        lambda impl, x, w, b, c: (
            mk.topk_encode(x, w, b, k=2, b_dec=c, relu=False, impl=impl).values
        ),
        plain_encode,
        {"F": "k must be in 1..0"},
        differentiable=True,
    ),
    "batch_topk_encode": Public(
        ["Nd", "Fd", "F", "d"],
        lambda impl, x, w, b, c: (
            mk.batch_topk_encode(x, w, b, k=2.5, b_dec=c, relu=False, impl=impl)[0].values
        ),
        plain_batch_encode,
        {"F": "k must be above 0 and at most 0"},
        differentiable=True,
    ),
    "groupmax_encode": Public(
        ["Nd", "Fd", "F", "d"],
        lambda impl, x, w, b, c: mk.groupmax_encode(x, w, b, k=4, b_dec=c, impl=impl).values,
        plain_groupmax,
        {"F": "k must be in 1..0"},
        differentiable=True,
    ),
    "threshold_encode": Public(
        ["Nd", "Fd", "F", "d"],
        lambda impl, x, w, b, c: mk.threshold_encode(
            x, w, b, threshold=0.5, b_dec=c, impl=impl
        ).to_dense(),
        plain_threshold,
        differentiable=True,
    ),
    "jump": Public(
        ["NF", "F"],
        lambda impl, h, t: mk.jump(h, t, bandwidth=0.0),
        lambda h, t: h.where(h > t, 0),
        differentiable=True,
    ),
    "step_above": Public(
        ["NF", "F"],
        lambda impl, h, t: mk.step_above(h, t, bandwidth=0.5),
        lambda h, t: (h > t).to(h.dtype),
    ),
    "sparse_decode ragged": Public(
        ["NK", "Fd", "d"],
        lambda impl, v, w, b: mk.sparse_decode(ragged_codes(v, w), w, b, impl=impl),
        lambda v, w, b: ragged_codes(v, w).to_dense() @ w + b,
        {"F": "SparseCodes: indices must be none"},
        differentiable=True,
    ),
    "sparse_decode": Public(
        ["NK", "Fd", "d"],
        lambda impl, v, w, b: mk.sparse_decode(
            mk.SparseCodes(v, indices_for(v, w), len(w)), w, b, impl=impl
        ),
        decoded,
        {"F": "SparseCodes: indices must be none"},
        differentiable=True,
    ),
    "sparse_decode prefixes": Public(
        ["NK", "Fd", "d"],
        lambda impl, v, w, b: mk.sparse_decode(
            mk.SparseCodes(v, indices_for(v, w), len(w)), w, b, prefixes=[len(w)], impl=impl
        ),
        lambda v, w, b: decoded(v, w, b)[None],
        {"F": "SparseCodes: indices must be none"},
        differentiable=True,
    ),
    "pairwise_products": Public(
        ["BnD", "BmD", "D"],
        lambda impl, a, b, w: mk.pairwise_products(a, b, weight=w, impl=impl),
        lambda a, b, w: torch.einsum("bid,d,bjd->ij", a, w, b),
        differentiable=True,
    ),
    "pairwise_products of one side": Public(
        ["BnD"],
        lambda impl, a: mk.pairwise_products(a, impl=impl),
        lambda a: torch.einsum("bid,bjd->ij", a, a),
        differentiable=True,
    ),
    "second_moment": Public(
        ["Nd"],
        lambda impl, x: mk.second_moment(x, mask=torch.ones(len(x)).bool(), impl=impl),
        lambda x: x.T @ x,
    ),
    "edge_scores": Public(
        ["BPWd", "BPRd", "QB"],
        lambda impl, d, g, q: mk.edge_scores(d, g, weights=q.detach(), prefix=limits(g), impl=impl),
        lambda d, g, q: below(torch.einsum("qb,bpwd,bprd->qwr", q.detach(), d, g), limits(g)),
        differentiable=True,
    ),
    "edge_scores_heads": Public(
        ["BPHe", "Hed", "BPRd"],
        lambda impl, z, w, g: mk.edge_scores_heads(z, w, g, prefix=2, impl=impl),
        plain_heads,
    ),
    "edge_mix": Public(
        ["BPd", "BPWd", "WR"],
        lambda impl, base, d, mask: mk.edge_mix(base, d, mask, impl=impl),
        lambda base, d, mask: base[:, :, None] + torch.einsum("wr,bpwd->bprd", mask, d),
        differentiable=True,
    ),
    "edge_topk": Public(
        ["BPWd", "BPRd"],
        lambda impl, d, g: everything(mk.edge_topk(d, g, k=ALL, prefix=2, impl=impl))[0],
        lambda d, g: below(torch.einsum("bpwd,bprd->wr", d, g), 2),
    ),
    "pairwise_topk": Public(
        ["nD", "mD"],
        lambda impl, a, b: everything(mk.pairwise_topk(a, b, k=ALL, impl=impl))[0],
        lambda a, b: a @ b.T,
    ),
    "feature_edges": Public(
        ["nd", "md", "n", "m"],
        lambda impl, a, b, r, c: everything(
            mk.feature_edges(
                a,
                b,
                k=ALL,
                row_scale=r,
                col_scale=c,
                row_position=torch.arange(len(a)) % 2,
                col_position=torch.arange(len(b)) % 2,
                impl=impl,
            )
        )[0],
        lambda a, b, r, c: (r[:, None] * c * (a @ b.T)).where(
            torch.arange(len(a))[:, None] % 2 == torch.arange(len(b)) % 2, 0
        ),
    ),
    "qk_interactions": Public(
        ["nd", "md", "Hde", "Hde"],
        lambda impl, q, k, w_q, w_k: everything(
            mk.qk_interactions(q, k, w_q, w_k, k=ALL, impl=impl)
        ),
        lambda q, k, w_q, w_k: (
            torch.einsum("id,hde,jc,hce->hij", q, w_q, k, w_k) / max(1, w_q.shape[2]) ** 0.5
        ),
        {"H": "w_k must have a divisor of the 0 heads"},
    ),
    "grad_gram": Public(
        ["nTi", "nTo"],
        lambda impl, a, g: mk.grad_gram(a, g, normalize=False, impl=impl),
        plain_gram,
    ),
    "grad_gram normalize": Public(
        ["nTi", "nTo"],
        lambda impl, a, g: mk.grad_gram(a, g, normalize=True, impl=impl),
        lambda a, g: (
            torch.nn.functional.normalize(torch.einsum("nti,nto->nio", a, g).flatten(1), dim=1)
            @ torch.nn.functional.normalize(torch.einsum("nti,nto->nio", a, g).flatten(1), dim=1).T
        ),
    ),
    "grad_gram k": Public(
        ["nTi", "nTo"],
        lambda impl, a, g: everything(mk.grad_gram(a, g, k=ALL, impl=impl))[0],
        lambda a, g: plain_gram(a, g).triu(1),
    ),
    "block_norms": Public(
        ["nrd", "mds"],
        lambda impl, a, b: mk.block_norms(a, b, impl=impl),
        lambda a, b: torch.einsum("nrd,mds->nmrs", a, b).square().sum((2, 3)).sqrt(),
    ),
    "mass_threshold": Public(
        ["N"],
        lambda impl, x: mk.mass_threshold(x, 1.0, abs=True, impl=impl),
        lambda x: x.abs().min(),
        {"N": "x must have entries"},
    ),
    "positional_dot": Public(
        ["BPd", "nd", "n"],
        lambda impl, g, v, c: mk.positional_dot(g, v, positions_for(g, v), scale=c, impl=impl),
        lambda g, v, c: torch.einsum("bid,id,i->ib", g[:, positions_for(g, v)], v, c),
        {"P": "positions must be none"},
    ),
    "by_feature": Public(
        ["NF"],
        lambda impl, x: mk.by_feature(torch.arange(len(x)) % max(1, x.shape[1]), x.shape[1])[1],
        lambda x: (torch.arange(len(x)) % max(1, x.shape[1])).argsort(stable=True),
        {"F": "indices"},
    ),
}
