# SPDX-License-Identifier: Apache-2.0
"""Which features of SAEs an answer rests on, and how much of it no feature says.

At each site `x = sum_f a_f W[f] + b + eps`; with x' of the counterfactual and the gradient g of the
answer's number at x, a feature, and the error node, add to first order

    (a_f - a'_f) <W[f], g>,    <eps - eps', g>

at each token (sparse feature circuits: Marks et al., arXiv 2403.19647). They add up to
`<x - x', g>`, which is checked at every token. Slots of active features are all that is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mikernels.circuits.features.decompose import Decomposed, decompose
from mikernels.circuits.features.dictionaries import Dictionary, SAEs, order, read_dictionaries
from mikernels.circuits.features.line import average_gradient
from mikernels.circuits.features.nodes import Node, SiteScores, joined
from mikernels.circuits.features.places import taps, visit
from mikernels.circuits.passes import run, under
from mikernels.circuits.prompts import Inputs, Prompts, check_aligned, read_prompts
from mikernels.circuits.targets import Behavior, Target, last_logits, read_target, vocabulary
from mikernels.models.decoder import find_decoder
from mikernels.models.hooks import frozen, original
from mikernels.models.parts import Decoder
from mikernels.models.rules import RuleReport, Rules
from mikernels.models.sites import Site
from mikernels.models.watch import Flow

NAME = "feature_circuit"
FIX = "take the gradients at its activations with hooks of your own"
METHODS = ("atp", "ig")


@dataclass(frozen=True, eq=False)
class FeatureCircuit:
    """What the features of SAEs add to an answer. Prints as a table.

    Attributes:
        label: of the answer's number, in words. method: "atp" or "ig".
        values, counterfactual_values: `[B]`: that number of each prompt, and of its counterfactual
            (None without).
        tokens: of each prompt, as text (ids without a tokenizer), without padding.
        kept: `[B, P]`: the positions that are not padding.
        sites: of each site, in the order of the model, all scores.
        ranking: the k strongest features of all sites, largest |score| first, as far as any add
            something.
        errors: the error nodes, and skip connections, in the order of the model.
        rules: what the backward rules acted on, None without any.
    """

    label: str
    method: str
    values: torch.Tensor
    counterfactual_values: torch.Tensor | None
    tokens: list[list[str]]
    kept: torch.Tensor
    sites: dict[str, SiteScores]
    ranking: tuple[Node, ...]
    errors: tuple[Node, ...]
    rules: RuleReport | None

    def token(self, node: Node) -> str:
        """The token at which a node adds most, by size; "" for one that is nowhere."""
        if node.at is None:
            return ""
        prompt, position = node.at
        return self.tokens[prompt][int(self.kept[prompt, :position].sum())]

    def to_rows(self) -> list[dict[str, Any]]:
        """Ranking and errors for a report, JSON-able."""
        return [
            {"name": node.name, "site": node.site, "feature": node.feature,
             **node.score.to_dict(), "token": self.token(node)}
            for node in (*self.ranking, *self.errors)
        ]  # fmt: skip

    def _cells(self) -> list[tuple[str, ...]]:
        found = []
        for number, node in enumerate((*self.ranking, *self.errors), 1):
            row: tuple[str, ...] = (str(number) if number <= len(self.ranking) else "", node.name)
            row += (f"{node.score.value:+.4f}",)
            if len(self.values) > 1:
                row += (f"[{node.score.low:+.4f}, {node.score.high:+.4f}]",)
            found.append((*row, repr(self.token(node))))
        return found

    def _head(self) -> tuple[str, ...]:
        interval = ("95 % interval",) if len(self.values) > 1 else ()
        return ("", "feature", "score", *interval, "most at")

    def _title(self) -> str:
        b = len(self.values)
        shown = f"{self.label}: {self.values.mean().item():.3f}"
        if self.counterfactual_values is not None:
            shown += f", counterfactual {self.counterfactual_values.mean().item():.3f}"
        return f"{shown} ({f'mean of {b} prompts' if b > 1 else '1 prompt'})"

    def __str__(self) -> str:
        cells = [self._head(), *self._cells()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        left = (1, len(widths) - 1)
        rows = [
            "  ".join(
                cell.ljust(width) if column in left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        return "\n".join([self._title(), *rows])

    def __rich__(self) -> RenderableType:
        table = Table(title=self._title(), title_justify="left")
        for name in self._head():
            table.add_column(name, justify="left" if name in ("feature", "most at") else "right")
        for row in self._cells():
            colour = "green" if row[2].startswith("+") else "red"
            table.add_row(*(Text(c, style=colour if i == 2 else "") for i, c in enumerate(row)))
        return Group(table)


class Batch(NamedTuple):
    """Of some prompts.

    Attributes:
        values, other_values: `[B]`, their numbers, and those of the counterfactuals.
        prompts: `[T]`, the prompt of each token.
        x: `[T, d]` at each site that is read or written. flows: which modules write.
        parts, scores: of each site that is written, in the order of the model.
    """

    values: torch.Tensor
    other_values: torch.Tensor | None
    prompts: torch.Tensor
    x: dict[Site, torch.Tensor]
    flows: list[Flow]
    parts: list[Decomposed]
    scores: list[SiteScores]

    def scored(self) -> Batch:
        """Without what takes memory."""
        return self._replace(x={}, parts=[])


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked of which model, read and checked before it runs."""

    where: str
    decoder: Decoder
    dictionaries: list[Dictionary]
    prompts: Prompts
    others: Prompts | None
    behavior: Behavior
    step: int
    tokenizer: Any

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No gradient of any parameter, of the model or of an SAE."""
        with ExitStack() as stack:
            for module in (self.decoder.model, *(one.sae for one in self.dictionaries)):
                stack.enter_context(frozen(module))
            yield

    def batches(self) -> Iterator[tuple[Prompts, Prompts | None, Behavior]]:
        for begin in range(0, len(self.prompts.ids), self.step):
            part = slice(begin, begin + self.step)
            others = None if self.others is None else self.others.rows(part)
            prompts = self.prompts.rows(part)
            yield prompts, others, self._fixed(prompts, self.behavior[part])

    @torch.no_grad()
    def _fixed(self, prompts: Prompts, behavior: Behavior) -> Behavior:
        """The model's own prediction of the prompts, also where an activation is another."""
        if behavior.rows is not None or behavior.function is not None:
            return behavior
        only = behavior.only_last(prompts.kept)
        logits = run(self.decoder, prompts.given, only)
        predicted = last_logits(logits, None if only else prompts.kept).argmax(-1).tolist()
        return read_target(self.where, predicted, len(predicted))


