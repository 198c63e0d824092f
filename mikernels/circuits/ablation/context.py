# SPDX-License-Identifier: Apache-2.0
"""`with ablate(model, names):`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mikernels.circuits.ablation.find import find_places
from mikernels.circuits.ablation.names import Names, Part, read_names, read_saes
from mikernels.circuits.ablation.place import Place
from mikernels.circuits.ablation.replacements import Values, make_values, read_reference
from mikernels.circuits.ablation.scope import Positions, Scope, read_positions, whole
from mikernels.circuits.prompts import Inputs
from mikernels.models.decoder import find_decoder
from mikernels.models.hooks import original
from mikernels.models.parts import Decoder
from mikernels.nn.sae import SAE

FIX = "replace its activations with hooks of your own"


@dataclass(frozen=True, eq=False)
class Ablation:
    """Components of a model and what stands for them; may be entered any number of times.

    Attributes:
        where: of messages: the public function. decoder: the model. parts: the components.
        places: where they are. values: what stands there. positions: at which.
    """

    where: str
    decoder: Decoder
    parts: tuple[Part, ...]
    places: tuple[Place, ...]
    values: Values
    positions: tuple[int, ...] | torch.Tensor | None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)

    def entered(
        self, which: torch.Tensor | None = None, rows: torch.Tensor | None = None
    ) -> AbstractContextManager[None]:
        """A `with` block in which they are replaced; see Scope."""
        return Scope(
            self.where, self.decoder, self.places, self.values, self.positions, which, rows
        ).entered()


def make_ablation(
    where: str,
    model: torch.nn.Module,
    names: Names,
    kind: str,
    reference: Inputs | None,
    counterfactual: Inputs | None,
    positions: Positions | None,
    per_position: bool,
    saes: Mapping[Any, SAE] | None,
    tokenizer: Any,
    seed: int,
) -> Ablation:
    """As `ablate` says, for the public function `where`."""
    decoder = find_decoder(original(model), where, FIX)
    decoder.check_eval()
    at = read_saes(where, decoder, saes)
    parts = read_names(where, decoder, names, at)
    columns = read_positions(where, positions)
    prompts = read_reference(
        where, decoder, kind, reference, counterfactual, per_position, tokenizer
    )
    with whole():
        places = find_places(where, decoder, parts, at)
        values = make_values(where, decoder, kind, places, prompts, per_position, seed)
    return Ablation(where, decoder, parts, tuple(places), values, columns)


@contextmanager
def ablate(
    model: torch.nn.Module,
    names: Names,
    kind: str = "mean",
    *,
    reference: Inputs | None = None,
    counterfactual: Inputs | None = None,
    positions: Positions | None = None,
    per_position: bool = False,
    saes: Mapping[Any, SAE] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> Iterator[tuple[str, ...]]:
    """Inside the `with` block the model runs with these components replaced.

    Whatever calls it there (forward, a loss, `generate` for zero and mean): with gradients, which
    flow through all that is not replaced, or without. The model is as before when the block ends,
    whatever ends it. Blocks may be nested: the outer's replacements come first. They are of their
    thread alone, and references are read in the model without any ablation. Any number of
    components costs one hook and one `where` for each tensor that they are in.

    Args:
        model: a Hugging Face decoder or a HookedTransformer, as for `gim_probe`, in eval mode.
        names: `L3.h7`, `L3.attn`, `L3.mlp`, `L3.mlp.n123` (a neuron), `L3.expert5`,
            `14.mlp_out.f123` (a feature of the SAE there), `input`; one or several, or patterns
            (`L3.*`). A head's z is replaced, before the projection, and what reads the sum (a norm,
            as in Gemma 2) reads the new one. Attention and MLP are what they add to the residual
            stream. Of an expert (of transformers 5) its term at every token is replaced, which is 0
            where the token is routed to others. Of features x + (new codes - codes) w_dec remains.
            Where a part and the whole are both named (`L3.h7`, `L3.attn`), the whole's replacement
            is what is read.
        kind: "zero", "mean" (of `reference`), "counterfactual" (the activation at the same token of
            `counterfactual`), "resample" (that of another prompt of `reference` of the same length,
            drawn by `seed`). With the last two the model must be called on exactly these prompts'
            shape, row by row, and cannot generate.
        reference, counterfactual: prompts: token ids `[B, P]`, what a tokeniser returned, texts.
        positions: columns (negative from the end) or bool `[B, P]` at which to replace; None: all.
        per_position: means for each position by itself, of reference prompts that are aligned.
        saes: site -> SAE of `mikernels.nn` for features, `{"14.mlp_out": sae}`.
        tokenizer: for texts.
        seed: of "resample".

    Yields:
        The names, patterns spelt out.

    Raises:
        TypeError, ValueError: before the model is called in the block: names that it has not, or
            twice; a kind without the prompts that it needs, or with others; a model that is not
            recognised, or in training mode. In a call: another shape than the kind needs.
        RuntimeError: a component that a call does not reach; a copy of the model in the block.

    Warns:
        RuntimeWarning: when the model did not run in the block.

    Example:
        >>> task = circuits.tasks.ioi(tokenizer, 4)
        >>> other = task.counterfactual_inputs
        >>> with circuits.ablate(model, ["L1.h2", "L2.mlp"], "mean", reference=other):
        ...     logits = model(**task.inputs).logits
        >>> found = circuits.find_circuit(model, task.inputs, other, task.target, level="node")
        >>> kept = found.select(5).names
        >>> rest = [name for name in found.graph.writers if name not in kept]
        >>> with circuits.ablate(model, rest, "counterfactual", counterfactual=other):
        ...     logits = model(**task.inputs).logits  # of the circuit alone
    """
    ablation = make_ablation(
        "ablate", model, names, kind, reference, counterfactual, positions, per_position, saes,
        tokenizer, seed,
    )  # fmt: skip
    with ablation.entered():
        yield ablation.names
