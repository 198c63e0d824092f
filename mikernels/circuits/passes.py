# SPDX-License-Identifier: Apache-2.0
"""One forward and one backward pass of a decoder: what its parts wrote, and the gradients there.

Parameters are frozen meanwhile, so that no weight gradient is computed, and nothing is left in any
`.grad`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from mikernels.circuits.targets import Behavior
from mikernels.models.hooks import frozen
from mikernels.models.parts import Decoder
from mikernels.models.rules import Rules
from mikernels.models.rules import rules as engine
from mikernels.models.watch import Flow, Watch


@dataclass(frozen=True, eq=False)
class Pass:
    """What one pass over some prompts found.

    Attributes:
        values: `[B]`, the target's; not differentiable.
        sites: for each block what `Watch.sites` has.
        flows: for each block as `Watch.flows`.
        grads: for each block the gradients of the sum of the values at the sites that were asked
            for.
    """

    values: torch.Tensor
    sites: list[dict[str, torch.Tensor]]
    flows: list[Flow]
    grads: list[dict[str, torch.Tensor]]


def under(model: torch.nn.Module, rules: str | Rules | None) -> AbstractContextManager[Any]:
    """`with rules(model, ...)`, which gives its report; nothing and None for None."""
    return nullcontext() if rules is None else engine(model, rules)


def run(decoder: Decoder, inputs: Mapping[str, Any], last: bool = False) -> torch.Tensor:
    """`[B, P, V]` logits.

    Args:
        last: those of the last position are enough, `[B, 1, V]`, where the model can: of
            SmolLM2's multiply-adds the unembedding is a fifth, and 512 tokens' logits are 100 MB.
    """
    known = inspect.signature(decoder.model.forward).parameters
    return decoder.logits(
        {**inputs, "logits_to_keep": 1} if last and "logits_to_keep" in known else inputs
    )


def gradients(
    decoder: Decoder, values: torch.Tensor, wanted: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Of the sum of the values at each; a ValueError names the first that they do not depend on."""
    cut = [name for name, tensor in wanted.items() if not tensor.requires_grad]
    found: tuple[torch.Tensor | None, ...] = ()
    if not cut and values.requires_grad:
        found = torch.autograd.grad(values.sum(), list(wanted.values()), allow_unused=True)
        cut = [name for name, g in zip(wanted, found, strict=True) if g is None]
    grads = [g for g in found if g is not None]
    if len(grads) < len(wanted):
        place = cut[0] if cut else "the logits"
        raise decoder.refusal(f"no gradient reaches {place}: something detaches it")
    return grads


def backward(
    decoder: Decoder,
    inputs: Mapping[str, Any],
    kept: torch.Tensor | None,
    behavior: Behavior,
    at: tuple[str, ...],
    w_o: list[torch.Tensor],
) -> Pass:
    """Run the model on a batch of prompts, and back.

    Args:
        inputs, kept: of `with_positions`.
        at: the sites whose gradients are wanted.
        w_o: of `decoder.w_o` for each block where heads are wanted, else empty.

    Raises:
        ValueError: for a model whose arithmetic is another (`mikernels.models.watch`); through
            which no gradient flows to a site.
    """
    with frozen(decoder.model), ExitStack() as stack:
        watch = Watch(decoder, kept, w_o, stack)
        last = behavior.only_last(kept)
        logits = run(decoder, inputs, last)
        watch.check()
        values = behavior(logits, None if last else kept)
        places = [(i, name) for i, site in enumerate(watch.sites) for name in at if name in site]
        wanted = {f"L{i}.{name}": watch.sites[i][name] for i, name in places}
        grads: list[dict[str, torch.Tensor]] = [{} for _ in watch.sites]
        for (i, name), g in zip(places, gradients(decoder, values, wanted), strict=True):
            grads[i][name] = g
    return Pass(values.detach(), watch.sites, watch.flows, grads)


def forward(
    decoder: Decoder,
    inputs: Mapping[str, Any],
    kept: torch.Tensor | None,
    w_o: list[torch.Tensor],
) -> list[dict[str, torch.Tensor]]:
    """The sites of a pass without gradients."""
    # tensors of inference mode have no versions to watch
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        watch = Watch(decoder, kept, w_o, stack)
        run(decoder, inputs, last=True)
        watch.check()
    return watch.sites
