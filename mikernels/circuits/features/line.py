# SPDX-License-Identifier: Apache-2.0
"""Integrated gradients of one site: the gradient averaged on the way from x' to x.

With features and error of the site at `x' + alpha (x - x')`, and all that is before it, or goes
around it, as in the prompt,

    g = mean over alpha of the gradient there,   alpha = (s + 1/2) / steps,  s = 0 .. steps - 1

so that `<x - x', g>` tends to the number's own change when x' is put in the place of x (Marks et
al., arXiv 2403.19647, who take the left ends of the steps; the midpoints' error falls with the
square of the number of steps). One forward and backward pass for each step and site.
"""

from __future__ import annotations

import torch

from mikernels.circuits.features.places import changed, spread, tokens_of
from mikernels.circuits.passes import gradients
from mikernels.circuits.prompts import Prompts
from mikernels.circuits.targets import Behavior
from mikernels.models.hooks import frozen
from mikernels.models.parts import Decoder, Tap
from mikernels.models.sites import Site


def average_gradient(
    decoder: Decoder,
    prompts: Prompts,
    behavior: Behavior,
    site: Site,
    tap: Tap,
    moved: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """`[T, d]`, of the tokens that are not padding.

    Args:
        site, tap: the place. moved: `[T, d]`, x - x'.
    """
    total = torch.zeros_like(moved)
    with frozen(decoder.model):
        for step in range(steps):
            leaves: list[torch.Tensor] = []

            def along(x: torch.Tensor, step: int = step, leaves=leaves) -> torch.Tensor:
                back = spread(prompts, moved * (1 - (step + 0.5) / steps), x)
                leaves.append((x.detach() - back).requires_grad_())
                return leaves[0]

            values = changed(decoder, prompts, behavior, {tap: along})
            (g,) = gradients(decoder, values, {str(site): leaves[0]})
            total += tokens_of(prompts, g).to(total)
    return total / steps
