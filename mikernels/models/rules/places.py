# SPDX-License-Identifier: Apache-2.0
"""Where in a model backward rules act: found by structure, checked by arithmetic when they run."""

from __future__ import annotations

import torch

from mikernels.models.hooks import check_fires
from mikernels.models.lens import Lens
from mikernels.models.parts import Decoder, is_hook_point
from mikernels.models.rules import lens
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
from mikernels.models.rules.norms import NormPlace, may_be_norm
from mikernels.models.rules.scope import Place


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


def find_places(decoder: Decoder, attention: str | None) -> list[Place]:
    """Norms (of blocks, of q and k, the final one), attention, activations and gated products."""
    model = decoder.model
    found: list[Place]
    if isinstance(decoder, Lens):
        found = lens.places(model, decoder.blocks)
    else:
        found = _hugging_face(decoder, attention)
    check_fires("rules", model, [place.key for place in found])
    # a module in two places of the tree is one
    return list({(type(place), place.key): place for place in found}.values())


def _hugging_face(decoder: Decoder, attention: str | None) -> list[Place]:
    if any(is_hook_point(module) for module in decoder.model.modules()):
        raise decoder.refusal(
            "it is inside of a TransformerBridge, whose parts compute attention, norms and gates "
            "in their own way",
            "make it with transformers alone, or ",
        )
    found: list[Place] = []
    names = {module: name for name, module in decoder.model.named_modules()}
    for block in decoder.blocks:
        layer = block.index
        found.append(AttentionPlace(block.attention, names[block.attention], layer, attention))
        for module in block.module.modules():
            if may_be_norm(module):
                found.append(NormPlace(module, names[module], layer))
            if (gate := _gated(module, names[module], layer)) is not None:
                found.append(gate)
            f = child(module, ACTIVATIONS)
            if f is not None:
                found.append(ActivationPlace(f, names[f], layer))
    if decoder.final_norm is not None:
        found.append(NormPlace(decoder.final_norm, names[decoder.final_norm], None))
    return found
