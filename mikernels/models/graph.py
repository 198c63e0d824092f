# SPDX-License-Identifier: Apache-2.0
"""The graph of a decoder: who writes into the residual stream, and who reads it afterwards.

| writer | reader |
|---|---|
| `input`: what the first block is given | |
| `L3.h7`: a head, `z W_O` without the bias | `L3.h7.q`: what its queries are made of |
| | `L3.h7.k`, `L3.h7.v`; of heads in groups `L3.kv1.k`, `L3.kv1.v`, once a group |
| `L3.mlp`: an MLP, or experts | `L3.mlp` |
| | `logits`: what the final norm reads |

An edge goes from a writer to a reader after it, so a reader's edges are those of the first
`prefix` writers: writers lie layer by layer. (Hanna et al., arXiv 2403.17806; there heads in groups
read alone, on copies of the keys and values.) A head's k and v are its group's, and its node is in
a circuit by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch


class Layer(NamedTuple):
    """Of one block.

    Attributes:
        heads: that write. groups: of them, which share keys and values.
        mlp: whether it has one. parallel: whether that reads the block's input, without the heads
            of its own block.
    """

    heads: int
    groups: int
    mlp: bool = True
    parallel: bool = False

    @property
    def writers(self) -> int:
        return self.heads + self.mlp

    @property
    def readers(self) -> int:
        return self.heads + 2 * self.groups + self.mlp


@dataclass(frozen=True)
class Graph:
    """Writers and readers by number, in the order of the model. Equal for equal models.

    Attributes:
        model: the class, for messages. d: width of the residual stream. layers: its blocks.
    """

    model: str
    d: int
    layers: tuple[Layer, ...]

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """W names."""
        found = ["input"]
        for i, layer in enumerate(self.layers):
            found += [f"L{i}.h{h}" for h in range(layer.heads)]
            found += [f"L{i}.mlp"] * layer.mlp
        return tuple(found)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """R names."""
        found = []
        for i, layer in enumerate(self.layers):
            shared = "kv" if layer.groups < layer.heads else "h"
            found += [f"L{i}.h{h}.q" for h in range(layer.heads)]
            found += [f"L{i}.{shared}{g}.{part}" for part in "kv" for g in range(layer.groups)]
            found += [f"L{i}.mlp"] * layer.mlp
        return (*found, "logits")

    def first_writer(self, layer: int) -> int:
        """The number of a block's first head; of one past the last block, all writers."""
        return 1 + sum(one.writers for one in self.layers[:layer])

    def first_reader(self, layer: int) -> int:
        return sum(one.readers for one in self.layers[:layer])

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """Of each reader how many writers come before it."""
        found = []
        for i, layer in enumerate(self.layers):
            before = self.first_writer(i)
            attention = layer.readers - layer.mlp
            found += [before] * attention
            found += [before + (0 if layer.parallel else layer.heads)] * layer.mlp
        return (*found, len(self.writers))

    @cached_property
    def feeds(self) -> tuple[tuple[int, ...], ...]:
        """Of each reader the writers that are made of it: a group's k is that of all its heads."""
        found: list[tuple[int, ...]] = []
        for i, layer in enumerate(self.layers):
            first, each = self.first_writer(i), layer.heads // layer.groups
            found += [(first + h,) for h in range(layer.heads)]
            for _ in "kv":
                found += [tuple(range(first + g * each, first + (g + 1) * each))
                          for g in range(layer.groups)]  # fmt: skip
            found += [(first + layer.heads,)] * layer.mlp
        return (*found, ())

    @cached_property
    def n_edges(self) -> int:
        return sum(self.prefix)

    def allowed(self) -> torch.Tensor:
        """`[W, R]` bool: the edges."""
        return torch.arange(len(self.writers))[:, None] < torch.tensor(self.prefix)

    def __str__(self) -> str:
        heads = sorted({layer.heads for layer in self.layers})
        shape = f"{len(self.layers)} layers of {'/'.join(map(str, heads))} heads"
        return f"{self.model} ({shape}, d {self.d}; {self.n_edges} edges)"
