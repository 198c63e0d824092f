# SPDX-License-Identifier: Apache-2.0
"""The settings that every variant of SAE has."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from mikernels.nn import losses
from mikernels.nn.auxk import FORMS, AuxKForm


@dataclass(frozen=True)
class SAEConfig:
    """Settings that all variants have, JSON-able; see SAE. k_aux None is max(1, d // 2)."""

    d: int
    n_features: int
    k_aux: int | None = None
    aux_coefficient: float = 1 / 32
    dead_after: int | None = None
    loss: str = "mse"
    normalize_decoder: bool = True
    aux_form: str = "mikernels"

    def __post_init__(self) -> None:
        if self.k_aux is None and isinstance(self.d, int):
            object.__setattr__(self, "k_aux", max(1, self.d // 2))
        for name in ("d", "n_features", "k_aux", "dead_after"):
            value = getattr(self, name)
            if name == "dead_after" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{self.owner}: {name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{self.owner}: {name} must be at least 1, got {value}")
        if not (math.isfinite(self.aux_coefficient) and self.aux_coefficient >= 0):
            raise ValueError(
                f"{self.owner}: aux_coefficient must be finite and at least 0, got "
                f"{self.aux_coefficient}; 0 turns AuxK off"
            )
        if self.aux_form not in FORMS:
            raise ValueError(
                f"{self.owner}: aux_form must be one of {list(FORMS)}, got {self.aux_form!r}"
            )
        if self.loss not in losses.LOSSES:
            raise ValueError(
                f"{self.owner}: loss must be one of {list(losses.LOSSES)}, got {self.loss!r}"
            )

    @property
    def auxk(self) -> AuxKForm:
        """The form of the auxiliary loss."""
        return FORMS[self.aux_form]

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed."""
        return self.d

    @classmethod
    def title(cls) -> str:
        """The module's name, for messages."""
        return cls.__name__.replace("Config", "SAE")

    @property
    def owner(self) -> str:
        return self.title()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def split_settings(
    form: type[SAEConfig], settings: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords of a variant's constructor: those of its configuration, and those of SAE's.

    Raises:
        TypeError: for a keyword that neither has.
    """
    names = {f.name for f in fields(form)}
    config = {name: value for name, value in settings.items() if name in names}
    more = {name: value for name, value in settings.items() if name not in names}
    if unknown := sorted(more.keys() - {"dtype", "generator", "encoder_scale"}):
        raise TypeError(
            f"{form.title()}: settings must be among {sorted(names)}, "
            f"dtype, generator and encoder_scale, got {unknown}"
        )
    return config, more


def check_number(
    owner: str,
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> None:
    """A setting is a finite number within bounds, or a TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    inside = math.isfinite(value) and (least is None or value >= least)
    inside = inside and (above is None or value > above) and (most is None or value <= most)
    if not inside:
        bounds = [f"at least {least}" if least is not None else f"above {above}"]
        bounds += [] if most is None else [f"at most {most}"]
        raise ValueError(f"{owner}: {name} must be {', '.join(bounds)}, got {value}")
