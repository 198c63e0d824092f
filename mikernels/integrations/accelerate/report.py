# SPDX-License-Identifier: Apache-2.0
"""What `accelerate` gives back: what it replaced, what it computed, and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mikernels.integrations.handle import Handle
from mikernels.integrations.lazy import Lazy, Ledger
from mikernels.integrations.lazy.codes import Codes
from mikernels.integrations.lazy.product import Product
from mikernels.integrations.lazy.tensor import Unknown
from mikernels.values.codes import SparseCodes

if TYPE_CHECKING:
    from mikernels.integrations.accelerate.plan import Plan


def _codes_of(found: Lazy) -> SparseCodes | None:
    """What a tensor is left as, where that is codes."""
    node = found._node if found._current() else None
    if isinstance(node, Product) and node.relu:
        try:
            node = node.positive()
        except Unknown:
            # too many are active
            return None
    if not isinstance(node, Codes):
        return None
    codes = node.codes
    if node.row_offsets is not None:
        return codes
    shape = (*node.leading, node.values.shape[-1])
    return SparseCodes._trusted(codes.values.reshape(shape), codes.indices.reshape(shape), node.f)


class Report(Handle, Ledger):
    """What was replaced in a library's object, until `restore()` or the end of a `with` block.

    Attributes:
        library: its name and version.
        replaced: how many attributes of objects.
        methods: "TopKTrainingSAE.encode", ...: what runs with products left.
        kept: what was not replaced -> why.
        calls: products with the encoder that were left.
        dense: name of an operation -> how often it was given the dense tokens x features tensor:
            hooks, metrics, code of the user's own, and what finds too many features active. Empty
            while nobody looks and `crowded` is 0.
        crowded: how often so many features were active that the dense tensor was made because it is
            smaller than codes.
    """

    def __init__(self, library: str):
        Handle.__init__(self, "accelerate")
        Ledger.__init__(self, "accelerate")
        self.library = library
        self.methods: list[str] = []
        self.kept: dict[str, str] = {}
        self.plan: Plan | None = None

    def restore(self) -> None:
        """Put back what was there; the same as `remove()`."""
        self.remove()

    def codes(self, x: torch.Tensor) -> SparseCodes:
        """The codes of activations x `[..., d]` by the accelerated SAE's `encode`.

        `SparseCodes` with the values and features of the dense tensor that `encode` stands for;
        ragged (of all tokens in one row of slots) where tokens have different numbers of them.

        Raises:
            RuntimeError: after `restore()`.
            ValueError: for a trainer or runner of several SAEs; ask the SAE's own report.
        """
        if self.plan is None:
            raise RuntimeError("accelerate: codes need an accelerated object, got a restored one")
        if len(self.plan.autoencoders) != 1:
            raise ValueError(
                f"accelerate: codes need one SAE, got {len(self.plan.autoencoders)}; accelerate "
                f"each of them by itself"
            )
        owner: Any = self.plan.autoencoders[0]
        found: Any = owner.encode(x)
        if isinstance(found, tuple):
            if len(found) == 3:
                # sparsify's: activations, indices, pre-activations
                values, indices = found[:2]
                return SparseCodes(values, indices, found[2].shape[-1])
            found = found[0]
        if isinstance(found, Lazy):
            codes = _codes_of(found)
            if codes is not None:
                return codes
            found = found._look("codes")
        # SAELens' TopK may be set to make torch's own sparse tensors
        return SparseCodes.from_dense(found.to_dense())

    def __str__(self) -> str:
        lines = [f"{self.library}: {', '.join(self.methods) or 'nothing'} accelerated"]
        lines += [f"  kept {what}: {why}" for what, why in self.kept.items()]
        lines.append(f"  {self.calls} products with the encoder left")
        lines += [f"  dense for {what}: {times} times" for what, times in self.dense.items()]
        if self.crowded:
            lines.append(f"  dense since too many features were active: {self.crowded} times")
        return "\n".join(lines)
