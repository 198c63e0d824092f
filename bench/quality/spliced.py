# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of SmolLM2-135M with a layer's output replaced by an SAE's reconstruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mikernels.activations import ModelSource
from mikernels.demo.data import CONTEXT, python_documentation, smollm2_folder
from mikernels.models.decoder import decoder_layers
from mikernels.models.hooks import returned
from mikernels.models.load import load_model

WINDOWS = 6


class Spliced:
    """The model over some windows of the text that `smollm2_shards` read.

    Args:
        layer, tokens: as given there. numbers: of the windows that may be used, ascending; the
            first `WINDOWS` full ones are.
        mean: `[d]`, what stands for the layer's output at worst.
    """

    def __init__(self, layer: int, tokens: int, numbers: torch.Tensor, mean: torch.Tensor):
        self.model, tokenizer = load_model(smollm2_folder())
        source = ModelSource(
            self.model,
            tokenizer,
            layer,
            python_documentation(0),
            context=CONTEXT,
            max_tokens=tokens,
        )
        wanted = set(numbers.tolist())
        chosen = [
            window
            for number, window in enumerate(source.token_windows())
            if number in wanted and len(window) == CONTEXT
        ]
        self.tokens = torch.stack(chosen[:WINDOWS])
        self.windows = len(self.tokens)
        # SmolLM2's head is its embedding
        self.head = self.model.get_input_embeddings().weight
        self.block = decoder_layers(self.model, "bench quality", "")[layer]
        self.clean = self.cross_entropy(None)
        self.ablated = self.cross_entropy(lambda x: mean.expand_as(x))

    def recovered(self, reconstruct: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """`(ablated - spliced) / (ablated - clean)`: 1 is the model as it is, 0 the mean alone."""
        now = self.cross_entropy(reconstruct)
        return (self.ablated - now) / (self.ablated - self.clean)

    @torch.no_grad()
    def cross_entropy(self, replace: Callable[[torch.Tensor], torch.Tensor] | None) -> float:
        """Mean over next tokens; `replace` maps `[n, d]` to `[n, d]`.

        A window's first position stays: its norm is some hundred times the others' whatever it
        holds, and no SAE here was trained on it.
        """

        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
            x = returned(output).clone()
            rows = x[:, 1:].reshape(-1, x.shape[-1])
            assert replace is not None
            x[:, 1:] = replace(rows).view_as(x[:, 1:])
            return (x, *output[1:]) if isinstance(output, tuple) else x

        handle = None if replace is None else self.block.register_forward_hook(hook)
        try:
            total = 0.0
            for window in self.tokens:
                found = self.model(input_ids=window[None], use_cache=False).last_hidden_state[0]
                logits = found[:-1] @ self.head.T
                total += float(torch.nn.functional.cross_entropy(logits, window[1:]))
        finally:
            if handle is not None:
                handle.remove()
        return total / self.windows
