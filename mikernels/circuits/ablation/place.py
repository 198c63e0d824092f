# SPDX-License-Identifier: Apache-2.0
"""Places in a model where components are seen and replaced, all of one tensor at once.

A place has M components with, of every token, W numbers side by side; the first dimensions of what
a model passes there may be B and P, or their product (OPT, experts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch

from mikernels.models.parts import Tap


class Replacement(NamedTuple):
    """What stands for components in one pass.

    Attributes:
        shape: (B, P) of the pass.
        value: broadcasts to `[B, P, W]`.
        own: bool, broadcasts to `[B, P, M]`: which components are replaced, where. None for all.
    """

    shape: tuple[int, int]
    value: torch.Tensor
    own: torch.Tensor | None


Now = Callable[[], Replacement | None]
"""What stands there now; None for the model's own."""


class Place(Protocol):
    """Of one block.

    Attributes:
        name: for messages. layer: the block.
        members: the numbers of its M components, among all that are named.
    """

    name: str
    layer: int
    members: tuple[int, ...]

    def watch(
        self, shape: tuple[int, int], see: Callable[[torch.Tensor], None]
    ) -> Iterable[Callable[[], None]]:
        """Hooks that show `[B, P, W]`; what removes them."""
        ...

    def edit(self, now: Now) -> Iterable[Callable[[], None]]:
        """Hooks that replace; what removes them."""
        ...


class Slices:
    """Components that are coordinates of one tensor: heads of z, neurons, a whole output.

    Args:
        tap: where `[B, P, D]` passes (`[B, P, H, dh]` are D = H dh).
        width: D. columns: of each member its coordinates.
    """

    def __init__(
        self,
        name: str,
        layer: int,
        members: Iterable[int],
        tap: Tap,
        width: int,
        columns: Iterable[range],
    ):
        self.name, self.layer, self.members, self._tap = name, layer, tuple(members), tap
        parts = list(columns)
        every = torch.tensor([i for part in parts for i in part])
        # which member each column is of
        self._member = torch.tensor([m for m, part in enumerate(parts) for _ in part])
        self._columns = None if torch.equal(every, torch.arange(width)) else every

    def _move(self, device: torch.device) -> None:
        """Once, to where the model computes."""
        self._member = self._member.to(device)
        self._columns = None if self._columns is None else self._columns.to(device)

    def watch(
        self, shape: tuple[int, int], see: Callable[[torch.Tensor], None]
    ) -> Iterable[Callable[[], None]]:
        def show(x: torch.Tensor) -> None:
            flat = x.reshape(*shape, -1)
            self._move(x.device)
            see(flat if self._columns is None else flat.index_select(-1, self._columns))

        yield self._tap.hook(show)

    def edit(self, now: Now) -> Iterable[Callable[[], None]]:
        def change(x: torch.Tensor) -> torch.Tensor:
            if (r := now()) is None:
                return x
            self._move(x.device)
            flat = x.reshape(*r.shape, -1)
            old = flat if self._columns is None else flat.index_select(-1, self._columns)
            value = r.value.to(old)
            if r.own is None:
                # a tensor of its own: a model may change it in place
                new = value.expand_as(old).clone(memory_format=torch.contiguous_format)
            else:
                own = r.own.to(x.device).index_select(-1, self._member)
                new = torch.where(own, value, old)
            if self._columns is not None:
                new = flat.index_copy(-1, self._columns, new)
            return new.reshape(x.shape)

        yield self._tap.edit(change)
