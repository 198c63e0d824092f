# SPDX-License-Identifier: Apache-2.0
"""Inner products of per-sample gradients, without the gradients.

The weight gradient of a linear layer for sample i is `sum_t g_i[t] a_i[t]^T`, the gradient at its
output times its input. So

    <grad_i, grad_j> = sum_layers sum_{t, s} <a_i[t], a_j[s]> <g_i[t], g_j[s]>

Two tile products, multiplied where they are made, replace `[n, parameters]`. O(n^2 T^2 (d_in +
d_out)) time for T positions a sample, scratch one tile a thread; half of it with one side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mikernels._autocast import in_own_dtype
from mikernels._dispatch import Op, accumulate_dtype, check_floating
from mikernels.ops.pairs.pairwise_topk import check_selection, merged, nothing_found
from mikernels.values.interactions import Interactions

# rows of the Gram matrix that exist at a time when only the k best are kept
BLOCK = 1024


def reference(
    acts: torch.Tensor,
    grads: torch.Tensor,
    acts2: torch.Tensor,
    grads2: torch.Tensor,
    symmetric: bool,
    out: torch.Tensor,
) -> None:
    acc = out.dtype
    # the gradients of a sample, and all of the other side's in turn
    for j in range(acts2.shape[0]):
        other = grads2[j].to(acc).T @ acts2[j].to(acc)
        mine = torch.einsum("ite,ed->itd", grads.to(acc), other)
        out[:, j] += (mine * acts.to(acc)).sum((1, 2))


gram_op = Op(
    "gram_products_(Tensor acts, Tensor grads, Tensor acts2, Tensor grads2, bool symmetric,"
    " Tensor(a!) out) -> ()",
    reference,
    lambda *args: None,
    operands={
        "acts": "T[n,t,i]",
        "grads": "T[n,t,o]",
        "acts2": "T[m,s,i]",
        "grads2": "T[m,s,o]",
        "symmetric": "n==m",
        "out": "acc[n,m]",
    },
    triton="pairs.grad_gram:gram_products_",
)

Layers = torch.Tensor | Sequence[torch.Tensor]


def _layers(name: str, tensors: Layers) -> list[torch.Tensor]:
    given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    for layer, t in enumerate(given):
        if not isinstance(t, torch.Tensor):
            raise TypeError(
                f"grad_gram: {name} must be a torch.Tensor a layer, got {type(t).__name__}"
            )
        if t.dim() not in (2, 3):
            raise ValueError(
                f"grad_gram: {name} must be [n, d] or [n, T, d] a layer, got {list(t.shape)} at "
                f"layer {layer}"
            )
    return [(t if t.dim() == 3 else t[:, None]).detach() for t in given]


def _check_pairs(acts: list[torch.Tensor], grads: list[torch.Tensor], names: str) -> None:
    if len(acts) != len(grads) or not acts:
        raise ValueError(
            f"grad_gram: {names} must have one tensor a layer each, got {len(acts)} and "
            f"{len(grads)}"
        )
    for layer, (a, g) in enumerate(zip(acts, grads, strict=True)):
        check_floating("grad_gram", acts=a, grads=g, first=acts[0])
        if a.shape[:2] != g.shape[:2] or a.shape[0] != acts[0].shape[0]:
            raise ValueError(
                f"grad_gram: {names} must have the same samples and positions, got "
                f"{list(a.shape)} and {list(g.shape)} at layer {layer}"
            )


@in_own_dtype
def grad_gram(
    acts: Layers,
    grads: Layers,
    acts2: Layers | None = None,
    grads2: Layers | None = None,
    *,
    normalize: bool = False,
    k: int | None = None,
    by: str = "abs",
    impl: str | None = None,
) -> torch.Tensor | Interactions:
    """Inner products of per-sample gradients of linear layers: similarity, influence, conflict.

    `K[i, j] = sum_l <grad_W_l loss_i, grad_W_l loss_j>`, with `grad_W = sum_t g[t] a[t]^T`. Nothing
    of the size of the parameters is formed.

    Args:
        acts: a layer's inputs `[n, d_in]` or `[n, T, d_in]`, or a sequence of them, one a layer.
        grads: the gradients at the layer's outputs, `[n, d_out]` or `[n, T, d_out]`, likewise.
        acts2, grads2: the other side, of m samples; None is the first side, at half the work.
        normalize: cosines rather than inner products; 0 with a gradient that is 0.
        k: keep the k strongest pairs without the n x m matrix (with one side, each pair i < j
            once); None returns the matrix.
        by: "abs" or "value", with k.
        impl: None (best for the device), "cpp", "triton" or "reference".

    Returns:
        `[n, m]` float32 (float64 for float64), or Interactions if k is given. Not differentiable.

    Raises:
        TypeError, ValueError: for dtypes, devices or shapes other than the above.

    Example:
        >>> acts, grads = torch.randn(5, 7, 8), torch.randn(5, 7, 3)
        >>> per_sample = torch.einsum("nti,nto->noi", acts, grads).flatten(1)
        >>> torch.allclose(mk.grad_gram(acts, grads), per_sample @ per_sample.T, atol=1e-3)
        True
    """
    left = _layers("acts", acts), _layers("grads", grads)
    _check_pairs(*left, "acts and grads")
    one_sided = acts2 is None or grads2 is None
    if one_sided and (acts2 is not None or grads2 is not None):
        raise ValueError("grad_gram: acts2 and grads2 go together, got one of them")
    right = left
    if acts2 is not None and grads2 is not None:
        right = _layers("acts2", acts2), _layers("grads2", grads2)
        _check_pairs(*right, "acts2 and grads2")
        if len(right[0]) != len(left[0]):
            raise ValueError(
                f"grad_gram: acts2 and grads2 must have the layers of acts, {len(left[0])}, got "
                f"{len(right[0])}"
            )
        for what, one, other in zip(("acts", "grads"), left, right, strict=True):
            for layer, (t, t2) in enumerate(zip(one, other, strict=True)):
                check_floating("grad_gram", **{what: t, f"{what}2": t2})
                if t2.shape[2] != t.shape[2]:
                    raise ValueError(
                        f"grad_gram: {what}2 must have the {t.shape[2]} columns of {what} at layer "
                        f"{layer}, got {t2.shape[2]}"
                    )
    impl = gram_op.resolve(impl, left[0][0].device)
    gram = _Gram(left, right, one_sided, normalize, impl)
    n, m = gram.n, gram.m
    if k is None:
        return gram.block(0, n, 0, m)
    check_selection("grad_gram", k, by, None)
    kept = nothing_found(gram.dtype, left[0][0].device)
    for top in range(0, n, BLOCK):
        for start in range(top if one_sided else 0, m, BLOCK):
            block = gram.block(top, min(n, top + BLOCK), start, min(m, start + BLOCK))
            strength = block.abs() if by == "abs" else block
            here = torch.ones_like(block, dtype=torch.bool)
            if len(kept[0]) == k:
                bound = kept[0][-1].abs() if by == "abs" else kept[0][-1]
                here = ~(strength < bound)
            if one_sided and start == top:
                here = here.triu(1)
            i, j = here.nonzero(as_tuple=True)
            kept = merged(kept, (block[i, j], i + top, j + start), k, by)
    return Interactions._trusted(*kept, shape=(n, m))


class _Gram:
    """Blocks of the Gram matrix, summed over layers."""

    def __init__(self, left, right, one_sided: bool, normalize: bool, impl: str):
        self.left, self.right, self.one_sided, self.impl = left, right, one_sided, impl
        self.n, self.m = left[0][0].shape[0], right[0][0].shape[0]
        self.dtype = accumulate_dtype(left[0][0].dtype)
        self.norms: tuple[torch.Tensor, torch.Tensor] | None = None
        if normalize:
            rows = self._norms(left)
            self.norms = rows, rows if one_sided else self._norms(right)

    def _norms(self, side) -> torch.Tensor:
        """[n], the norms of the samples' gradients."""
        squares = torch.zeros(side[0][0].shape[0], dtype=self.dtype, device=side[0][0].device)
        for a, g in zip(*side, strict=True):
            # a sample at a time: [T, T], not [n, T, T]
            for i, (one, other) in enumerate(zip(a.to(self.dtype), g.to(self.dtype), strict=True)):
                squares[i] += ((one @ one.T) * (other @ other.T)).sum()
        return squares.clamp(min=0).sqrt()

    def block(self, top: int, bottom: int, start: int, stop: int) -> torch.Tensor:
        shape = bottom - top, stop - start
        out = torch.zeros(shape, dtype=self.dtype, device=self.left[0][0].device)
        mirrored = self.one_sided and (top, bottom) == (start, stop)
        for a, g, a2, g2 in zip(*self.left, *self.right, strict=True):
            rows, cols = slice(top, bottom), slice(start, stop)
            gram_op(a[rows], g[rows], a2[cols], g2[cols], mirrored, out, impl=self.impl)
        if self.norms is not None:
            norms = self.norms[0][top:bottom, None] * self.norms[1][start:stop]
            out = torch.where(norms == 0, 0, out / norms)
        return out
