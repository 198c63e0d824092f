# SPDX-License-Identifier: Apache-2.0
"""How options are written and read, in every command."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import torch

ACTIVATIONS, OUTPUT = "Activations", "Output"
SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9}


def option(help_text: str, panel: str, *names: str, **more):
    return typer.Option(*names, help=help_text, rich_help_panel=panel, **more)


def count(text: str | int) -> int:
    """A whole number, or one with a suffix: 500k, 10M, 1.5B."""
    digits, unit = str(text).strip().replace(",", "").replace("_", ""), 1
    if digits[-1:].lower() in SUFFIXES:
        digits, unit = digits[:-1], SUFFIXES[digits[-1].lower()]
    try:
        number = float(digits) * unit
    except ValueError as error:
        raise typer.BadParameter(f"expected a number such as 500k or 10M, got {text!r}") from error
    if not number >= 1 or number % 1:
        raise typer.BadParameter(f"expected a whole number of at least 1, got {text!r}")
    return int(number)


def count_or_zero(text: str | int) -> int:
    """The same, or 0."""
    return 0 if str(text).strip() == "0" else count(text)


def device_of(where: str, name: str | None) -> torch.device:
    """The device of `--device`; None is a GPU where there is one."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{where}: --device must be cpu, cuda or cuda:N, got {name!r}") from error
    seen = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= seen:
        raise ValueError(
            f"{where}: --device must be one that torch sees, got {name} of {seen} CUDA devices "
            f"(torch {torch.__version__}); use --device cpu, or install a torch with CUDA"
        )
    return device
