# SPDX-License-Identifier: Apache-2.0
"""A model run on a circuit: all that is not in it is cut, so that other activations take its place.

Of edges, every reader r (q, k and v of each head by itself) is given

    x_r = x~_r + sum over kept edges (u, r) of (a_u - a~_u)

with a_u what writer u writes in this run, and x~ the stream without any kept edge
(`mikernels.circuits.baseline`). Of nodes, one that is not kept writes a~ (a head: has the z of a~).
Nodes on no path of kept edges from the input to the logits are cut first: they do not differ from
a~ but for what a mean or 0 makes of their own input. (Hanna et al., arXiv 2403.17806; there the
norm of a sum of heads is taken anew for each reader, here a head writes with the scale of the run.)

With all edges kept a reader must be given the stream itself, and with no node kept the last norm
that of x~: that is checked on a prompt of every call, number by number
(`mikernels.circuits.interventions`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from mikernels.circuits import baseline
from mikernels.circuits.baseline import Baseline, Writes, head_weights
from mikernels.circuits.interventions import Edges, Nodes
from mikernels.circuits.passes import run
from mikernels.circuits.prompts import Inputs, Prompts, check_aligned, read_prompts
from mikernels.circuits.selection import on_paths
from mikernels.circuits.targets import Behavior, Target, last_logits, read_target, vocabulary
from mikernels.models.claims import Claims
from mikernels.models.decoder import find_decoder
from mikernels.models.graph import Graph
from mikernels.models.hooks import check_one_dtype, original
from mikernels.models.readers import wire

FIX = "run its circuits with hooks of your own"
# of what the rows of a forward pass keep: the writers' differences, a layer's inputs, the logits
MEMORY = 512 << 20


def pruned(graph: Graph, mask: torch.Tensor) -> torch.Tensor:
    """Of `[W, R]` bool the edges on paths from the input to the logits; of `[W]` the nodes on paths
    through such nodes."""
    edges = mask & graph.allowed() if mask.dim() == 2 else mask[:, None] & graph.allowed()
    kept = on_paths(graph, edges)
    return kept if mask.dim() == 2 else kept.any(1)


@dataclass(frozen=True, eq=False)
class Measured:
    """A behaviour's number for each of B prompts.

    Attributes:
        clean, empty: `[B]` of the whole model, and of that with everything cut.
        values: `[n, B]` of n circuits.
    """

    clean: torch.Tensor
    empty: torch.Tensor
    values: torch.Tensor


def _stacked(prompts: Prompts, times: int) -> dict[str, Any]:
    """The keywords of the model for the same prompts several times."""
    b = len(prompts.ids)
    return {
        name: x.repeat(times, *[1] * (x.dim() - 1)) if isinstance(x, torch.Tensor) and len(x) == b
        else x
        for name, x in prompts.given.items()
    }  # fmt: skip


class Patcher:
    """Runs a model on circuits of it, for the prompts and the behaviour of one call.

    Args:
        where: of messages: the public function.
        model: a Hugging Face decoder or a HookedTransformer, in eval mode.
        clean, corrupted, metric, tokenizer: as for `faithfulness_curve`.
        level: "edge" or "node": what the masks are of.
        ablation: one of ABLATIONS. batch: rows (prompts times circuits) of a forward pass; None: as
            many as keep its buffers below MEMORY, at least one.

    Attributes:
        graph: of the model. label: of the behaviour's number.
    """

    def __init__(
        self,
        where: str,
        model: torch.nn.Module,
        clean: Inputs,
        corrupted: Inputs | None,
        metric: Target | None,
        level: str,
        *,
        tokenizer: Any = None,
        ablation: str = "counterfactual",
        batch: int | None = None,
    ):
        model = original(model)
        decoder = find_decoder(model, where, FIX)
        decoder.check_eval()
        check_one_dtype(where, model)
        if ablation not in baseline.ABLATIONS:
            raise ValueError(
                f"{where}: ablation must be one of {', '.join(baseline.ABLATIONS)}, got "
                f"{ablation!r}"
            )
        if batch is not None and (not isinstance(batch, int) or batch < 1):
            raise ValueError(f"{where}: batch must be at least 1, or None, got {batch!r}")
        self._where, self._level, self._ablation = where, level, ablation
        self._clean = read_prompts(decoder, "clean", clean, tokenizer)
        self._other = self._reference(decoder, corrupted, tokenizer)
        b = len(self._clean.ids)
        self._behavior = read_target(where, metric, b, vocabulary(decoder), tokenizer)
        self.label = self._behavior.label
        self._wiring = wire(decoder)
        self.graph = self._wiring.graph
        self._heads = head_weights(self._wiring)
        self._size = self._batch(batch)
        self._parts = [slice(i, i + self._size) for i in range(0, b, self._size)]
        self._ends: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._targets: dict[int, Behavior] = {}
        self._base: Baseline | None = None
        self._checked = False

    def _reference(self, decoder: Any, corrupted: Inputs | None, tokenizer: Any) -> Prompts | None:
        where, ablation = self._where, self._ablation
        if ablation == "zero":
            return None
        if corrupted is None:
            raise ValueError(
                f"{where}: corrupted must be prompts for ablation {ablation!r}, got None; give "
                f"some, or ablation='zero'"
            )
        other = read_prompts(decoder, "corrupted", corrupted, tokenizer)
        if ablation == "counterfactual":
            check_aligned(where, self._clean, other, "clean", "corrupted")
        elif ablation == "mean-positional":
            widths = {len(row) for row in (self._clean.ids, other.ids) for row in row}
            padded = not (self._clean.mask.all() and other.mask.all())
            if padded or len(widths) > 1:
                raise ValueError(
                    f"{where}: clean and corrupted must be of as many tokens each for ablation "
                    f"'mean-positional', got {'padding' if padded else sorted(widths)}; "
                    f"ablation='mean' takes any"
                )
        return other

    def _batch(self, batch: int | None) -> int:
        """Prompts at a time; `self._stack`: circuits at a time."""
        (b, positions), graph = self._clean.ids.shape, self.graph
        if batch is None:
            # the writers; of the baseline two streams, the MLP's output, z, q, k and v of each
            # block; q, k and v of one
            numbers = graph.d * (len(graph.writers) + 7 * len(graph.layers) + 3)
            if not self._behavior.only_last(self._clean.kept):
                numbers += vocabulary(self._wiring.decoder) or 0
            size = self._wiring.w_o[0].element_size()
            batch = max(1, MEMORY // (numbers * size * positions))
        if self._behavior.function is not None:
            # it may compare prompts
            self._stack = max(1, batch // b)
            return b
        # as many in each
        parts = math.ceil(b / batch)
        self._stack = max(1, batch * parts // b)
        return math.ceil(b / parts)

    # what watches a model needs tensors that count their versions
    @torch.inference_mode(False)
    @torch.no_grad()
    def measure(self, masks: Sequence[torch.Tensor]) -> Measured:
        """The number of each prompt under each mask, bool `[W, R]` or `[W]`, of what is kept.

        Raises:
            ValueError: a number that is the same whether all is kept or nothing; a model whose
                arithmetic is another.
        """
        kept = [pruned(self.graph, mask.cpu()) for mask in masks]
        whole = self.graph.allowed() if self._level == "edge" else torch.tensor(True)
        # equal ones once, of like size side by side
        runs = {
            mask.numpy().tobytes(): mask
            for mask in kept
            if mask.any() and not (mask == whole).all()
        }
        order = sorted(runs, key=lambda key: int(runs[key].sum()))
        cleans, empties, found = [], [], []
        for number, part in enumerate(self._parts):
            prompts = self._clean.rows(part)
            base = self._baseline(number, prompts)
            clean, empty = self._ends[number]
            cleans.append(clean)
            empties.append(empty)
            if number == len(self._parts) - 1:
                self._check_effect(torch.cat(cleans), torch.cat(empties))
            if not self._checked:
                self._check(prompts, base)
            done: dict[bytes, torch.Tensor] = {}
            for i in range(0, len(order), self._stack):
                some = order[i : i + self._stack]
                values = self._run(number, prompts, base, torch.stack([runs[k] for k in some]))
                done |= dict(zip(some, values, strict=True))
            rows = []
            for mask in kept:
                end = clean if mask.any() else empty
                rows.append(done.get(mask.numpy().tobytes(), end))
            found.append(torch.stack(rows) if rows else clean.new_zeros(0, len(clean)))
        return Measured(torch.cat(cleans), torch.cat(empties), torch.cat(found, 1))

    def _check_effect(self, clean: torch.Tensor, empty: torch.Tensor) -> None:
        if clean.mean() == empty.mean():
            raise ValueError(
                f"{self._where}: metric must be another number when everything is cut, got "
                f"{self.label} = {clean.mean():.6g} in both; there is nothing to explain: take "
                f"another metric or other prompts"
            )

    def _baseline(self, number: int, prompts: Prompts) -> Baseline:
        """Of one batch; the numbers of both its ends are then in `_ends`."""
        if self._ablation == "counterfactual":
            return self._counterfactual(number, prompts)
        if self._base is None:
            self._base = baseline.cut(self._wiring, self._level, self._writes())
        if number not in self._ends:
            clean = self._clean_values(number, prompts)
            none = torch.zeros(1, *self._shape(), dtype=torch.bool)
            self._ends[number] = clean, self._run(number, prompts, self._base, none)[0]
        return self._base

    def _counterfactual(self, number: int, prompts: Prompts) -> Baseline:
        # of several batches it is run again: all of them may be large
        if self._base is not None and len(self._parts) == 1:
            return self._base
        assert self._other is not None
        clean = None if number in self._ends else self._clean_values(number, prompts)
        other, behavior = self._other.rows(self._parts[number]), self._targets[number]
        last = behavior.only_last(other.kept)
        logits, self._base = baseline.recorded(self._wiring, self._level, other, last)
        if clean is not None:
            empty = behavior(logits, None if last else other.kept).double().cpu()
            self._ends[number] = clean, empty
        return self._base

    def _writes(self) -> Writes:
        if self._ablation == "zero":
            return baseline.zero(self._wiring, self._wiring.w_o[0])
        positional = self._ablation == "mean-positional"
        return baseline.mean(self._wiring, self._level, self._references(), positional)

    def _references(self) -> Iterator[Prompts]:
        assert self._other is not None
        for i in range(0, len(self._other.ids), self._size):
            yield self._other.rows(slice(i, i + self._size))

    def _shape(self) -> tuple[int, ...]:
        writers = len(self.graph.writers)
        return (writers, len(self.graph.readers)) if self._level == "edge" else (writers,)

    def _clean_values(self, number: int, prompts: Prompts) -> torch.Tensor:
        decoder, behavior = self._wiring.decoder, self._behavior[self._parts[number]]
        last = behavior.only_last(prompts.kept)
        with decoder.whole(), ExitStack() as stack:
            if last:
                baseline.last_alone(self._wiring, stack)
            logits = run(decoder, prompts.given, last)
        kept = None if last else prompts.kept
        if behavior.rows is None and behavior.function is None:
            # the token that the model predicts on the prompt, in all runs
            predicted = last_logits(logits, kept).argmax(-1)
            behavior = read_target(self._where, predicted, len(predicted))
        self._targets[number] = behavior
        return behavior(logits, kept).double().cpu()

    def _hooked(
        self, prompts: Prompts, base: Baseline, masks: torch.Tensor, last: bool,
        claims: Claims | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Logits `[C B, P, V]`."""
        decoder = self._wiring.decoder
        kind = Edges if self._level == "edge" else Nodes
        with decoder.whole(), ExitStack() as stack:
            rows = prompts.ids.shape
            kind(self._wiring, self._heads, base, masks, rows, stack, claims)
            if last:
                baseline.last_alone(self._wiring, stack)
            return run(decoder, _stacked(prompts, len(masks)), last)

    def _run(
        self, number: int, prompts: Prompts, base: Baseline, masks: torch.Tensor
    ) -> torch.Tensor:
        """`[C, B]`."""
        behavior = self._targets[number]
        last = behavior.only_last(prompts.kept)
        logits = self._hooked(prompts, base, masks, last)
        kept = None if last else prompts.kept
        each = logits.unflatten(0, (len(masks), -1))
        return torch.stack([behavior(rows, kept) for rows in each]).double().cpu()

    def _check(self, prompts: Prompts, base: Baseline) -> None:
        """On one prompt, of all edges, or of no node."""
        first = prompts.rows(slice(0, 1))
        mask = self.graph.allowed() if self._level == "edge" else torch.zeros(self._shape()).bool()
        claims = Claims(first.kept)
        if self._ablation == "counterfactual":
            base = _first(base)
        self._hooked(first, base, mask[None], True, claims)
        claims.check(self._wiring.decoder.refusal)
        self._checked = True


def _first(base: Baseline) -> Baseline:
    """Of the first prompt."""
    return Baseline(
        base.writes.each(lambda x: x[:1]),
        tuple(x[:1] for x in base.x),
        tuple(x[:1] for x in base.middle),
        base.final[:1],
        tuple({part: x[:1] for part, x in parts.items()} for parts in base.parts),
    )
