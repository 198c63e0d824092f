# SPDX-License-Identifier: Apache-2.0
"""What a language model is made of: blocks, attention and its heads, MLPs, norms, both embeddings.

Models are recognised by structure, kind by kind (`hugging_face`, `lens`); what that suggests is
checked by arithmetic where it is used (`mikernels.models.watch`).
"""

from __future__ import annotations

import torch

from mikernels.models import hugging_face, lens
from mikernels.models.parts import Decoder, refusal


def decoder_layers(model: torch.nn.Module, where: str, fix: str) -> torch.nn.ModuleList:
    """The blocks of a Hugging Face decoder.

    Args:
        model: any.
        where, fix: of the message: the public function that asks, and what its users may do.

    Raises:
        ValueError: when the model has no such list.
    """
    if (layers := hugging_face.layers_of(model)) is not None:
        return layers
    raise ValueError(
        f"{where}: model must be a Hugging Face decoder with a ModuleList of "
        f"{hugging_face.n_layers(model)} layers (config.num_hidden_layers), got "
        f"{type(model).__name__} with lists of "
        f"{[len(found) for found in hugging_face.lists_in(model)]}; {fix}"
    )


def find_layer(model: torch.nn.Module, layer: int | str, where: str) -> torch.nn.Module:
    """A decoder block by its number, or any submodule by its name.

    Raises:
        ValueError, IndexError, AttributeError: a model without decoder layers, or without this one.
    """
    if isinstance(layer, str):
        return model.get_submodule(layer)
    layers = decoder_layers(model, where, "pass the module's name as layer")
    if not 0 <= layer < len(layers):
        raise IndexError(
            f"{where}: layer must be in 0..{len(layers) - 1} "
            f"({len(layers)} decoder layers), got {layer}"
        )
    return layers[layer]


def find_decoder(model: torch.nn.Module, where: str, fix: str) -> Decoder:
    """Recognise a model by its structure; nothing is run.

    Args:
        model: a Hugging Face decoder: Llama, Qwen, Gemma, Phi-3, Mixtral, GPT-2, GPT-NeoX, OPT,
            ...; or a HookedTransformer.
        where, fix: of the messages: the public function that asks, and what its users may do.

    Raises:
        TypeError, ValueError: for another model, with what is missing; blocks that share modules,
            or lie in a scripted module, which hooks do not see.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    if (inner := lens.bridged(model)) is not None:
        reason = f"it runs a {type(inner).__name__}"
        raise refusal(model, where, reason, "give its original_model")
    return (lens if lens.is_lens(model) else hugging_face).find(model, where, fix)
