# SPDX-License-Identifier: Apache-2.0
"""What each rule did: on how many modules, and by how much."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from mikernels.models.rules.preset import GRADIENT


@dataclass(frozen=True)
class Effect:
    """One rule in one `with rules(...)`.

    Attributes:
        rule, value: a field of Rules and what was said.
        places: modules that it is for.
        acted: of those, on how many a forward pass was changed.
        change: |gradient with the rule - without| / |without| at what it changes, over all of
            them; None before a backward pass, and for frozen patterns, of which nothing passes.
    """

    rule: str
    value: Any
    places: int
    acted: int
    change: float | None


class RuleReport:
    """The rules of one `with rules(...)`, filled while models run in it; prints as a table."""

    def __init__(self, said: dict[str, Any], places: dict[str, dict[str, int | None]]):
        """Of each rule the places and their layers."""
        self._said, self._places = said, places
        self._blocks: set[int] = set()
        self._overruled: dict[str, set[str]] = defaultdict(set)
        self._ran: dict[str, set[str]] = defaultdict(set)
        self._acted: dict[str, set[str]] = defaultdict(set)
        # (rule, device) -> the sums so far, of the differences and of the true gradients
        self._changes: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._lock = threading.Lock()

    def ran(self, rule: str, place: str) -> None:
        """A place of this rule had a gradient to come."""
        self._ran[rule].add(place)

    def acted(self, rule: str, place: str) -> None:
        """The rule changed it."""
        self._acted[rule].add(place)

    def overruled(self, rule: str, place: str) -> None:
        """It was for an inner block to say."""
        self._overruled[rule].add(place)

    def entered(self, layer: int) -> None:
        """A block of the model had a gradient to come."""
        self._blocks.add(layer)

    def changed(self, rule: str, change: torch.Tensor, plain: torch.Tensor) -> None:
        """By these squared norms, of the difference and of the true gradient."""
        sums = torch.stack([change.detach(), plain.detach()]).double()
        at = rule, sums.device
        with self._lock:
            self._changes[at] = self._changes[at] + sums if at in self._changes else sums

    def missed(self) -> list[tuple[str, str]]:
        """(rule, place) that ran without being changed."""
        return [(r, p) for r in self._said for p in sorted(self._ran[r] - self._acted[r])]

    def passed_by(self) -> list[tuple[str, int, str]]:
        """(rule, block, a place of the rule in it) of blocks that ran without it."""
        found = []
        for rule, places in self._places.items():
            if self._said[rule] in (GRADIENT, 1.0):
                continue  # which is so without any place
            touched = self._acted[rule] | self._overruled[rule]
            for layer in sorted(self._blocks):
                there = [name for name, at in places.items() if at == layer]
                if there and touched.isdisjoint(there):
                    found.append((rule, layer, there[0]))
        return found

    @property
    def any_ran(self) -> bool:
        """Whether a model ran with gradients."""
        return any(self._ran.values())

    @property
    def effects(self) -> list[Effect]:
        """Of each rule; reads the device."""
        return [
            Effect(rule, value, len(self._places[rule]), len(self._acted[rule]), self._change(rule))
            for rule, value in self._said.items()
        ]

    def __getitem__(self, rule: str) -> Effect:
        return next(effect for effect in self.effects if effect.rule == rule)

    def _change(self, rule: str) -> float | None:
        value = self._said[rule]
        if isinstance(value, int | float) and rule != "softmax":
            return abs(value - 1.0) if self._acted[rule] else None
        with self._lock:
            found = [sums for (name, _), sums in self._changes.items() if name == rule]
        if not found:
            return None
        change, plain = torch.stack([sums.cpu() for sums in found]).sum(0).tolist()
        # NaN stays
        return float(change > 0) if plain <= 0 else math.sqrt(change / plain)

    def _cells(self) -> list[tuple[str, ...]]:
        head: tuple[str, ...] = ("rule", "value", "acted on", "of", "change of the gradient")
        return [head] + [
            (
                e.rule, str(e.value), str(e.acted), str(e.places),
                "-" if e.change is None else f"{100 * e.change:.3g} %",
            )
            for e in self.effects
        ]  # fmt: skip

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        )

    def __rich__(self) -> Table:
        head, *rows = self._cells()
        table = Table()
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i < 2 else "right")
        for row in rows:
            table.add_row(*row)
        return table