def read_request(
    where: str,
    model: torch.nn.Module,
    saes: SAEs,
    clean: Inputs,
    corrupted: Inputs | None,
    metric: Target | None,
    tokenizer: Any,
    batch_size: int,
) -> Request:
    """Everything that can be refused without the model."""
    decoder = find_decoder(original(model), where, FIX)
    decoder.check_eval()
    dictionaries = read_dictionaries(where, saes, decoder)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"{where}: batch_size must be at least 1, got {batch_size}")
    prompts = read_prompts(decoder, "clean", clean, tokenizer)
    others = None
    if corrupted is not None:
        others = read_prompts(decoder, "corrupted", corrupted, tokenizer)
        check_aligned(where, prompts, others, "clean", "corrupted")
    b = len(prompts.ids)
    behavior = read_target(where, metric, b, vocabulary(decoder), tokenizer)
    step = b if behavior.function is not None else batch_size
    return Request(where, decoder, dictionaries, prompts, others, behavior, step, tokenizer)


def check_count(where: str, name: str, count: object) -> None:
    """An int of at least 1, or a ValueError."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{where}: {name} must be at least 1, got {count!r}")


def _on_cpu(part: Decomposed, prompts: Prompts, where: str, g: torch.Tensor) -> SiteScores:
    """A site's scores under a gradient `[T, d]`."""
    found = part.products(where, g.to(part.moved.device))
    places = prompts.mask.cpu().nonzero()
    b, p = prompts.ids.shape
    tokens = part.slots.tokens.cpu()

    def spread(rows: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(b, p, dtype=rows.dtype)
        total[places[:, 0], places[:, 1]] = rows.cpu()
        return total

    values, deltas, gradients = (
        t.cpu() for t in (part.slots.values, part.delta, found.features)
    )  # fmt: skip
    return SiteScores(
        str(part.site), part.dictionary.n_features, places[tokens, 0], places[tokens, 1],
        part.slots.features.cpu(), values, deltas, gradients, deltas * gradients,
        spread(found.error), None if found.skip is None else spread(found.skip),
        spread(found.whole),
    )  # fmt: skip


def attribute_batch(
    request: Request,
    prompts: Prompts,
    others: Prompts | None,
    behavior: Behavior,
    steps: int | None = None,
) -> Batch:
    """Scores of some prompts; of gradients at x, or (steps) averaged on the way to it."""
    decoder, dictionaries = request.decoder, request.dictionaries
    writes = [site for one in dictionaries for site in one.writes]
    sites = list(dict.fromkeys(site for one in dictionaries for site in (*one.reads, *one.writes)))
    found = visit(decoder, prompts, behavior, sites, writes)
    other = None if others is None else visit(decoder, others, behavior, sites)
    theirs = None if other is None else other.x
    parts = [part for one in dictionaries for part in decompose(one, found.x, theirs)]
    parts.sort(key=lambda part: order(part.site))
    scores = []
    where = taps(decoder, found.flows, writes)
    for part in parts:
        g = found.grads[part.site]
        if steps is not None:
            g = average_gradient(
                decoder, prompts, behavior, part.site, where[part.site], part.moved, steps
            )
        scores.append(_on_cpu(part, prompts, request.where, g))
    others_values = None if other is None else other.values
    of_token = prompts.mask.cpu().nonzero()[:, 0]
    return Batch(found.values, others_values, of_token, found.x, found.flows, parts, scores)


def _strongest(sites: dict[str, SiteScores], k: int) -> tuple[Node, ...]:
    """Of all sites; ties in the order of the model, then of the features."""
    candidates = []
    for number, site in enumerate(sites.values()):
        totals = site.totals()
        best = totals.abs().argsort(descending=True, stable=True)[:k].tolist()
        candidates += [(-abs(float(totals[f])), number, f) for f in best if totals[f] != 0]
    nodes = {}
    chosen = sorted(candidates)[:k]
    for number, site in enumerate(sites.values()):
        features = [f for _, at, f in chosen if at == number]
        for feature, node in zip(features, site.nodes(features), strict=True):
            nodes[number, feature] = node
    return tuple(nodes[at, f] for _, at, f in chosen)


def circuit_of(
    request: Request, batches: list[Batch], method: str, k: int, rules: RuleReport | None
) -> FeatureCircuit:
    """What all batches together say."""
    columns = zip(*(batch.scores for batch in batches), strict=True)
    found = [joined(list(column)) for column in columns]
    sites = {scores.site: scores for scores in found}
    others = [b.other_values for b in batches if b.other_values is not None]
    return FeatureCircuit(
        request.behavior.label,
        method,
        torch.cat([batch.values for batch in batches]),
        torch.cat(others) if others else None,
        request.prompts.texts(request.tokenizer),
        request.prompts.mask.cpu(),
        sites,
        _strongest(sites, k),
        tuple(node for scores in found for node in scores.rest()),
        rules,
    )


@torch.inference_mode(False)
def feature_circuit(
    model: torch.nn.Module,
    saes: SAEs,
    clean: Inputs,
    corrupted: Inputs | None = None,
    metric: Target | None = None,
    *,
    method: str = "atp",
    steps: int = 10,
    rules: str | Rules | None = None,
    tokenizer: Any = None,
    k: int = 10,
    batch_size: int = 16,
) -> FeatureCircuit:
    """Which features an answer rests on, with the error of every SAE as a node.

    Args:
        model: a Hugging Face causal language model in eval mode, or a HookedTransformer.
        saes: SAEs of `mikernels.nn` by site (`mikernels.circuits.features.dictionaries` has the
            table); those of SAELens through `mikernels.integrations.saelens.load_sae`.
        clean, corrupted: prompts as for `gim_probe`, and one for each, aligned token by token.
            Without, scores are of what features add over nothing: `a'` and `eps'` are 0.
        metric: what is asked of the model, as target_behavior of `gim_probe`. None: the logit of
            the token that it predicts for the prompt, also of the counterfactual.
        method: "atp": the gradient at the prompt, one forward and backward pass; "ig": its mean on
            the way from the counterfactual's activation (`mikernels.circuits.features.line`).
        steps: passes for each site, of "ig".
        rules: of the backward pass, as for `gim_probe`; None: the model's own gradients.
        tokenizer: for texts, and to name tokens.
        k: features in the ranking.
        batch_size: prompts at a time. A callable metric gets all of them at once.

    Returns:
        FeatureCircuit: prints as a table; every score in coordinate form in `.sites`.

    Raises:
        TypeError, ValueError: before the model runs, as `gim_probe`, and for SAEs at sites that
            they do not fit. After it, for a model whose arithmetic is another, and for an SAE whose
            features, bias and error do not add up to the activation.

    Example:
        >>> text = "When Mary and John went to the store, John gave a drink to"
        >>> other = "When Mary and John went to the store, Anna gave a drink to"
        >>> names = (" Mary", " John")
        >>> found = circuits.feature_circuit(
        ...     model, {"1.residual": sae}, text, other, names, tokenizer=tokenizer, k=5
        ... )
        >>> len(found.ranking)
        5
    """
    if method not in METHODS:
        raise ValueError(f"{NAME}: method must be one of {METHODS}, got {method!r}")
    check_count(NAME, "k", k)
    check_count(NAME, "steps", steps)
    request = read_request(NAME, model, saes, clean, corrupted, metric, tokenizer, batch_size)
    with under(request.decoder.model, rules) as report:
        batches = [
            attribute_batch(request, *batch, steps if method == "ig" else None).scored()
            for batch in request.batches()
        ]
    return circuit_of(request, batches, method, k, report)
