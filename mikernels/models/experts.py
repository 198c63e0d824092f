# SPDX-License-Identifier: Apache-2.0
"""The experts of a mixture, and what each of them adds at every token.

transformers 5 holds the weights of all experts of a block in tensors `[E, ., .]` of one module,
which is called with the tokens `[T, d]`, for each the numbers `[T, k]` of the experts that it is
routed to and their weights `[T, k]`, and returns

    y_t = sum over slots s of weight_ts f_{expert_ts}(x_t).

An expert's contribution is its term, 0 at a token that is routed to others. It is computed by the
module itself, of one slot at a time. That these add up to y is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from mikernels.models.claims import Claims
from mikernels.models.hooks import returned
from mikernels.models.parts import Block, Decoder


class Routed(NamedTuple):
    """What experts are called with: `[T, d]`, `[T, k]` int64, `[T, k]`."""

    x: torch.Tensor
    expert: torch.Tensor
    weight: torch.Tensor


class Call(NamedTuple):
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def routed(self) -> Routed | None:
        """Of these; None where they are others."""
        given = [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, torch.Tensor)]
        floats = [x for x in given if x.is_floating_point() and x.dim() == 2]
        whole = [x for x in given if x.dtype in (torch.int64, torch.int32) and x.dim() == 2]
        if len(given) != 3 or len(floats) != 2 or len(whole) != 1 or len(set(map(len, given))) > 1:
            return None
        return Routed(floats[0], whole[0], floats[1]) if floats[1].shape == whole[0].shape else None

    def of(self, other: Routed) -> Call:
        """The same with other tokens and experts."""
        routed = self.routed()
        assert routed is not None
        swap = {id(old): new for old, new in zip(routed, other, strict=True)}
        return Call(
            tuple(swap.get(id(x), x) for x in self.args),
            {name: swap.get(id(x), x) for name, x in self.kwargs.items()},
        )


class Experts(NamedTuple):
    """Of one block: the module that holds their weights, and their number."""

    module: torch.nn.Module
    n: int

    def contributions(self, call: Call, wanted: torch.Tensor) -> torch.Tensor:
        """`[T, M, d]`: what M experts (their numbers, on the device of the tokens) add."""
        routed = call.routed()
        assert routed is not None
        x, expert, weight = routed
        # of each expert its place among the wanted, M for none
        place = torch.full((self.n + 1,), len(wanted), device=x.device)
        place[wanted] = torch.arange(len(wanted), device=x.device)
        places = place[expert.clamp(max=self.n)]
        token, slot = (places < len(wanted)).nonzero().unbind(-1)
        added = x.new_zeros(len(x), len(wanted), x.shape[-1])
        if len(token):
            one = Routed(x[token], expert[token, slot, None], weight[token, slot, None])
            args, kwargs = call.of(one)
            # past the hooks, which are of the whole
            made = returned(self.module.forward(*args, **kwargs)).to(added.dtype)
            # a token has each expert once
            added[token, places[token, slot]] = made
        return added


def experts_of(block: Block) -> Experts | None:
    """The module with a weight `[E, ., .]` in a block's MLP; None without one, or with several."""
    found = []
    for part in () if block.mlp is None else block.mlp.modules():
        down = part._parameters.get("down_proj")
        if down is not None and down.dim() == 3:
            found.append(Experts(part, len(down)))
    return found[0] if len(found) == 1 else None


def watch_experts(decoder: Decoder, block: Block, claims: Claims, stack: ExitStack) -> None:
    """Claims, in one forward pass, that the contributions of a block's experts add up."""
    experts = experts_of(block)
    assert experts is not None

    def leave(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call, y = Call(args, kwargs), returned(output)
        if call.routed() is None:
            raise decoder.refusal(
                f"the experts of block {block.index} ({type(module).__name__}) are not called with "
                f"tokens [T, d], the experts of each [T, k] and their weights [T, k]"
            )
        parts = experts.contributions(call, torch.arange(experts.n, device=y.device))
        # a product is rounded to eps of its factors' sizes, of which |part| is the trace that is
        # left here
        size = parts.norm(dim=-1).sum(-1, keepdim=True)
        limit = 8 * torch.finfo(y.dtype).eps * size.expand_as(y)
        claim = f"the experts of block {block.index} must add up to what {type(module).__name__} is"
        claims.equal(claim, y[None], parts.sum(1)[None], limit[None])

    hook: Callable[..., Any] = leave
    stack.callback(experts.module.register_forward_hook(hook, with_kwargs=True).remove)
