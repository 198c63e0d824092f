# SPDX-License-Identifier: Apache-2.0
"""Experts of a mixture as components: each adds its own term to what all of them return.

Those that are replaced get the weight 0, so that what the others add is computed as ever, and the
values that stand for them are added to the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from mikernels.circuits.ablation.place import Now
from mikernels.models.experts import Call, Experts
from mikernels.models.parts import Tap


class ExpertPlace:
    """Some experts of a block; W is M times d.

    Args:
        numbers: of the experts, one a member.
    """

    def __init__(
        self,
        name: str,
        layer: int,
        members: Iterable[int],
        experts: Experts,
        numbers: Iterable[int],
    ):
        self.name, self.layer, self.members = name, layer, tuple(members)
        self._experts, self._numbers = experts, torch.tensor(list(numbers))

    def watch(
        self, shape: tuple[int, int], see: Callable[[torch.Tensor], None]
    ) -> Iterable[Callable[[], None]]:
        def show(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            call = Call(args, kwargs)
            routed = call.routed()
            assert routed is not None
            wanted = self._numbers.to(routed.x.device)
            see(self._experts.contributions(call, wanted).reshape(*shape, -1))

        hook: Callable[..., Any] = show
        yield self._experts.module.register_forward_hook(hook, with_kwargs=True).remove

    def edit(self, now: Now) -> Iterable[Callable[[], None]]:
        def enter(module: Any, args: Any, kwargs: Any = None) -> Any:
            # without keywords it is called by threads that were there when the hook came
            if kwargs is None or (r := now()) is None:
                return None
            call = Call(args, kwargs)
            routed = call.routed()
            assert routed is not None
            expert = routed.expert
            gone = expert[..., None] == self._numbers.to(expert.device)
            if r.own is not None:
                own = r.own.to(expert.device).expand(*r.shape, len(self.members))
                gone = gone & own.reshape(len(expert), 1, -1)
            weight = routed.weight.masked_fill(gone.any(-1), 0)
            return tuple(call.of(routed._replace(weight=weight)))

        def leave(y: torch.Tensor) -> torch.Tensor:
            if (r := now()) is None:
                return y
            m, d = len(self.members), y.shape[-1]
            value = r.value.to(y).expand(*r.value.shape[:-1], m * d).unflatten(-1, (m, d))
            if r.own is not None:
                value = torch.where(r.own.to(y.device)[..., None], value, 0)
            added = value.sum(-2)
            return y + added.expand(*r.shape, -1).reshape(y.shape)

        hook: Callable[..., Any] = enter
        yield self._experts.module.register_forward_pre_hook(hook, with_kwargs=True).remove
        yield Tap(self._experts.module).edit(leave)
