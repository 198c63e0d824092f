# SPDX-License-Identifier: Apache-2.0
"""Find the circuit of a behaviour: what every edge, or node, of a model does for it.

For an edge from a writer u to a reader v (`mikernels.models.graph`)

    score = mean over prompts of sum over positions of <a_u - a'_u, G_v>

with a_u what u writes on a prompt, a'_u on its counterfactual, and G_v the gradient of the
behaviour's number at what v reads: to first order what the number loses when v reads a'_u in the
place of a_u. A node's score is the sum of those of its edges to all readers.

| method | G | passes | source |
|---|---|---|---|
| `eap` | the gradient on the prompt | 1 + 1 | Syed et al., arXiv 2310.10348 |
| `gim` | that under GIM's backward rules | 1 + 1 | Edin et al., arXiv 2505.17630 |
| `eap-ig` | the mean of those at inputs k / m of the way from the counterfactual, k < m | 2 + m | \
Hanna et al., arXiv 2403.17806 |
| `eap-ig-activations` | the mean of those with one block's attention or MLP k / m of the way, \
0 < k <= m, over all of these | 2 + (2 L + 1) m | the same |
| `atp` | as eap, of nodes | 1 + 1 | attribution patching, Kramár et al., arXiv 2403.00745 |

Passes are forward only, plus forward and backward. The gradients of m passes are added up before
they meet the writers, so that of m steps the products cost as much as those of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.circuits.circuit import LEVELS, Circuit
from mikernels.circuits.passes import run, under
from mikernels.circuits.prompts import Inputs, Prompts, check_aligned, read_prompts
from mikernels.circuits.recording import (
    Gradients,
    Patch,
    Written,
    at_readers,
    at_writers,
    record,
)
from mikernels.circuits.scoring import Changes, Products
from mikernels.circuits.targets import Behavior, Target, last_logits, read_target, vocabulary
from mikernels.models.decoder import find_decoder
from mikernels.models.graph import Graph
from mikernels.models.hooks import check_one_dtype, original
from mikernels.models.readers import Wiring, wire
from mikernels.models.rules import Rules
from mikernels.values.intervals import resampled_counts

NAME = "find_circuit"
FIX = "score its edges with hooks of your own and mikernels.edge_scores"
METHODS = ("eap", "gim", "eap-ig", "eap-ig-activations", "atp")
# bytes that the tensors of one forward and backward pass may take
BATCH = 2 << 30
# rows that stretch the norms (`recording.Stretch`) of so many passes are kept before they are used
STRETCHES = 8


@dataclass(eq=False)
class _Sums:
    """What batches add to.

    Attributes:
        scores: `[1 + Q, ...]`, of all prompts and of each bootstrap sample.
        positions: `[P, ...]`, None unless wanted.
    """

    scores: torch.Tensor
    positions: torch.Tensor | None


@torch.inference_mode(False)
@torch.no_grad()
def find_circuit(
    model: torch.nn.Module,
    clean: Inputs,
    corrupted: Inputs,
    metric: Target | None = None,
    method: str = "gim",
    *,
    level: str | None = None,
    tokenizer: object = None,
    steps: int = 5,
    rules: str | Rules | None = None,
    replicates: int = 100,
    positions: bool = False,
    batch: int | None = None,
    seed: int = 0,
) -> Circuit:
    """What every edge, or node, of a model does for a behaviour.

    Args:
        model: a Hugging Face causal language model, or a HookedTransformer, in eval mode.
        clean: prompts, in any form of `gim_probe`'s.
        corrupted: of each prompt a counterfactual, token by token.
        metric: the number, of `mikernels.circuits.targets`: a token, a pair (a, b), ...; None: the
            logit of the token that the model predicts on the clean prompt.
        method: of the table above.
        level: "edge" or "node"; None: edges, but for "atp".
        tokenizer: for prompts and metrics that are texts.
        steps: m, of the methods that integrate.
        rules: backward rules (`mikernels.circuits.rules`) in the place of the method's own.
        replicates: bootstrap samples of the prompts whose scores are kept as well, in the same
            passes; 0 for a single prompt.
        positions: also keep scores by position.
        batch: prompts a pass; None: as many as take some 2 GB, and all of them for a metric that
            is a callable. It is given the logits of so many, in their order.
        seed: of the bootstrap.

    Returns:
        Circuit: `.select(size)`, `.ranking(k)`; scores in float32. That of prompts one by one is
        the mean of theirs.

    Raises:
        TypeError, ValueError: before the model runs for another method, level, prompts, metric or
            model; prompts and counterfactuals that are not aligned. For a model whose arithmetic is
            another (what is written does not add up, nor gradients), with the place; and for a
            behaviour whose number is the same on all counterfactuals: there is nothing to explain.

    Example:
        >>> task = circuits.tasks.ioi(tokenizer, 4)
        >>> found = circuits.find_circuit(
        ...     model, task.inputs, task.counterfactual_inputs, task.target
        ... )
        >>> len(found.ranking(5))
        5
    """
    level = _check(method, level, steps, replicates, batch, rules)
    model = original(model)
    decoder = find_decoder(model, NAME, FIX)
    decoder.check_eval()
    check_one_dtype(NAME, model)
    prompts = read_prompts(decoder, "clean", clean, tokenizer)
    others = read_prompts(decoder, "corrupted", corrupted, tokenizer)
    check_aligned(NAME, prompts, others, "clean", "corrupted")
    n = len(prompts.ids)
    behavior = read_target(NAME, metric, n, vocabulary(decoder), tokenizer)
    if metric is None:
        only_last = behavior.only_last(prompts.kept)
        logits = run(decoder, prompts.given, only_last)
        last = last_logits(logits, None if only_last else prompts.kept)
        behavior = read_target(NAME, last.argmax(-1).tolist(), n, vocabulary(decoder), tokenizer)
    wiring = wire(decoder)
    graph = wiring.graph
    acc = accumulate_dtype(next(model.parameters()).dtype)
    q = replicates if n > 1 else 0
    weights = torch.full((1 + q, n), 1 / n, dtype=acc)
    if q:
        weights[1:] = torch.from_numpy(resampled_counts(n, q, seed) / n).to(acc)
    weights = weights.to(prompts.ids.device)
    w, r, p = len(graph.writers), len(graph.readers), prompts.ids.shape[1]
    shape = (w, r) if level == "edge" else (w,)
    sums = _Sums(
        torch.zeros(1 + q, *shape, dtype=acc, device=prompts.ids.device),
        torch.zeros(p, *shape, dtype=acc, device=prompts.ids.device) if positions else None,
    )
    values, other_values = [], []
    chosen = rules if rules is not None else "gim" if method == "gim" else None
    # it may hold answers of all prompts, or compare them
    size = batch or (n if behavior.function is not None else _batch(wiring, p))
    with under(model, chosen) as report:
        for first in range(0, n, size):
            part = slice(first, first + size)
            one = _Batch(
                wiring, prompts.rows(part), others.rows(part), behavior[part], weights[:, part]
            )
            found = one.add(method, level, steps, sums)
            values.append(found[0])
            other_values.append(found[1])
    clean_values, others_values = torch.cat(values), torch.cat(other_values)
    if torch.equal(clean_values, others_values):
        raise ValueError(
            f"{NAME}: metric must differ between prompts and counterfactuals, got "
            f"{behavior.label} = {clean_values[0].item():.4g} on both; there is nothing to explain"
        )
    if not sums.scores.isfinite().all():
        raise ValueError(
            f"{NAME}: scores must be finite, got NaN or inf; load the model in a wider dtype"
        )
    scores = sums.scores.float().cpu()
    return Circuit(
        graph,
        level,
        method,
        behavior.label,
        clean_values.float().cpu(),
        others_values.float().cpu(),
        scores[0],
        scores[1:],
        None if sums.positions is None else sums.positions.float().cpu(),
        report,
    )


def _check(
    method: str, level: str | None, steps: int, replicates: int, batch: int | None, rules: object
) -> str:
    """The level; whatever can be said before a model is looked at."""
    if method not in METHODS:
        raise ValueError(f"{NAME}: method must be one of {METHODS}, got {method!r}")
    if level is None:
        level = "node" if method == "atp" else "edge"
    if level not in LEVELS or (method == "atp" and level != "node"):
        raise ValueError(
            f"{NAME}: level must be one of {LEVELS}, and 'node' for 'atp', got {level!r} for "
            f"{method!r}; edges of attribution patching are method='eap'"
        )
    for name, value, least in (("steps", steps, 1), ("replicates", replicates, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{NAME}: {name} must be at least {least}, got {value!r}")
    if batch is not None and (not isinstance(batch, int) or batch < 1):
        raise ValueError(f"{NAME}: batch must be at least 1 prompt, got {batch!r}")
    if rules is not None and method == "gim":
        raise ValueError(
            f"{NAME}: rules must be None for method 'gim', which has its own, got {rules!r}; give "
            f"method='eap'"
        )
    return level


def _batch(wiring: Wiring, positions: int) -> int:
    """Prompts whose pass takes some BATCH bytes: 34 tensors of d a block and token, of Llamas."""
    element = next(wiring.decoder.model.parameters()).element_size()
    token = 34 * element * wiring.decoder.d * len(wiring.layers)
    return max(1, BATCH // (token * positions))


class _Batch:
    """Some prompts, their counterfactuals, and the weights of each in every sum."""

    def __init__(
        self,
        wiring: Wiring,
        prompts: Prompts,
        others: Prompts,
        behavior: Behavior,
        weights: torch.Tensor,
    ):
        self.wiring, self.prompts, self.others = wiring, prompts, others
        self.behavior, self.weights = behavior, weights

    def add(
        self, method: str, level: str, steps: int, sums: _Sums
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds its scores; the numbers of the prompts, and of their counterfactuals."""
        patches: Sequence[Patch | None] = [None]
        found: list[torch.Tensor] = []

        # after the pass with gradients, when its graph is gone: 0.97 GB above the weights where it
        # was 1.27, for 400 tokens and 8 layers of Llama-8B's widths
        def compare(written: Written) -> Changes:
            other = record(self.wiring, self.others, self.behavior)
            found.extend([written.values, other.values])
            return Changes.of(written, other, last=True)

        if method in _PATHS:
            attention = method == "eap-ig-activations"
            other = record(self.wiring, self.others, self.behavior, attention)
            clean = record(self.wiring, self.prompts, self.behavior, attention)
            changes = Changes.of(clean, other)
            found = [clean.values, other.values]
            patches = list(_PATHS[method](self.wiring.graph, clean, other, steps))
        find = self._edges if level == "edge" else self._nodes
        find(patches, (lambda _: changes) if method in _PATHS else compare, sums)
        return found[0], found[1]

    def _edges(
        self, patches: Sequence[Patch | None], compare: Callable[[Written], Changes], sums: _Sums
    ) -> None:
        products = Products(self.wiring, sums.scores)
        weights = self.weights / len(patches)
        gradients: list[Gradients] | None = None
        end: torch.Tensor | None = None
        for number, patch in enumerate(patches, 1):
            written, gradients, g = at_readers(
                self.wiring, self.prompts, self.behavior, gradients, patch
            )
            end = g.to(self.weights.dtype) if end is None else end + g
            if number == len(patches) or len(gradients[0].stretches) >= STRETCHES:
                changes = compare(written)
                products.add(changes, gradients, end, weights, self.prompts.kept, sums.positions)
                gradients = end = None

    def _nodes(
        self, patches: Sequence[Patch | None], compare: Callable[[Written], Changes], sums: _Sums
    ) -> None:
        total: list[torch.Tensor] = []
        for patch in patches:
            written, grads = at_writers(self.wiring, self.prompts, self.behavior, patch)
            # as in `recording`, not in bf16
            wide = [g.to(self.weights.dtype) for g in grads]
            total = [a.add_(b) for a, b in zip(total, wide, strict=True)] if total else wide
        scores = self._node_scores(compare(written), [g.to(written.start.dtype) for g in total])
        scores = scores.to(sums.scores.dtype) / len(patches)
        sums.scores += self.weights @ scores.sum(1)
        if sums.positions is not None:
            sums.positions += torch.einsum("b,bpw->pw", self.weights[0], scores)

    def _node_scores(self, changes: Changes, grads: list[torch.Tensor]) -> torch.Tensor:
        """`[B, P, W]`, 0 at padding."""
        wide = accumulate_dtype(changes.start.dtype)
        at = iter(grads)

        def dot(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
            return torch.linalg.vecdot(a.to(wide), g.to(wide))

        found = [dot(changes.start, next(at))[..., None]]
        for z, mlp, w, reading in zip(
            changes.z, changes.mlp, self.wiring.w_o, self.wiring.layers, strict=True
        ):
            g = next(at)
            g = g if reading.written is None else reading.written.back_(g.clone())
            pulled = (g @ w.flatten(0, 1).T).unflatten(-1, z.shape[2:])
            found.append(dot(z, pulled))
            if mlp is not None:
                found.append(dot(mlp, next(at))[..., None])
        scores = torch.cat(found, -1)
        kept = self.prompts.kept
        return scores if kept is None else scores.where(kept.to(scores.device)[..., None], 0)


def _inputs(graph: Graph, clean: Written, other: Written, steps: int) -> Iterator[Patch]:
    """Inputs k / m of the way from the counterfactual, without the prompt itself."""
    for k in range(steps):
        yield _at((0, "start"), torch.lerp(other.start, clean.start, k / steps))


def _activations(graph: Graph, clean: Written, other: Written, steps: int) -> Iterator[Patch]:
    """What the input, or one block's attention or MLP, writes, k / m of the way."""
    places = [(0, "start")]
    for i, layer in enumerate(graph.layers):
        places += [(i, "attention")] + [(i, "mlp")] * layer.mlp

    def written(of: Written, place: tuple[int, str]) -> torch.Tensor:
        layer, part = place
        found = of.start if part == "start" else getattr(of, part)[layer]
        assert found is not None
        return found

    for place in places:
        for k in range(1, steps + 1):
            yield _at(place, torch.lerp(written(other, place), written(clean, place), k / steps))


def _at(place: tuple[int, str], value: torch.Tensor) -> Patch:
    return lambda layer, part: value if (layer, part) == place else None


_PATHS = {"eap-ig": _inputs, "eap-ig-activations": _activations}
