# SPDX-License-Identifier: Apache-2.0
"""The change of an activation as that of its features and of the error.

With x an activation, x' its counterfactual, and codes a, a' of both,

    x - x' = sum_f (a_f - a'_f) W[f] + (skip - skip') + (eps - eps')

since the bias cancels. Without a counterfactual x' is the bias: a', skip' and eps' are 0. The sum
is over the features that are active in either, the union of two sparse codes; a product with a
gradient g is one dot product for each of them, and nothing of tokens x F exists.

Whether the parts add up to `<x - x', g>` is checked at every token. eps is made of the SAE's own
`decode`, the dots of the decoder's rows, so an SAE whose output is not linear in its codes is seen.
The limit is what rounding can do (see `mikernels.models.claims`): of sums of n = max(d, features)
products, each at most `|g|` times the lengths of what is added, 8 deviations of `sqrt(n / 3) eps`;
and eps of a narrower dtype that the reconstruction was rounded to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.circuits.features.dictionaries import Dictionary, Slots, slots_of
from mikernels.models.sites import Site
from mikernels.ops.sae.gradients import gather_dot_op


class Products(NamedTuple):
    """A change's parts times a gradient.

    Attributes:
        features: `[n]`, of every slot. error: `[T]`. skip: `[T]`, None for an SAE without.
        whole: `[T]`, `<x - x', g>`, which they add up to.
    """

    features: torch.Tensor
    error: torch.Tensor
    skip: torch.Tensor | None
    whole: torch.Tensor


@dataclass(frozen=True, eq=False)
class Decomposed:
    """The change at one site, of T tokens.

    Attributes:
        site: the site. dictionary, number: whose, and the site's number in it.
        slots: token and feature of the n features that are active in x or x', with a.
        delta: `[n]`, a - a'.
        moved: `[T, d]`, x - x'. error, skip: of it.
        size: `[T]`, the sum of the lengths of all that was added to make these.
    """

    site: Site
    dictionary: Dictionary
    number: int
    slots: Slots
    delta: torch.Tensor
    moved: torch.Tensor
    error: torch.Tensor
    skip: torch.Tensor | None
    size: torch.Tensor

    def dots(self, g: torch.Tensor, repeats: int = 1) -> torch.Tensor:
        """`[repeats n]`: `<g, W[f]>` of every slot, for gradients `[repeats T, d]`."""
        tokens, features = self.slots.tokens, self.slots.features
        t = len(self.moved)
        found = g.new_zeros(repeats, len(tokens))
        for first, w, scale in self.dictionary.rows(self.number):
            own = (features >= first) & (features < first + len(w))
            here = own.nonzero()[:, 0]
            indices = features[here] - first
            if w.dtype != g.dtype:
                # in the wider dtype, the rows that are needed
                active, indices = indices.unique(return_inverse=True)
                w = w[active].to(g.dtype)
            counts = torch.zeros(t, dtype=torch.int64, device=g.device)
            counts.scatter_add_(0, tokens[here], torch.ones_like(here))
            offsets = torch.cat([counts.new_zeros(1), counts.repeat(repeats).cumsum(0)])
            dots = gather_dot_op(g, w, indices.repeat(repeats), offsets, None)
            found[:, here] = dots.view(repeats, len(here)) * scale
        return found.view(-1)

    def products(self, where: str, g: torch.Tensor, repeats: int = 1) -> Products:
        """What each part adds to a number with gradient g at the site, to first order.

        Args:
            g: `[T, d]`, or `[repeats T, d]` for several numbers, each with all tokens.

        Returns:
            Products of `[repeats n]` and `[repeats T]`.

        Raises:
            ValueError: the parts do not add up, or are not finite.
        """
        g = g.to(self.moved)
        dots = self.dots(g, repeats)
        several = g.view(repeats, *self.moved.shape)
        features = self.delta.repeat(repeats) * dots
        error = (self.error * several).sum(-1).view(-1)
        skip = None if self.skip is None else (self.skip * several).sum(-1).view(-1)
        whole = (self.moved * several).sum(-1).view(-1)
        total = error if skip is None else error + skip
        t = len(self.moved)
        copies = torch.arange(repeats, device=g.device)[:, None] * t
        total = total.index_add(0, (copies + self.slots.tokens).view(-1), features)
        self._check(where, total, whole, g)
        return Products(dots, error, skip, whole)

    def _check(self, where: str, total: torch.Tensor, whole: torch.Tensor, g: torch.Tensor) -> None:
        per_token = torch.bincount(self.slots.tokens, minlength=1).max()
        n = max(self.moved.shape[1], int(per_token))
        eps = 8 * math.sqrt((n + 8) / 3) * torch.finfo(self.moved.dtype).eps
        if (own := torch.finfo(self.dictionary.dtype).eps) > torch.finfo(self.moved.dtype).eps:
            eps += own
        repeats = len(total) // max(1, len(self.moved))
        limit = eps * self.size.repeat(repeats) * torch.linalg.vector_norm(g, dim=-1)
        limit += torch.finfo(limit.dtype).smallest_normal
        away = (total - whole).abs()
        if (away <= limit).all():
            return
        at = int((away <= limit).logical_not_().int().argmax())
        got, expected = float(total[at]), float(whole[at])
        if not (math.isfinite(got) and math.isfinite(expected)):
            raise ValueError(
                f"{where}: activations, codes and gradients must be finite, got {got:.6g} for "
                f"{expected:.6g} at {self.site}; load the model and the SAE in a wider dtype"
            )
        raise ValueError(
            f"{where}: features, error and bias of {self.dictionary.sae.name} must add up to the "
            f"activation at {self.site}, got {got:.9g} for {expected:.9g} within "
            f"{float(limit[at]):.2g}; its decode must be codes times w_dec plus a bias"
        )


class _Side(NamedTuple):
    """Of one activation: active features, and at each site the reconstruction and the skip."""

    slots: Slots
    y: tuple[torch.Tensor, ...]
    skip: tuple[torch.Tensor, ...] | None


def _side(dictionary: Dictionary, x: Mapping[Site, torch.Tensor], acc: torch.dtype) -> _Side:
    sae, read = dictionary.sae, dictionary.input(x)
    codes = sae.encode(read)
    slots, skip = slots_of(codes), sae.past_codes(read)
    return _Side(
        slots._replace(values=slots.values.to(acc)),
        dictionary.split(sae.decode(codes).to(acc)),
        None if skip is None else dictionary.split(skip.to(acc)),
    )


def _bias(dictionary: Dictionary, x: Mapping[Site, torch.Tensor], acc: torch.dtype) -> _Side:
    """Without any features."""
    sae, read = dictionary.sae, dictionary.input(x)
    codes = sae.encode(read[:1])
    y = sae.decode(codes.with_values(torch.zeros_like(codes.values))).to(acc)
    none = torch.empty(0, dtype=torch.int64, device=read.device)
    rows = y.expand(len(read), -1)
    return _Side(Slots(none, none, y.new_empty(0)), dictionary.split(rows), None)


def _union(f: int, a: Slots, b: Slots) -> tuple[Slots, torch.Tensor]:
    """The features of either, with a's values and the differences."""
    keys = torch.cat([a.tokens * f + a.features, b.tokens * f + b.features])
    found, place = keys.unique(return_inverse=True)
    clean, other = place[: len(a.tokens)], place[len(a.tokens) :]
    # each place is at most once in either
    values = a.values.new_zeros(len(found))
    values[clean] = a.values
    theirs = torch.zeros_like(values)
    theirs[other] = b.values
    return Slots(found // f, found % f, values), values - theirs


@torch.no_grad()
def decompose(
    dictionary: Dictionary,
    clean: Mapping[Site, torch.Tensor],
    other: Mapping[Site, torch.Tensor] | None,
) -> list[Decomposed]:
    """At every site that a dictionary writes.

    Args:
        clean, other: `[T, d]` at every site that it reads or writes; None: the biases.
    """
    acc = accumulate_dtype(torch.promote_types(dictionary.dtype, next(iter(clean.values())).dtype))
    own = _side(dictionary, clean, acc)
    far = _bias(dictionary, clean, acc) if other is None else _side(dictionary, other, acc)
    merged, delta = _union(dictionary.n_features, own.slots, far.slots)
    found = []
    for number, site in enumerate(dictionary.writes):
        x, y, y_far = clean[site].to(dictionary.device, acc), own.y[number], far.y[number]
        # without a counterfactual, of the bias alone
        x_far = y_far if other is None else other[site].to(x)
        added = [x, x_far, y, y_far]
        moved = x - x_far
        error, skip = moved - (y - y_far), None
        if own.skip is not None:
            skip = own.skip[number]
            added.append(skip)
            if far.skip is not None:
                added.append(far.skip[number])
                skip = skip - far.skip[number]
            error = error - skip
        size = torch.stack([torch.linalg.vector_norm(one, dim=-1) for one in added]).sum(0)
        norms = dictionary.norms(number).to(acc)
        for slots in (own.slots, far.slots):
            size.index_add_(0, slots.tokens, slots.values.abs() * norms[slots.features])
        reaches = _writes_there(dictionary, number, merged)
        parts = Slots(*(part[reaches] for part in merged))
        found.append(
            Decomposed(
                site, dictionary, number, parts, delta[reaches], moved, error, skip, size
            )
        )  # fmt: skip
    return found


def _writes_there(dictionary: Dictionary, number: int, slots: Slots) -> torch.Tensor:
    """The slots of features that write at a site: a cross-layer transcoder's up to its layer."""
    last = dictionary.rows(number)[-1]
    return (slots.features < last.first + len(last.w)).nonzero()[:, 0]
