# SPDX-License-Identifier: Apache-2.0
"""What a backward rule may say, and the published methods as such rules.

AttnLRP and RelP are forms of layer-wise relevance propagation, which the authors of LXT call "a
patented technology that can only be used free of charge for personal and scientific purposes".
What is here is written from the equations; whether one may use it, its user has to know. GIM and
frozen scales are not concerned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

GRADIENT, FROZEN, SECANT = "gradient", "frozen", "secant"
FACTORS = ("query", "key", "value", "gate", "up")
# a rule that a model of another kind has no place for: no gated MLP in GPT-2
OPTIONAL = ("gate", "up")


@dataclass(frozen=True)
class Rules:
    """How each kind of place is differentiated; None says nothing about it.

    With y the place's output, g the gradient there and sg(.) what is held constant:

    Attributes:
        norm: of `y = gain (x - mean) / scale + bias` (no mean in an RMS norm): "gradient", or
            "frozen": `gain (x - mean) / sg(scale) + bias`.
        softmax: of attention's pattern `P = softmax(S)`: "gradient"; "frozen": `sg(P)`; or a
            temperature t > 0: `dS = P' (dP - sum_j P' dP)` with `P' = softmax(S / t)`.
        query, key: factors of the gradients of q and k, through the scores and the pattern.
        value: factor of the gradient of v.
        activation: of an MLP's `y = f(x)`: "gradient", or "secant": `x sg(f(x) / x)`, at 0 its
            limit f'(0).
        gate, up: factors of the gradients of the two factors of a gated MLP, `f(gate) up`.

    Raises:
        ValueError, TypeError: for other values.
    """

    norm: str | None = None
    softmax: str | float | None = None
    query: float | None = None
    key: float | None = None
    value: float | None = None
    activation: str | None = None
    gate: float | None = None
    up: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("norm", FROZEN), ("activation", SECANT), ("softmax", FROZEN)):
            said = getattr(self, name)
            if name == "softmax" and _is_number(said):
                if said > 0:
                    continue
                raise ValueError(f"rules: softmax must be a temperature above 0, got {said}")
            if said is not None and said not in (GRADIENT, allowed):
                more = ", or a temperature" if name == "softmax" else ""
                raise ValueError(
                    f"rules: {name} must be {GRADIENT!r} or {allowed!r}{more}, got {said!r}"
                )
        for name in FACTORS:
            said = getattr(self, name)
            if said is not None and not _is_number(said):
                raise ValueError(f"rules: {name} must be a finite number, got {said!r}")

    def said(self) -> dict[str, Any]:
        """What is not None."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    def with_(self, changes: Mapping[str, Any]) -> Rules:
        """These rules, but for what `changes` says (what is not None in it)."""
        unknown = changes.keys() - {field.name for field in fields(self)}
        if unknown:
            raise TypeError(f"rules: expected {[f.name for f in fields(self)]}, got {min(unknown)}")
        return replace(self, **{name: v for name, v in changes.items() if v is not None})


def _is_number(said: object) -> bool:
    number = isinstance(said, int | float) and not isinstance(said, bool)
    return number and math.isfinite(said)  # type: ignore[arg-type]


_HALVES: dict[str, Any] = {"query": 0.25, "key": 0.25, "value": 0.5, "gate": 0.5, "up": 0.5}
# name -> rules. Sources: GIM, Edin et al., arXiv 2505.17630; frozen scales and patterns, Ameisen et
# al., "Circuit Tracing" (transformer-circuits.pub, 2025); AttnLRP, Achtibat et al., arXiv
# 2402.05602; RelP, Jafari et al., arXiv 2508.21258, without its rule for attention, where it is
# worse than the gradient (Pearson with patching .962 against .979, GPT-2).
PRESETS = {
    "plain": Rules(GRADIENT, GRADIENT, 1.0, 1.0, 1.0, GRADIENT, 1.0, 1.0),
    "gim": Rules(norm=FROZEN, softmax=2.0, **_HALVES),
    "frozen": Rules(norm=FROZEN, softmax=FROZEN),
    "attnlrp": Rules(norm=FROZEN, activation=SECANT, **_HALVES),
    "relp": Rules(norm=FROZEN, activation=SECANT, gate=0.5, up=0.5),
}


def as_rules(preset: str | Rules | None, changes: Mapping[str, Any]) -> Rules:
    """A preset by name, or rules, with changes."""
    if preset is None:
        preset = Rules()
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"rules: preset must be one of {list(PRESETS)}, got {preset!r}")
        preset = PRESETS[preset]
    if not isinstance(preset, Rules):
        raise TypeError(
            f"rules: preset must be a name of {list(PRESETS)} or Rules, got {type(preset).__name__}"
        )
    return preset.with_(changes)
