# SPDX-License-Identifier: Apache-2.0
"""How much of what one attention head writes another reads, from the weights alone.

In the row convention (`x w_q`), with `OV = w_v w_o` and `QK = w_q w_k^T`, the scores of Elhage et
al., "A Mathematical Framework for Transformer Circuits" (transformer-circuits.pub, 2021) are

    Q: |OV QK|   K: |OV QK^T|   V: |OV OV'|        over the product of the two Frobenius norms.

Each product is `(first last) (first' last')` with `[d, r]` and `[r, d]` factors. Orthogonal factors
do not change a Frobenius norm, so QR decompositions `first = Q R` and `last'^T = Q' R'` leave
`|(R last) (first' R'^T)|`: factors `[r, d]` and `[d, r]`, and nothing `[d, d]` is formed.
"""

from __future__ import annotations

import torch

from mikernels._dispatch import accumulate_dtype, check_floating
from mikernels.ops.pairs.block_norms import block_norms

KINDS = ("Q", "K", "V")
Factors = tuple[torch.Tensor, torch.Tensor]


def _heads(name: str, x: torch.Tensor, layers: torch.Size, heads: int) -> torch.Tensor:
    """Each of `heads` with its own matrix, where groups of heads share one."""
    given = x.shape[-3]
    if x.shape[:-3] != layers or (given != heads and (given == 0 or heads % given)):
        raise ValueError(
            f"composition_scores: {name} must have {[*layers, heads]} heads, or {heads} / g of "
            f"them where g query heads share one, got {list(x.shape[:-2])}"
        )
    return x.repeat_interleave(heads // max(1, given), -3)


def _factors(side: str, names: tuple[str, str], pair: Factors, across: bool) -> Factors:
    """A head's matrix as `[heads, d, r]` and `[heads, r, d]`; `across`: the second is `[d, r]`."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(
            f"composition_scores: {side} must be a pair ({names[0]}, {names[1]}), got "
            f"{type(pair).__name__}"
        )
    first, last = pair
    check_floating("composition_scores", **dict(zip(names, pair, strict=True)))
    if first.dim() < 3 or last.dim() < 3:
        raise ValueError(
            f"composition_scores: {names[0]} and {names[1]} must be [..., heads, rows, columns], "
            f"got {list(first.shape)} and {list(last.shape)}"
        )
    if across:
        last = last.mT
    if first.shape[-2:] != last.mT.shape[-2:]:
        second = "[..., heads, d, r]" if across else "[..., heads, r, d]"
        raise ValueError(
            f"composition_scores: {side} must be {names[0]} [..., heads, d, r] and {names[1]} "
            f"{second}, got {list(pair[0].shape)} and {list(pair[1].shape)}"
        )
    heads = max(first.shape[-3], last.shape[-3])
    first = _heads(names[0], first, last.shape[:-3], heads)
    return first, _heads(names[1], last, first.shape[:-3], heads)


@torch.no_grad()
def composition_scores(
    writers: Factors, readers: Factors, kind: str, *, impl: str | None = None
) -> torch.Tensor:
    """Composition of every writing head with every reading head.

    From `torch.nn.Linear` weights, `w_q = q_proj.weight.view(H, dh, d).mT` (likewise k and v) and
    `w_o = o_proj.weight.T.view(H, dh, d)`; multiply `w_q`, `w_k`, `w_v` by the gain of the norm
    before them, `gain[:, None] * w`, which is part of what they read. Rotary position embeddings
    are between `w_q` and `w_k`: with them, Q and K are the scores of relative position 0.

    Args:
        writers: `(w_v [..., H, d, r], w_o [..., H, r, d])`; float32, bfloat16, float16 or float64.
            Leading dimensions (layers) are kept. Heads that share a key or value matrix
            (grouped-query attention) may share it here: `w_v [..., H / g, d, r]`.
        readers: `(w_q [..., H', d, r'], w_k [..., H', d, r'])` for "Q" and "K" (w_k may be shared
            as w_v is); `(w_v, w_o)` as above for "V". The same d, dtype and device.
        kind: "Q", "K" or "V": what of the reading head the writing head feeds.
        impl: None (best for the device), "cpp", "triton" or "reference".

    Returns:
        `[..., H, ..., H']` in 0..1, float32 (float64 for float64); 0 where a head's matrix is zero.
        Every pair is scored: of two heads, only the later one can read the other.

    Raises:
        TypeError, ValueError: for other dtypes, devices, shapes or kinds.
    """
    if kind not in KINDS:
        raise ValueError(f"composition_scores: kind must be one of {list(KINDS)}, got {kind!r}")
    names = {"Q": ("w_q", "w_k"), "K": ("w_q", "w_k"), "V": ("w_v", "w_o")}[kind]
    first, last = _factors("writers", ("w_v", "w_o"), writers, False)
    reads, rest = _factors("readers", names, readers, kind != "V")
    if kind == "K":
        reads, rest = rest.mT, reads.mT
    check_floating("composition_scores", writers=first, readers=reads)
    if first.shape[-2] != reads.shape[-2]:
        raise ValueError(
            f"composition_scores: readers must have the d of writers ({first.shape[-2]}), got "
            f"{reads.shape[-2]}"
        )
    acc = accumulate_dtype(first.dtype)
    first, last, reads, rest = (t.to(acc) for t in (first, last, reads, rest))
    left = torch.linalg.qr(first, mode="r").R @ last
    right = reads @ torch.linalg.qr(rest.mT, mode="r").R.mT
    norms = block_norms(left.flatten(0, -3), right.flatten(0, -3), impl=impl)
    both = [torch.linalg.vector_norm(t.flatten(0, -3), dim=(1, 2)) for t in (left, right)]
    scale = both[0][:, None] * both[1]
    scores = (norms / scale).masked_fill(scale == 0, 0)
    return scores.unflatten(0, left.shape[:-2]).unflatten(-1, right.shape[:-2])
