# SPDX-License-Identifier: Apache-2.0
"""The neurons of MLPs: what the last product of each reads, found by what it returns.

A neuron is a number that this product reads, `f(gate(x)) up(x)` or `f(fc1(x))`. Which of an MLP's
layers that is, no name tells: it is the one with `x W + b`, of what it read, equal to what the MLP
returned, within rounding. So an MLP that does more to it (experts and what is beside them) has
none.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.models.claims import product_limit
from mikernels.models.hooks import returned
from mikernels.models.parts import Block, Decoder, Product, Tap


class Neurons(NamedTuple):
    """Of one MLP: where they are seen, `[..., n]`, and their number."""

    tap: Tap
    n: int


class NeuronWatch:
    """Finds the neurons of some blocks in one forward pass.

    Args:
        decoder: of find_decoder.
        layers: the blocks, each with an MLP.
        stack: removes the hooks.

    Attributes:
        found: of each block that ran; None for one without neurons.
    """

    def __init__(self, decoder: Decoder, layers: Iterable[int], stack: ExitStack):
        self.found: dict[int, Neurons | None] = {}
        for layer in layers:
            self._hook(decoder, decoder.blocks[layer], stack)

    def _hook(self, decoder: Decoder, block: Block, stack: ExitStack) -> None:
        products = decoder.last_products(block)
        read: dict[int, torch.Tensor] = {}

        def keep(number: int, x: Any) -> None:
            read[number] = x.detach()

        def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
            made = returned(output).detach()
            found = [products[i].tap for i in read if _returns(products[i], read[i], made)]
            sizes = {tap: len(p.weight) for p in products for tap in [p.tap]}
            # of several the last that ran
            self.found[block.index] = Neurons(found[-1], sizes[found[-1]]) if found else None

        for number, product in enumerate(products):
            stack.callback(product.tap.hook(partial(keep, number)))
        assert block.mlp is not None
        stack.callback(block.mlp.register_forward_hook(leave).remove)


def _returns(product: Product, x: torch.Tensor, made: torch.Tensor) -> bool:
    _, w, bias = product
    if x.shape[-1] != len(w) or made.shape[-1] != w.shape[1] or x.numel() // len(w) != (
        made.numel() // w.shape[1]
    ):  # fmt: skip
        return False
    x, made = x.reshape(-1, len(w)).to(w.device), made.reshape(-1, w.shape[1]).to(w.device)
    acc = accumulate_dtype(w.dtype)
    expected = x.to(acc) @ w.to(acc)
    expected = expected if bias is None else expected + bias.detach()
    return bool(((made - expected).abs() <= product_limit(x, w, bias, made)).all())
