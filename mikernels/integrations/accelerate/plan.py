# SPDX-License-Identifier: Apache-2.0
"""What is to be replaced in an object, said by a library's page before anything is touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from mikernels.integrations.lazy import Ledger


@dataclass
class Method:
    """A method of one object and what is run in its place: `make(ledger)`, a plain function."""

    owner: Any
    name: str
    make: Callable[[Ledger], Callable[..., Any]]


@dataclass
class Plan:
    """What to replace.

    Attributes:
        library: name and version.
        methods: what runs with the encoder's products left.
        autoencoders: the modules with `encode`.
        by_feature: (module, name of a parameter, its axis of features), to be laid out by feature.
        optimizers: torch optimisers whose state follows that layout.
        kept: what is not replaced -> why.
        twin: makes a small object of the same class and a function `step(object) -> {name:
            tensor}` that trains it for a step and says losses, gradients and outputs.
        others: of a holder of several, the plans of the others, each with a twin of its own.
    """

    library: str
    methods: list[Method]
    autoencoders: list[torch.nn.Module]
    by_feature: list[tuple[torch.nn.Module, str, int]]
    twin: Callable[[], tuple[Any, Callable[[Any], dict[str, torch.Tensor]]]] | None
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    others: list[Plan] = field(default_factory=list)

    def with_more(self, other: Plan) -> Plan:
        """Both."""
        return Plan(
            self.library,
            self.methods + other.methods,
            self.autoencoders + other.autoencoders,
            self.by_feature + other.by_feature,
            self.twin,
            self.optimizers + other.optimizers,
            {**self.kept, **other.kept},
            [*self.others, other],
        )


class Page(Protocol):
    """What a library's module of this folder has."""

    PACKAGE: str

    def plan(self, obj: Any, *, correct: bool) -> Plan:
        """Raises TypeError for a class that is not known, ValueError for what is refused."""
        ...


def refuse_overrides(obj: Any, package: str, names: Sequence[str]) -> type:
    """The library's class of an object, none of whose methods a subclass overrides.

    Raises:
        ValueError: for a subclass with a method of its own, or an object with one.
    """
    kind = type(obj)
    known = next(c for c in kind.__mro__ if c.__module__.split(".")[0] == package)
    for name in names:
        owner = next((c for c in kind.__mro__ if name in vars(c)), None)
        if owner is not None and owner.__module__.split(".")[0] != package:
            raise ValueError(
                f"accelerate: expected {known.__name__}.{name} of {package}, got the one of "
                f"{owner.__module__}.{owner.__qualname__}, which may compute something else; "
                f"accelerate a {known.__name__}, or leave {name} as it is"
            )
        # a copy through pickle has the class's own, bound to it
        own = vars(obj).get(name)
        if own is not None and getattr(own, "__func__", None) is not getattr(kind, name, None):
            raise ValueError(
                f"accelerate: expected {known.__name__}.{name} of the class, got a method of this "
                f"object's own (accelerated already, or compiled); restore it first"
            )
    if getattr(obj, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"accelerate: expected a {known.__name__} that is not compiled, got one whose "
            f"compile() was called, which runs what it traced; accelerate one that is not"
        )
    return known
