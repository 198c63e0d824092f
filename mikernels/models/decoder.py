# SPDX-License-Identifier: Apache-2.0
"""Where the blocks of a decoder are."""

from __future__ import annotations

import torch


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder blocks: the outermost ModuleList of `config.num_hidden_layers` modules.

    Raises:
        ValueError: when the model has no such list.
    """
    expected = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    for candidate in lists:
        if expected is not None and len(candidate) == expected:
            return candidate
    raise ValueError(
        f"ModelSource: model must be a Hugging Face decoder with a ModuleList of "
        f"{expected} layers (config.num_hidden_layers), got {type(model).__name__} with lists of "
        f"{[len(m) for m in lists]}; pass the module's name as layer"
    )
