# SPDX-License-Identifier: Apache-2.0
"""One pass in which the features of a site are functions of the sites before it.

Under "direct" paths every site is a constant of what follows, so that a gradient there counts no
path through another site; under "all" it is what it was.
"""

from __future__ import annotations

import torch

from mikernels.circuits.features.attribution import Batch, Request
from mikernels.circuits.features.decompose import Decomposed
from mikernels.circuits.features.dictionaries import Slots, slots_of
from mikernels.circuits.features.places import Change, changed, taps, tokens_of
from mikernels.circuits.prompts import Prompts
from mikernels.circuits.targets import Behavior
from mikernels.models.parts import Tap
from mikernels.models.sites import Site

PATHS = ("direct", "all")


class Linked:
    """A pass of some prompts, several times side by side. Parameters should be frozen.

    Attributes:
        values: `[B]`, the target's, of the first copy, in the graph.
    """

    def __init__(
        self, request: Request, batch: Batch, prompts: Prompts, behavior: Behavior, paths: str,
        repeats: int,
    ):  # fmt: skip
        self.prompts, self.repeats, self.x = prompts, repeats, batch.x
        self.before: dict[Site, torch.Tensor] = {}
        self.after: dict[Site, torch.Tensor] = {}
        written = {site for one in request.dictionaries for site in one.writes}
        first = Tap(request.decoder.blocks[0].module, before=True)

        def begin(x: torch.Tensor) -> torch.Tensor:
            return x.detach().requires_grad_()

        def at(site: Site) -> Change:
            cut = paths == "direct" and site in written

            def pass_on(x: torch.Tensor) -> torch.Tensor:
                self.before[site] = x
                self.after[site] = begin(x) if cut else x
                return self.after[site]

            return pass_on

        changes: dict[Tap, Change] = {first: begin}
        for site, tap in taps(request.decoder, batch.flows, batch.x).items():
            changes[tap] = at(site)
        self.values = changed(request.decoder, prompts, behavior, changes, repeats)

    def codes(self, part: Decomposed) -> list[Slots]:
        """Of each copy, in the graph: exactly the codes of the pass without copies."""
        own = part.dictionary
        t = len(part.moved)
        given: list[dict[Site, torch.Tensor]] = [{} for _ in range(self.repeats)]
        for site in own.reads:
            seen = (self.before if site in own.writes else self.after)[site]
            rows = tokens_of(self.prompts, seen, self.repeats).split(t)
            for copy, x in zip(given, rows, strict=True):
                # the same numbers, where a product of more rows may be rounded otherwise
                copy[site] = self.x[site] + (x - x.detach())
        return [slots_of(own.sae.encode(own.input(copy))) for copy in given]

    def pulled(self, total: torch.Tensor, sites: list[Site]) -> dict[Site, torch.Tensor]:
        """`[repeats T, d]`: the gradients of a total at the sites that it depends on."""
        known = [site for site in sites if self.after[site].requires_grad]
        if not known or not total.requires_grad:
            return {}
        grads = torch.autograd.grad(
            total, [self.after[site] for site in known], retain_graph=True, allow_unused=True
        )
        return {
            site: tokens_of(self.prompts, g, self.repeats)
            for site, g in zip(known, grads, strict=True)
            if g is not None
        }
