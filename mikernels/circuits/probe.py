# SPDX-License-Identifier: Apache-2.0
"""Which heads, MLPs and positions an answer rests on: activations times gradients under rules.

For a component with output a `[P, d]` and the gradient g of the answer's number there

    score = sum over positions and d of (a - a') g,

what the component adds to the number to first order, with a' its output on the counterfactual
prompt (0 without one). A head writes `z W_O` into the output of its projection, whose gradient is
g, so that its score is `sum of (z - z') g_z` with `g_z = g W_O^T`, the gradient at z: no head's
output is formed. That the heads of a layer and the bias add up to the score of the projection's
output is checked on every prompt and position.

Under the rules of GIM (Edin et al., arXiv 2505.17630) the gradient sees through what hides
components: saturated attention, norms that shrink what others add, factors that share an effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Group, RenderableType

from mikernels._dispatch import accumulate_dtype
from mikernels.circuits.attribution import TokenAttribution
from mikernels.circuits.interactions import (
    GradientInteractions,
    compute_gradient_interactions,
    select_top_k,
)
from mikernels.circuits.interpret import Circuits, interpret_circuits
from mikernels.circuits.passes import Pass, backward, forward, under
from mikernels.circuits.patterns import HeadScores, Patterns
from mikernels.circuits.prompts import Inputs, Prompts, check_aligned, read_prompts
from mikernels.circuits.report import attention, page, parts
from mikernels.circuits.tables import Columns
from mikernels.circuits.targets import Behavior, Target, read_target, vocabulary
from mikernels.models.claims import Claims, product_limit
from mikernels.models.decoder import find_decoder
from mikernels.models.hooks import original
from mikernels.models.parts import Block, Decoder
from mikernels.models.rules import RuleReport, Rules
from mikernels.ops.pairs.pairwise_topk import check_selection
from mikernels.values.intervals import Interval, mean_intervals, resampled_means

NAME = "gim_probe"
FIX = "collect its gradients with hooks of your own for compute_gradient_interactions"
# numbers of components that lie side by side at a time
CHUNK = 1 << 24


@dataclass(frozen=True)
class Component:
    """One row of the ranking.

    Attributes:
        name: as `L3.h7`, `L3.mlp`, `L3.attn`.
        layer: from 0. head: its number, None for an MLP or a whole attention block.
        score: the mean over prompts of what it adds to the answer's number, with Student's 95 %
            interval over prompts (NaN for one prompt).
        stability: in how many bootstrap samples of the prompts it is among the k strongest, 0..1;
            NaN for one prompt.
    """

    name: str
    layer: int
    head: int | None
    score: Interval
    stability: float


@dataclass(frozen=True, eq=False)
class Probe:
    """What an answer rests on. Prints as a table (plain, and with `rich.print`).

    Attributes:
        label: of the answer's number, in words.
        values: `[B]`, that number.
        tokens: of each prompt, as text (ids without a tokenizer), without padding.
        names: of all n components, in the order of the model.
        scores: `[B, P, n]` float32: what each adds at each position of each prompt, 0 at padding.
        kept: `[B, P]`: the positions that are not padding.
        ranking: all components, largest |score| first.
        k: how many of them are shown.
        pairs: cosines of all pairs of components, of activation times gradient as one long vector
            over prompts, positions and d.
        interactions: the k strongest of these among the k components, of `interpret_circuits`.
        rules: what the backward rules acted on, None without any.
    """

    label: str
    values: torch.Tensor
    tokens: list[list[str]]
    names: tuple[str, ...]
    scores: torch.Tensor
    kept: torch.Tensor
    ranking: tuple[Component, ...]
    k: int
    pairs: GradientInteractions
    interactions: Circuits
    rules: RuleReport | None

    @property
    def components(self) -> tuple[Component, ...]:
        """The k strongest."""
        return self.ranking[: self.k]

    @property
    def positions(self) -> list[list[tuple[str, float]]]:
        """Of each prompt, each token with what all components add there."""
        totals = self.scores.sum(-1)
        return [
            list(zip(tokens, row[kept].tolist(), strict=True))
            for tokens, row, kept in zip(self.tokens, totals, self.kept, strict=True)
        ]

    def head_matrix(self) -> torch.Tensor:
        """`[layers, heads]`: the mean scores of heads.

        Raises:
            ValueError: for a probe of attention blocks.
        """
        heads = [c for c in self.ranking if c.head is not None]
        if not heads:
            raise ValueError("Probe: heads must have been probed, got attention blocks; heads=True")
        shape = [1 + max(c.layer for c in heads), 1 + max(c.head or 0 for c in heads)]
        found = torch.zeros(shape)
        for c in heads:
            found[c.layer, c.head] = c.score.value
        return found

    def where(self, component: Component) -> str:
        """The token at which a component adds most, in words; of several prompts the first's."""
        row = self.scores[0, :, self.names.index(component.name)][self.kept[0]]
        return self.tokens[0][int(row.abs().argmax())]

    def _cells(self) -> list[tuple[str, ...]]:
        several = len(self.values) > 1
        found = []
        for number, c in enumerate(self.components, 1):
            row: tuple[str, ...] = (str(number), c.name, f"{c.score.value:+.4f}")
            if several:
                row += (f"[{c.score.low:+.4f}, {c.score.high:+.4f}]", f"{c.stability:.0%}")
            else:
                row += (repr(self.where(c)),)
            found.append(row)
        return found

    def _head(self) -> tuple[str, ...]:
        head = ("", "component", "score")
        if len(self.values) > 1:
            return (*head, "95 % interval", f"in top {self.k}")
        return (*head, "most at")

    def _title(self) -> str:
        b = len(self.values)
        prompts = f"mean of {b} prompts" if b > 1 else "1 prompt"
        return f"{self.label}: {self.values.mean().item():.3f} ({prompts})"

    def _table(self) -> Columns:
        return Columns(self._title(), self._head(), self._cells(), (1,), 2)

    def __str__(self) -> str:
        return f"{self._table()}\n\n{self.interactions}"

    def __rich__(self) -> RenderableType:
        return Group(self._table().__rich__(), self.interactions)

    def to_html(
        self,
        path: str | Path | None = None,
        head_scores: HeadScores | None = None,
        *,
        title: str = "",
        tokens: TokenAttribution | None = None,
        patterns: Patterns | None = None,
        known: Mapping[str, str] | None = None,
        command: str = "",
    ) -> str:
        """One self-contained page: ranking, heat map of heads, tokens, interactions.

        Args:
            path: also written there.
            head_scores: of `head_scores`, shown beside the heat map.
            title: of the page; "": the answer's number.
            tokens: of `attribute`. patterns: of `attention_patterns`, drawn by a script.
            known: what was done, name by name. command: that makes the page again.

        Raises:
            ModuleNotFoundError: without the `report` extra.
            OSError: when it cannot be written.
        """
        ranking, *shown = self.sections(head_scores.maps() if head_scores else [])
        scores = {c.name: f"{c.score.value:+.3f}" for c in self.ranking}
        whole = [
            ranking,
            *([tokens.section()] if tokens else []),
            *shown,
            *([attention.patterns(patterns, scores)] if patterns else []),
            *([parts.facts(known or {}, command)] if known or command else []),
            *parts.rules(self.rules),
        ]
        own = self._title()
        return page.write(NAME, title or own, own if title else "", whole, path)

    def sections(self, beside: Sequence[dict[str, Any]] = ()) -> list[parts.Part]:
        """Of a page: ranking, heat maps, tokens, interactions.

        Args:
            beside: heat maps beside that of the scores.
        """
        several = len(self.values) > 1
        rows = [
            (c.name, c.score, f"{c.stability:.0%}" if several else self.where(c))
            for c in self.components
        ]
        columns = [self.names.index(c.name) for c in self.components]
        first = self.scores[0][self.kept[0]][:, columns]
        maps = [parts.heat_map("Heads", self.head_matrix(), True)] if self._has_heads() else []
        maps += beside
        note = "What each adds to the number above, to first order"
        note += (
            ": the mean over prompts, with a 95 % interval over them, and in how many bootstrap "
            f"samples of them the component is among the {self.k} strongest."
            if several
            else ", and the token at which it adds most."
        )
        last = f"in top {self.k}" if several else "most at"
        return [
            parts.ranking("Strongest components", note, rows, last),
            *([parts.maps(maps)] if maps else []),
            parts.text("At which tokens", "What all components add there.", self.positions),
            parts.grid([c.name for c in self.components], self.tokens[0], first),
            parts.circuits(self.interactions),
        ]

    def _has_heads(self) -> bool:
        return any(c.head is not None for c in self.ranking)


