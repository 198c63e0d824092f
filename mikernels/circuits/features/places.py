# SPDX-License-Identifier: Apache-2.0
"""Sites of a decoder in a pass with gradients: seen, differentiated, replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from mikernels.circuits.passes import gradients, run
from mikernels.circuits.prompts import Prompts
from mikernels.circuits.targets import Behavior
from mikernels.models.hooks import NEVER, frozen, returned
from mikernels.models.parts import Decoder, Tap, first_tensor
from mikernels.models.sites import Site
from mikernels.models.watch import Flow, Watch

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Visit:
    """What a pass found, of the T tokens that are not padding.

    Attributes:
        values: `[B]`, the target's.
        x: `[T, d]` at each site. grads: of the sum of the values, at those asked for.
        flows: of `Watch.flows`: which modules write.
    """

    values: torch.Tensor
    x: dict[Site, torch.Tensor]
    grads: dict[Site, torch.Tensor]
    flows: list[Flow]


def tokens_of(prompts: Prompts, x: torch.Tensor, repeats: int = 1) -> torch.Tensor:
    """`[repeats T, d]` of `[repeats B, P, d]` or `[repeats B P, d]`: without padding."""
    rows = x.reshape(-1, x.shape[-1])
    kept = prompts.kept
    return rows if kept is None else rows[kept.reshape(-1).repeat(repeats).to(rows.device)]


def spread(prompts: Prompts, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`[T, d]` in the shape of `like`, 0 at padding."""
    rows = rows.to(like)
    if prompts.kept is not None:
        whole = rows.new_zeros(prompts.kept.numel(), rows.shape[-1])
        whole[prompts.kept.reshape(-1).to(rows.device)] = rows
        rows = whole
    return rows.reshape(like.shape)


def visit(
    decoder: Decoder,
    prompts: Prompts,
    behavior: Behavior,
    sites: Iterable[Site],
    at: Iterable[Site] = (),
) -> Visit:
    """One watched pass, and back where gradients are wanted.

    Args:
        sites: wanted. at: those of them whose gradients are.

    Raises:
        ValueError: for a model whose arithmetic is another (`mikernels.models.watch`); through
            which no gradient flows to a site.
    """
    at = list(at)
    with ExitStack() as stack:
        if at:
            stack.enter_context(frozen(decoder.model))
        else:
            stack.enter_context(torch.no_grad())
        watch = Watch(decoder, prompts.kept, [], stack)
        seen: dict[Site, torch.Tensor] = {}

        def keep(site: Site, tap: Tap) -> None:
            stack.callback(tap.hook(lambda x: seen.__setitem__(site, x)))

        last = len(decoder.blocks) - 1
        for site in sites:
            if site.place == "mlp_in":
                reader = decoder.blocks[site.layer].mlp_reader
                assert reader is not None
                keep(site, Tap(reader, before=True))
            elif site == Site(last):
                keep(site, Tap(decoder.blocks[last].module))
        only = behavior.only_last(prompts.kept)
        logits = run(decoder, prompts.given, only)
        watch.check()
        values = behavior(logits, None if only else prompts.kept)
        for site in sites:
            if site.place == "residual" and site.layer < last:
                seen[site] = watch.sites[site.layer + 1]["x"]
            elif site.place in ("attn_out", "mlp_out"):
                seen[site] = watch.sites[site.layer][site.place.removesuffix("_out")]
        if lost := [site for site in sites if site not in seen]:
            raise decoder.refusal(f"hooks do not fire at {lost[0]}; {NEVER}")
        wanted = {str(site): seen[site] for site in at}
        found = gradients(decoder, values, wanted) if wanted else []
    x = {site: tokens_of(prompts, seen[site].detach()) for site in sites}
    grads = {site: tokens_of(prompts, g) for site, g in zip(at, found, strict=True)}
    return Visit(values.detach(), x, grads, watch.flows)


def taps(decoder: Decoder, flows: list[Flow], sites: Iterable[Site]) -> dict[Site, Tap]:
    """Where sites are seen and replaced, once a pass has told which modules write."""
    found = {}
    for site in sites:
        block, flow = decoder.blocks[site.layer], flows[site.layer]
        module: Any = {
            "residual": block.module, "mlp_in": block.mlp_reader,
            "mlp_out": flow.mlp_writer, "attn_out": flow.attention_writer,
        }[site.place]  # fmt: skip
        found[site] = Tap(module, before=site.place == "mlp_in")
    return found


def replace(tap: Tap, change: Change) -> Callable[[], None]:
    """`change` of each tensor that passes goes on in its place; what is returned ends that."""
    if not tap.before:

        def leave(module: torch.nn.Module, args: Any, output: Any) -> Any:
            x = change(returned(output))
            if not isinstance(output, tuple | list):
                return x
            parts = (x, *output[1:])
            # a named tuple keeps its names
            named = hasattr(output, "_fields")
            return type(output)(*parts) if named else type(output)(parts)

        return tap.module.register_forward_hook(leave).remove

    def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        x = first_tensor(args, kwargs)
        y = change(x)
        return (
            tuple(y if one is x else one for one in args),
            {name: y if one is x else one for name, one in kwargs.items()},
        )

    return tap.module.register_forward_pre_hook(enter, with_kwargs=True).remove


def changed(
    decoder: Decoder,
    prompts: Prompts,
    behavior: Behavior,
    changes: Mapping[Tap, Change],
    repeats: int = 1,
) -> torch.Tensor:
    """The values `[B]` of a pass with sites replaced, in the graph. Parameters should be frozen.

    Args:
        repeats: how many times the prompts run, side by side; the values are those of the first.
    """
    given, b = prompts.given, len(prompts.ids)
    if repeats > 1:
        given = {
            name: value.repeat(repeats, *[1] * (value.dim() - 1))
            if isinstance(value, torch.Tensor) and len(value) == b
            else value
            for name, value in given.items()
        }
    with ExitStack() as stack:
        for tap, change in changes.items():
            stack.callback(replace(tap, change))
        only = behavior.only_last(prompts.kept)
        logits = run(decoder, given, only)
        return behavior(logits[:b], None if only else prompts.kept)
