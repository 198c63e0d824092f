# SPDX-License-Identifier: Apache-2.0
"""An ablation while it is entered: hooks that replace, and watch that they do.

They act in the context (of the thread, of the asyncio task) that entered it: elsewhere the same
model computes as ever. Of nested ablations the outer's hooks come first.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

from mikernels.circuits.ablation.place import Place, Replacement
from mikernels.circuits.ablation.replacements import Values
from mikernels.models.hooks import NEVER, eager
from mikernels.models.parts import Block, Decoder, first_tensor

_ACTIVE: ContextVar[tuple[Scope, ...]] = ContextVar("ablations", default=())
Positions = int | Sequence[int] | torch.Tensor


@contextmanager
def whole() -> Iterator[None]:
    """The model as it is without any ablation of this context, as a reference is read."""
    token = _ACTIVE.set(())
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def read_positions(
    where: str, positions: Positions | None
) -> tuple[int, ...] | torch.Tensor | None:
    """Which columns, or bool `[B, P]`.

    Raises:
        TypeError, ValueError: for something else, none, and one twice.
    """
    if positions is None:
        return None
    if isinstance(positions, torch.Tensor) and positions.dtype == torch.bool:
        if positions.dim() != 2 or not positions.any():
            raise ValueError(
                f"{where}: positions must be bool [B, P] with a True, or numbers, got "
                f"{list(positions.shape)}"
            )
        return positions
    given = positions.tolist() if isinstance(positions, torch.Tensor) else positions
    numbers = [given] if isinstance(given, int) else list(given)
    whole = all(isinstance(p, int) and not isinstance(p, bool) for p in numbers)
    if not whole or not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"{where}: positions must be different columns (from the end if negative), or bool "
            f"[B, P], got {positions}"
        )
    return tuple(numbers)


class Scope:
    """One entered ablation.

    Args:
        where: of messages: the public function.
        decoder, places, values: of the model.
        positions: of read_positions.
        which: bool `[R, n]`: which of n components are replaced in each row of a call; None for
            all of them in all rows.
        rows: `[R]`: of which prompt of `values` each row of a call is; None where row r is prompt
            r.
    """

    def __init__(
        self,
        where: str,
        decoder: Decoder,
        places: Sequence[Place],
        values: Values,
        positions: tuple[int, ...] | torch.Tensor | None = None,
        which: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ):
        self._where, self._decoder, self._places, self._values = where, decoder, places, values
        self._positions, self._which, self._rows = positions, which, rows
        self._called, self._ran = False, set[int]()
        # what is between the hooks of one block, of one thread
        self._here = threading.local()
        self._ended = False

    def _entered(self) -> bool:
        # a copied context (of an asyncio task) still names ablations that have ended
        return not self._ended and self in _ACTIVE.get()

    def _check_shape(self, b: int, p: int) -> None:
        for n, width in (self._values.shape, getattr(self._positions, "shape", (None, None))):
            rows = n if n is None or self._rows is None else len(self._rows)
            if rows not in (None, b) or width not in (None, p):
                want = [b if rows is None else rows, p if width is None else width]
                raise ValueError(
                    f"{self._where}: the model must be called on the prompts whose activations or "
                    f"positions were given, {want} tokens, got {[b, p]}; with kind='zero' or "
                    f"'mean', and positions that are numbers, it may be any"
                )

    def _check_known(self, p: int) -> None:
        """Whether there is a mean for every position at which the call has a token."""
        if (known := self._values.known) is None:
            return
        mask = getattr(self._here, "mask", None)
        tokens = torch.ones(p, dtype=torch.bool) if mask is None else (mask == 1).any(0).cpu()
        if (missing := tokens & ~known.cpu()).any():
            raise ValueError(
                f"{self._where}: reference must have a token wherever the prompts have one for "
                f"per_position=True, got none at position {int(missing.int().argmax())}; give "
                f"longer prompts, or per_position=False"
            )

    def _note(self, module: torch.nn.Module, args: Any, kwargs: Any = None) -> None:
        mask = None if kwargs is None else kwargs.get("attention_mask")
        self._here.mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    def _ended_call(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """After a call that nothing ended before its end."""
        self._here.mask = None
        missed = [place.name for place in self._places if place.layer not in self._ran]
        if self._entered() and missed:
            raise RuntimeError(
                f"{self._where}: {missed[0]} must be reached, got a model that ran without its "
                f"block; {NEVER}"
            )

    def _where_in(self, shape: tuple[int, int]) -> torch.Tensor | None:
        """bool `[1 | B, P, 1]` of the positions, None for all."""
        positions, (_, p) = self._positions, shape
        if positions is None:
            return None
        if isinstance(positions, torch.Tensor):
            mask = positions if self._rows is None else positions[self._rows.to(positions.device)]
            return mask[..., None]
        if not all(-p <= column < p for column in positions):
            raise ValueError(
                f"{self._where}: positions must be in {-p}..{p - 1} of {p} tokens, got "
                f"{list(positions)}"
            )
        columns = torch.zeros(p, dtype=torch.bool)
        columns[list(positions)] = True
        return columns[None, :, None]

    def _now(self, number: int) -> Replacement | None:
        if not self._entered():
            return None
        shape = getattr(self._here, "shape", None)
        if shape is None:
            raise self._decoder.refusal(f"{self._places[number].name} runs outside of its block")
        self._here.acted.add(number)
        own = self._where_in(shape)
        if self._which is not None:
            which = self._which[:, None, list(self._places[number].members)]
            own = which if own is None else which & own.to(which.device)
        elif own is not None:
            own = own.expand(*own.shape[:-1], len(self._places[number].members))
        return Replacement(shape, self._values.of(number, self._rows), own)

    def _enter(self, module: torch.nn.Module, args: Any, kwargs: Any = None) -> None:
        # without keywords it is called by threads that were there when the hook came
        if kwargs is None or not self._entered():
            return
        self._called = True
        b, p = first_tensor(args, kwargs).shape[:2]
        self._check_shape(b, p)
        self._check_known(p)
        self._here.shape, self._here.acted = (b, p), set()

    def _leave(
        self, block: int, numbers: list[int], module: torch.nn.Module, args: Any, output: Any
    ) -> None:
        if not self._entered():
            return
        self._ran.add(block)
        if missed := [i for i in numbers if i not in self._here.acted]:
            raise RuntimeError(
                f"{self._where}: {self._places[missed[0]].name} must be reached, got block {block} "
                f"that ran without it; {NEVER}"
            )
        del self._here.shape, self._here.acted

    def _hook(self, block: Block) -> Iterator[Callable[[], None]]:
        numbers = [i for i, place in enumerate(self._places) if place.layer == block.index]
        yield block.module.register_forward_pre_hook(self._enter, with_kwargs=True).remove
        for i in numbers:
            yield from self._places[i].edit(partial(self._now, i))
        leave = partial(self._leave, block.index, numbers)
        yield block.module.register_forward_hook(leave).remove

    def __reduce_ex__(self, protocol: Any) -> Any:
        # what hooks of a copy would do after the block, or to whom, nobody can tell
        raise RuntimeError(
            f"{self._where}: a model must be copied or pickled outside of the `with` block, got "
            f"one with components ablated; copy it before"
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """While it is entered, the components are replaced.

        Raises:
            RuntimeError: a component that a call did not reach.
        """
        model, layers = self._decoder.model, {0, *(place.layer for place in self._places)}
        with ExitStack() as stack:
            if self._values.known is not None:
                note = model.register_forward_pre_hook(self._note, with_kwargs=True)
                stack.callback(note.remove)
            for layer in sorted(layers):
                for remove in self._hook(self._decoder.blocks[layer]):
                    stack.callback(remove)
            stack.callback(model.register_forward_hook(self._ended_call).remove)
            # a wrapper of torch.compile around the model would leave out hooks
            stack.enter_context(eager())
            _ACTIVE.set((*_ACTIVE.get(), self))
            try:
                yield
            finally:
                self._ended = True
                # not by the token: blocks may end in any order
                _ACTIVE.set(tuple(scope for scope in _ACTIVE.get() if scope is not self))
        # not after an exception
        if not self._called:
            warnings.warn(
                f"{self._where}: the model did not run in the `with` block; call it inside",
                RuntimeWarning,
                stacklevel=5,
            )