def _names(decoder: Decoder, w_o: list[torch.Tensor]) -> tuple[str, ...]:
    names: list[str] = []
    for layer, block in enumerate(decoder.blocks):
        heads = range(len(w_o[layer])) if w_o else None
        names += [f"L{layer}.attn"] if heads is None else [f"L{layer}.h{h}" for h in heads]
        names += [f"L{layer}.mlp"] * (block.mlp is not None)
    return tuple(names)


class _Attribution:
    """Of one pass over some prompts, and one over their counterfactuals."""

    def __init__(
        self,
        decoder: Decoder,
        done: Pass,
        other: list[dict[str, torch.Tensor]] | None,
        w_o: list[torch.Tensor],
        kept: torch.Tensor | None,
    ):
        self.decoder, self.done, self.other, self.w_o, self.kept = decoder, done, other, w_o, kept
        self.shape = done.sites[0]["x"].shape

    def _of(self, layer: int, name: str, other: bool = False) -> torch.Tensor:
        found = self.other if other else self.done.sites
        assert found is not None
        site = found[layer][name].detach()
        # of all heads side by side
        return site.reshape(*self.shape[:2], -1)

    def grad(self, layer: int, name: str) -> torch.Tensor:
        return self.done.grads[layer][name].reshape(self._of(layer, name).shape)

    def moved(self, layer: int, name: str) -> torch.Tensor:
        """Less the counterfactual's, in the dtype that sums are in."""
        x = self._of(layer, name)
        x = x.to(accumulate_dtype(x.dtype))
        return x if self.other is None else x - self._of(layer, name, True)

    def _products(self, layer: int, name: str) -> torch.Tensor:
        return self.moved(layer, name) * self.grad(layer, name)

    def scores(self) -> torch.Tensor:
        """`[B, P, n]`, summed over d; 0 at padding.

        Raises:
            ValueError: the heads of a layer do not add up; scores that are not finite.
        """
        claims = Claims(self.kept)
        found = []
        for layer, block in enumerate(self.decoder.blocks):
            if self.w_o:
                z = self._products(layer, "z").unflatten(-1, self.w_o[layer].shape[:2]).sum(-1)
                self._claim(claims, layer, block, z.sum(-1))
                found.append(z)
            else:
                found.append(self._products(layer, "attn").sum(-1, keepdim=True))
            if block.mlp is not None:
                found.append(self._products(layer, "mlp").sum(-1, keepdim=True))
        claims.check(self.decoder.refusal)
        scores = torch.cat([part.to(found[0].device) for part in found], -1).float()
        if self.kept is not None:
            scores = scores.where(self.kept.to(scores.device)[..., None], 0)
        if not scores.isfinite().all():
            raise ValueError(
                f"{NAME}: gradients must be finite, got NaN or inf; load the model in a wider dtype"
            )
        return scores

    def _claim(self, claims: Claims, layer: int, block: Block, heads: torch.Tensor) -> None:
        """Heads and bias are what the projection's output adds, within rounding."""
        out = self._products(layer, "projected")
        g, g_z = (self.grad(layer, name) for name in ("projected", "z"))
        w, bias = self.w_o[layer].flatten(0, 1), self.decoder.b_o(block)
        z, size = self.moved(layer, "z"), g.abs().to(out.dtype)
        rounded = self.decoder.rounds_products(block)
        limit = (product_limit(g, w.T, None, g_z, rounded) * z.abs()).sum(-1)
        for other in (False, True)[: 1 if self.other is None else 2]:
            read, made = (self._of(layer, name, other) for name in ("z", "projected"))
            limit += (product_limit(read, w, bias, made, rounded) * size).sum(-1)
        # of these sums over d and over the heads, as in claims
        reach = z.norm(dim=-1) * g_z.to(z.dtype).norm(dim=-1)
        reach += out.norm(dim=-1) * math.sqrt(out.shape[-1])
        limit += 8 * math.sqrt(len(w) / 3) * torch.finfo(out.dtype).eps * reach
        if bias is not None and self.other is None:
            heads = heads + (bias.detach() * g).sum(-1)
        claim = f"heads and bias of block {layer} must add up to what the projection's output adds"
        claims.equal(claim, out.sum(-1)[..., None], heads[..., None], limit[..., None])

    def vectors(self, names: tuple[str, ...]) -> Iterator[dict[str, torch.Tensor]]:
        """Activation times gradient of each component, `[T, d]` for some tokens at a time."""
        x = self.done.sites[0]["x"]
        kept = torch.ones(self.shape[:2], dtype=torch.bool) if self.kept is None else self.kept
        tokens = kept.to(x.device).flatten().nonzero()[:, 0]
        for part in tokens.split(max(1, CHUNK // (len(names) * self.shape[-1]))):
            rows: list[torch.Tensor] = []
            for layer, block in enumerate(self.decoder.blocks):
                at = "projected" if self.w_o else "attn"
                g = self.grad(layer, at).flatten(0, 1)[part]
                if self.w_o:
                    w = self.w_o[layer]
                    z = self.moved(layer, "z").flatten(0, 1)[part].unflatten(-1, w.shape[:2])
                    rows += (torch.einsum("the,hed->htd", z, w.to(z.dtype)) * g).unbind()
                else:
                    rows.append(self.moved(layer, at).flatten(0, 1)[part] * g)
                if block.mlp is not None:
                    g = self.grad(layer, "mlp").flatten(0, 1)[part]
                    rows.append(self.moved(layer, "mlp").flatten(0, 1)[part] * g)
            yield dict(zip(names, rows, strict=True))


def _rank(names: tuple[str, ...], scores: torch.Tensor, k: int) -> tuple[Component, ...]:
    """Of `[B, n]`: by the size of the mean; ties in the order of the model."""
    units = scores.double().cpu().numpy()
    intervals = mean_intervals(units)
    stable = [math.nan] * len(names)
    if len(units) > 1:
        size = abs(resampled_means(units))
        # ties at the k-th count for all of them
        least = np.partition(size, len(names) - k, axis=1)[:, len(names) - k, None]
        stable = (size >= least).mean(0).tolist()
    found = []
    for i in sorted(range(len(names)), key=lambda i: -abs(intervals[i].value)):
        layer, part = names[i][1:].split(".")
        head = int(part[1:]) if part[0] == "h" else None
        found.append(Component(names[i], int(layer), head, intervals[i], stable[i]))
    return tuple(found)


def gim_probe(
    model: torch.nn.Module,
    input_tokens: Inputs,
    target_behavior: Target | None = None,
    k: int = 10,
    *,
    tokenizer: Any = None,
    counterfactual: Inputs | None = None,
    rules: str | Rules | None = "gim",
    heads: bool = True,
    batch_size: int = 16,
) -> Probe:
    """Which heads and MLPs, at which tokens, an answer rests on, and which of them act together.

    Args:
        model: a Hugging Face causal language model in eval mode, as for `gradient_components`.
        input_tokens: token ids `[P]` or `[B, P]`, what a tokeniser returned, a text, or a list of
            texts (padded before their tokens, which changes nothing).
        target_behavior: a token (id or text) for its logit; a pair (a, b) for the logit difference;
            a set of tokens for the log of their probability; a callable of the logits `[B, P, V]`;
            per-prompt lists of these; None: the token the model predicts. See
            `mikernels.circuits.targets`.
        k: components and interactions to show.
        tokenizer: for texts, and to name tokens.
        counterfactual: a prompt for each, of the same tokens but for those that matter: scores are
            then of the difference in activation, what is lost with the counterfactual's.
        rules: of the backward pass: "gim", "frozen", "attnlrp", "relp", "plain", or a Rules; None:
            the model's own gradients.
        heads: single heads; False: whole attention blocks.
        batch_size: prompts at a time. A callable gets all of them at once.

    Returns:
        Probe: prints as a table; `.to_html()`.

    Raises:
        TypeError, ValueError: before the model runs, for a model that is not recognised or in
            training mode; a target that is not in the vocabulary, not one token, a pair of the same
            token, an empty set; padding without an attention_mask; counterfactuals that are not
            aligned. After it, for a model whose arithmetic is another, with the place and the
            numbers; a callable that does not return one number per prompt.

    Example:
        >>> probe = circuits.gim_probe(
        ...     model,
        ...     "When Mary and John went to the store, John gave a drink to",
        ...     (" Mary", " John"),
        ...     tokenizer=tokenizer,
        ... )
        >>> print(probe)
        logit difference 'Mary' - 'John': ... (1 prompt)
            component    score  most at
         1  ...
        >>> page = probe.to_html("probe.html")
    """
    model = original(model)
    decoder = find_decoder(model, NAME, FIX)
    decoder.check_eval()
    w_o = [decoder.w_o(block) for block in decoder.blocks] if heads else []
    names = _names(decoder, w_o)
    check_selection(NAME, k, "abs", None)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"{NAME}: batch_size must be at least 1, got {batch_size}")
    prompts = read_prompts(decoder, "input_tokens", input_tokens, tokenizer)
    others = None
    if counterfactual is not None:
        others = read_prompts(decoder, "counterfactual", counterfactual, tokenizer)
        check_aligned(NAME, prompts, others)
    b = len(prompts.ids)
    behavior = read_target(NAME, target_behavior, b, vocabulary(decoder), tokenizer)
    step = b if behavior.function is not None else batch_size
    at = ("z", "projected", "mlp") if heads else ("attn", "mlp")
    values: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []

    def passes() -> Iterator[dict[str, torch.Tensor]]:
        for begin in range(0, b, step):
            part = slice(begin, begin + step)
            found = _attribute(decoder, prompts.rows(part), others and others.rows(part),
                               behavior[part], at, w_o)  # fmt: skip
            values.append(found.done.values)
            scores.append(found.scores())
            yield from found.vectors(names)

    with under(model, rules) as report:
        pairs = compute_gradient_interactions(passes(), normalize=True)
    found = torch.cat(scores)
    ranking = _rank(names, found.sum(1), min(k, len(names)))
    among = sorted(names.index(component.name) for component in ranking[:k])
    best = GradientInteractions(
        tuple(names[i] for i in among), pairs.scores[among][:, among], pairs.batches, True
    )
    return Probe(
        behavior.label,
        torch.cat(values),
        prompts.texts(tokenizer),
        names,
        found,
        prompts.mask,
        ranking,
        k,
        pairs,
        interpret_circuits(select_top_k(best, k)),
        report,
    )


def _attribute(
    decoder: Decoder,
    prompts: Prompts,
    others: Prompts | None,
    behavior: Behavior,
    at: tuple[str, ...],
    w_o: list[torch.Tensor],
) -> _Attribution:
    done = backward(decoder, prompts.given, prompts.kept, behavior, at, w_o)
    other = None if others is None else forward(decoder, others.given, others.kept, w_o)
    return _Attribution(decoder, done, other, w_o, prompts.kept)
