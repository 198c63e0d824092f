# SPDX-License-Identifier: Apache-2.0
"""Features of an SAE as components.

    x' = x + sum over replaced features f of (value_f - code_f(x)) w_dec[f]

So what the SAE does not reconstruct stays, and so do the codes of all other features. Of M features
`[tokens, M]` is formed, never `[tokens, F]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.circuits.ablation.place import Now
from mikernels.models.parts import Tap
from mikernels.nn.sae import SAE


class FeaturePlace:
    """Some features of the SAE at one site; W is M.

    Args:
        tap: where `[B, P, d]` passes. features: their numbers, one a member.
    """

    def __init__(
        self,
        name: str,
        layer: int,
        members: Iterable[int],
        tap: Tap,
        sae: SAE,
        features: Iterable[int],
    ):
        self.name, self.layer, self.members, self._tap = name, layer, tuple(members), tap
        self._sae, self._features = sae, torch.tensor(list(features))

    def _codes(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, P, M]` of x `[B, P, d]`."""
        codes = self._sae.encode(x)
        device, m = codes.indices.device, len(self._features)
        # of each feature its place among the wanted, M for none
        place = torch.full((codes.n_features,), m, device=device)
        place[self._features.to(device)] = torch.arange(m, device=device)
        found = codes.values.new_zeros(*x.shape[:-1], m + 1)
        return found.scatter_add(-1, place[codes.indices], codes.values)[..., :m]

    def watch(
        self, shape: tuple[int, int], see: Callable[[torch.Tensor], None]
    ) -> Iterable[Callable[[], None]]:
        def show(x: torch.Tensor) -> None:
            see(self._codes(x.reshape(*shape, -1).to(self._sae.w_dec.device)))

        yield self._tap.hook(show)

    def edit(self, now: Now) -> Iterable[Callable[[], None]]:
        def change(x: torch.Tensor) -> torch.Tensor:
            if (r := now()) is None:
                return x
            w_dec = self._sae.w_dec
            flat = x.reshape(*r.shape, -1).to(w_dec.device)
            codes = self._codes(flat)
            acc = accumulate_dtype(torch.promote_types(w_dec.dtype, x.dtype))
            moved = r.value.to(w_dec.device, acc) - codes.to(acc)
            if r.own is not None:
                moved = torch.where(r.own.to(w_dec.device), moved, 0)
            rows = w_dec.index_select(0, self._features.to(w_dec.device)).to(acc)
            return (flat.to(acc) + moved @ rows).to(x).reshape(x.shape)

        yield self._tap.edit(change)
