# SPDX-License-Identifier: Apache-2.0
"""The activations of an MLP's neurons at every token: what its last product reads."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from mikernels.circuits.passes import run
from mikernels.circuits.prompts import Inputs, read_prompts
from mikernels.models.decoder import find_decoder
from mikernels.models.hooks import original
from mikernels.models.neurons import NeuronWatch
from mikernels.models.parts import Decoder, Tap

NAME = "neuron_activations"
FIX = "record them with a hook of your own"


def _place(decoder: Decoder, layer: int) -> Tap:
    """Where the neurons are seen, by a pass over one token."""
    device = next(decoder.model.parameters()).device
    with ExitStack() as stack:
        watch = NeuronWatch(decoder, [layer], stack)
        run(decoder, {"input_ids": torch.zeros(1, 1, dtype=torch.int64, device=device)})
    if (neurons := watch.found.get(layer)) is None:
        raise decoder.refusal(f"the MLP of block {layer} does not end in a product of one matrix")
    return neurons.tap


@torch.inference_mode(False)
@torch.no_grad()
def neuron_activations(
    model: torch.nn.Module,
    input_tokens: Inputs,
    layer: int,
    *,
    tokenizer: Any = None,
    batch_size: int = 16,
) -> torch.Tensor:
    """What the neurons of one layer's MLP are at every token, `[tokens, neurons]`.

    Args:
        model: a Hugging Face causal language model in eval mode, or a HookedTransformer, whose MLP
            is not made of experts.
        input_tokens, tokenizer: as for `gim_probe`; padding is left out.
        layer: the block's number. batch_size: prompts at a time.

    Raises:
        TypeError, ValueError: as `gim_probe`; for another layer, or an MLP of another form.

    Example:
        >>> text = "When Mary and John went to the store, John gave a drink to"
        >>> neurons = circuits.neuron_activations(model, text, 1, tokenizer=tokenizer)
        >>> neurons.shape
        torch.Size([14, 40])
    """
    decoder = find_decoder(original(model), NAME, FIX)
    decoder.check_eval()
    count = len(decoder.blocks)
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
        raise ValueError(f"{NAME}: layer must be in 0..{count - 1}, got {layer!r}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"{NAME}: batch_size must be at least 1, got {batch_size}")
    if decoder.blocks[layer].mlp is None:
        raise ValueError(f"{NAME}: layer must be one with an MLP, got {layer}")
    prompts = read_prompts(decoder, "input_tokens", input_tokens, tokenizer)
    tap = _place(decoder, layer)
    found: list[torch.Tensor] = []
    for begin in range(0, len(prompts.ids), batch_size):
        part = prompts.rows(slice(begin, begin + batch_size))
        seen: list[torch.Tensor] = []
        end = tap.hook(seen.append)
        try:
            run(decoder, part.given, last=True)
        finally:
            end()
        if len(seen) != 1 or seen[0].numel() % part.ids.numel():
            raise decoder.refusal(f"the MLP of block {layer} ran {len(seen)} times in a pass")
        rows = seen[0].reshape(part.ids.numel(), -1)
        found.append(rows[part.mask.reshape(-1).to(rows.device)])
    return torch.cat(found)
