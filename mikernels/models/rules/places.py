# SPDX-License-Identifier: Apache-2.0
"""Where in a model backward rules act: found by structure, checked by arithmetic when they run."""

from __future__ import annotations

import torch

from mikernels.models.decoder import Decoder, find_decoder
from mikernels.models.hooks import check_fires
from mikernels.models.rules.attention import AttentionPlace
from mikernels.models.rules.mlp import (
    ACTIVATIONS,
    FUSED,
    GATES,
    ActivationPlace,
    ExpertsPlace,
    GatePlace,
    child,
)
from mikernels.models.rules.norms import NormPlace, is_norm
from mikernels.models.rules.scope import Place

FIX = "leave the rules out, and use the gradients of the model as it is"


def _gated(module: torch.nn.Module, name: str, layer: int) -> Place | None:
    """The place of gate and up in an MLP or in experts, None where there is none."""
    f = child(module, ACTIVATIONS)
    if f is None:
        return None
    if isinstance(getattr(module, FUSED[0], None), torch.Tensor):
        return ExpertsPlace(module, name, layer, f)
    for *sides, down in (*GATES, FUSED):
        found = [module._modules.get(part) for part in (*sides, down)]
        if None not in found:
            *gates, reader = (part for part in found if part is not None)
            return GatePlace(module, name, layer, (f, tuple(gates), reader))
    return None


def find_places(model: torch.nn.Module, attention: str | None) -> list[Place]:
    """Norms (of blocks, of q and k, the final one), attention, activations and gated products.

    Raises:
        TypeError, ValueError: for a model that is not recognised.
    """
    decoder: Decoder = find_decoder(model, "rules", FIX)
    found: list[Place] = []
    names = {module: name for name, module in model.named_modules()}
    for block in decoder.blocks:
        layer = block.index
        found.append(AttentionPlace(block.attention, names[block.attention], layer, attention))
        for module in block.module.modules():
            if is_norm(module):
                found.append(NormPlace(module, names[module], layer))
            if (gate := _gated(module, names[module], layer)) is not None:
                found.append(gate)
            f = child(module, ACTIVATIONS)
            if f is not None:
                found.append(ActivationPlace(f, names[f], layer))
    if decoder.final_norm is not None:
        found.append(NormPlace(decoder.final_norm, names[decoder.final_norm], None))
    check_fires("rules", model, [place.key for place in found])
    # a module in two places of the tree is one
    return list({(type(place), place.key): place for place in found}.values())
