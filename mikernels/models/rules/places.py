# SPDX-License-Identifier: Apache-2.0
"""Where in a model backward rules act: found by structure, checked by arithmetic when they run."""

from __future__ import annotations

import torch

from mikernels.models.hooks import check_fires
from mikernels.models.lens import Lens
from mikernels.models.parts import Decoder, is_hook_point
from mikernels.models.rules import lens
from mikernels.models.rules.attention import AttentionPlace, attends
from mikernels.models.rules.mlp import (
    ACTIVATIONS,
    FUSED,
    GATES,
    ActivationPlace,
    ExpertsPlace,
    GatePlace,
    UnknownPlace,
    child,
    looks_gated,
)
from mikernels.models.rules.norms import NormPlace, may_be_norm
from mikernels.models.rules.scope import Place


def _gated(module: torch.nn.Module, name: str, layer: int) -> Place | None:
    """The place of gate and up in an MLP or in experts, None where there is none."""
    unknown = UnknownPlace(module, name, layer, "activation")
    f = child(module, ACTIVATIONS)
    if isinstance(getattr(module, FUSED[0], None), torch.Tensor):
        return ExpertsPlace(module, name, layer, f) if f is not None else unknown
    for *sides, down in (*GATES, FUSED):
        found = [module._modules.get(part) for part in (*sides, down)]
        if None not in found:
            *gates, reader = (part for part in found if part is not None)
            return GatePlace(module, name, layer, (f, tuple(gates), reader)) if f else unknown
    return UnknownPlace(module, name, layer) if f is not None and looks_gated(module) else None


def find_places(decoder: Decoder, attention: str | None) -> list[Place]:
    """Norms (of blocks, of q and k, beside the blocks), attention, activations and gated products;
    a module that blocks share once for each of them."""
    model = decoder.model
    found: list[Place]
    if isinstance(decoder, Lens):
        found = lens.places(model, decoder.blocks)
    else:
        found = _hugging_face(decoder, attention)
    check_fires("rules", model, [place.key for place in found])
    return found


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
        within = {child(module, ACTIVATIONS): module for module in block.module.modules()}
        activations = {f: module for f, module in within.items() if f is not None}
        found += [ActivationPlace(f, names[f], layer, at) for f, at in activations.items()]
        for module in block.module.modules():
            # an activation may have parameters too
            if may_be_norm(module) and module not in activations:
                found.append(NormPlace(module, names[module], layer))
            if module is block.attention or attends(module):
                found.append(AttentionPlace(module, names[module], layer, attention))
            if (gate := _gated(module, names[module], layer)) is not None:
                found.append(gate)
    # the final norm, and what norms embeddings; however they are wrapped
    beside = {m: None for part in decoder.beside for m in part.modules() if may_be_norm(m)}
    found += [NormPlace(module, names[module], None) for module in beside]
    return found
