# SPDX-License-Identifier: Apache-2.0
"""Which features make which: edges between the features of several sites, and to the answer.

For the features d that matter most at a site, at their tokens, and every feature u of the other
sites, with a the activation and m the answer's number,

    E[u, d] = dm/da_d <W[u], da_d/dx_u> (a_u - a'_u)

what u's change adds to m through d, to first order (Marks et al., arXiv 2403.19647). The error node
of u's site is a source too. `da_d/dx_u` is one backward pass through the SAE's encoder, for a node
of every prompt at once; of few prompts, for several nodes of each, on copies. It meets only the
features that are active: one dot product each, kept as sums over positions, and sums and squares
over prompts.

- "direct": paths through no other of the sites. x is a constant there, so that what arrives at d
  comes from u itself, or goes around all sites (through the residual stream, say).
- "all": every path, so that a feature's edges also count what later sites pass on.

Checked at every token: the edges of a site's features and error into d add up to
`<x_u - x'_u, da_d/dx_u> dm/da_d`. A feature that is active in the counterfactual alone has no
gradient here, and no edges into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from mikernels.circuits.features.attribution import (
    Batch,
    FeatureCircuit,
    Request,
    attribute_batch,
    check_count,
    circuit_of,
    read_request,
)
from mikernels.circuits.features.decompose import Decomposed
from mikernels.circuits.features.dictionaries import SAEs
from mikernels.circuits.features.linked import PATHS, Linked
from mikernels.circuits.features.nodes import SiteScores
from mikernels.circuits.passes import under
from mikernels.circuits.prompts import Inputs, Prompts
from mikernels.circuits.targets import Behavior, Target
from mikernels.models.rules import Rules
from mikernels.models.sites import Site
from mikernels.values.intervals import Interval, sum_intervals

NAME = "feature_graph"
ANSWER = "answer"


@dataclass(frozen=True)
class FeatureEdge:
    """One edge.

    Attributes:
        source: a feature, an error or a skip connection, as `14.mlp_out.f123`.
        target: a feature, or "answer".
        score: the mean over prompts, all positions together, with Student's 95 % interval.
    """

    source: str
    target: str
    score: Interval


@dataclass(frozen=True, eq=False)
class FeatureGraph:
    """Features of several sites, and what they make of each other. Prints as a table.

    Attributes:
        circuit: the features by themselves.
        paths: "direct" or "all".
        edges: the k strongest between features, and the k strongest to the answer; largest |score|
            first.
    """

    circuit: FeatureCircuit
    paths: str
    edges: tuple[FeatureEdge, ...]

    def to_rows(self) -> list[dict[str, Any]]:
        """Edges for a report, JSON-able."""
        return [
            {"source": e.source, "target": e.target, **e.score.to_dict()} for e in self.edges
        ]  # fmt: skip

    def _cells(self) -> list[tuple[str, ...]]:
        several = len(self.circuit.values) > 1
        found: list[tuple[str, ...]] = [("source", "target", "score")]
        found[0] += ("95 % interval",) if several else ()
        for e in self.edges:
            row: tuple[str, ...] = (e.source, e.target, f"{e.score.value:+.4g}")
            row += (f"[{e.score.low:+.4g}, {e.score.high:+.4g}]",) if several else ()
            found.append(row)
        return found

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        rows = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in cells
        ]
        return "\n".join([str(self.circuit), "", *rows])

    def __rich__(self) -> Table:
        head, *rows = self._cells()
        table = Table(title=f"Edges, {self.paths} paths", title_justify="left")
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i < 2 else "right")
        for row in rows:
            colour = "green" if row[2].startswith("+") else "red"
            table.add_row(*(Text(c, style=colour if i == 2 else "") for i, c in enumerate(row)))
        return table


class _Nodes(NamedTuple):
    """The nodes of one site in some prompts, `[n]` each: prompt, token of T, feature, dm/da, and
    the rank within the prompt."""

    prompts: torch.Tensor
    tokens: torch.Tensor
    features: torch.Tensor
    gradients: torch.Tensor
    ranks: torch.Tensor


def _strongest(part: Decomposed, scores: SiteScores, count: int) -> _Nodes:
    """In each prompt, of those that are active there; ties in the order of tokens and features."""
    active = (scores.values != 0).nonzero()[:, 0]
    prompts, sizes = scores.prompts[active], scores.scores[active].double().abs()
    order = torch.from_numpy(np.lexsort((-sizes.numpy(), prompts.numpy())))
    prompts = prompts[order]
    starts = torch.searchsorted(prompts, prompts)
    ranks = torch.arange(len(order)) - starts
    kept = ranks < count
    at = active[order][kept]
    tokens = part.slots.tokens.cpu()[at]
    return _Nodes(
        prompts[kept], tokens, scores.features[at], scores.gradients[at], ranks[kept]
    )  # fmt: skip


class _Sums:
    """Sums by key, of int64 keys as they come."""

    def __init__(self, columns: int) -> None:
        self.keys = np.empty(0, np.int64)
        self.sums = np.empty((columns, 0))

    def add(self, keys: np.ndarray, *values: np.ndarray) -> None:
        known = np.concatenate([self.keys, keys])
        self.keys, place = np.unique(known, return_inverse=True)
        # in the order of the keys as they came, whatever runs in parallel
        self.sums = np.stack(
            [
                np.bincount(place, np.concatenate([old, new]), minlength=len(self.keys))
                for old, new in zip(self.sums, values, strict=True)
            ]
        )


class _Edges:
    """Adds up edges over passes, prompts and batches."""

    def __init__(self, request: Request, nodes: int, paths: str):
        self.request, self.nodes, self.paths = request, nodes, paths
        # (source site, target site) -> sums and squares by u times targets plus d
        self.pairs: dict[tuple[str, str], _Sums] = {}

    def add(self, batch: Batch, prompts: Prompts, behavior: Behavior) -> None:
        b = len(prompts.ids)
        repeats = max(1, min(self.request.step // b, self.nodes))
        with self.request.frozen():
            linked = Linked(self.request, batch, prompts, behavior, self.paths, repeats)
            for part, scores in zip(batch.parts, batch.scores, strict=True):
                nodes = _strongest(part, scores, self.nodes)
                self._into(part, nodes, linked, batch, repeats)
            everyone = torch.arange(b)
            answer = _Nodes(
                everyone, everyone, torch.zeros_like(everyone), torch.ones(b), torch.zeros(b)
            )
            pulled = linked.pulled(linked.values.sum(), [p.site for p in batch.parts])
            totals: dict[str, _Sums] = {}
            self._meet(totals, pulled, answer, 0, batch, repeats, 1)
            self._flush(totals, ANSWER, 1)

    def _into(
        self, part: Decomposed, nodes: _Nodes, linked: Linked, batch: Batch, repeats: int
    ) -> None:
        """Every edge into the nodes of one site."""
        f = part.dictionary.n_features
        sources = [other.site for other in batch.parts if other.site != part.site]
        copies = linked.codes(part)
        totals: dict[str, _Sums] = {}
        last = int(nodes.ranks.max()) if len(nodes.ranks) else -1
        for begin in range(0, last + 1, repeats):
            total = linked.values.new_zeros(())
            for copy, slots in enumerate(copies):
                mine = (nodes.ranks == begin + copy).nonzero()[:, 0]
                known = slots.tokens * f + slots.features
                wanted = (nodes.tokens[mine] * f + nodes.features[mine]).to(known.device)
                total = total + slots.values[torch.searchsorted(known, wanted)].sum().to(total)
            pulled = linked.pulled(total, sources)
            self._meet(totals, pulled, nodes, begin, batch, repeats, f)
        self._flush(totals, str(part.site), f)

    def _meet(
        self, totals: dict[str, _Sums], pulled: dict[Site, torch.Tensor], nodes: _Nodes,
        begin: int, batch: Batch, repeats: int, targets: int,
    ) -> None:  # fmt: skip
        """The sources' features and errors times the gradients of one pass, by prompt."""
        b = len(batch.values)
        # of each copy and prompt the node, -1 for none
        node = torch.full((repeats, b), -1, dtype=torch.int64)
        mine = ((nodes.ranks >= begin) & (nodes.ranks < begin + repeats)).nonzero()[:, 0]
        node[(nodes.ranks[mine] - begin).long(), nodes.prompts[mine]] = mine
        for part, scores in zip(batch.parts, batch.scores, strict=True):
            if part.site not in pulled:
                continue
            g = pulled[part.site].to(part.moved.device)
            found = part.products(self.request.where, g, repeats)
            u = part.dictionary.n_features
            of_slot = node[:, scores.prompts]
            dots = found.features.cpu().view(repeats, -1)
            parts = [(of_slot, scores.features.expand_as(of_slot), scores.deltas * dots)]
            token_prompts = batch.prompts
            of_token = node[:, token_prompts]
            for number, rows in ((u, found.error), (u + 1, found.skip)):
                if rows is not None:
                    rows = rows.cpu().view(repeats, -1)
                    parts.append((of_token, torch.full_like(of_token, number), rows))
            at, sources, amounts = (torch.cat([p[i] for p in parts], 1) for i in range(3))
            has = at >= 0
            at, sources = at[has], sources[has]
            values = amounts[has].double() * nodes.gradients[at].double()
            keys = (nodes.prompts[at] * (u + 2) + sources) * targets + nodes.features[at]
            name = str(part.site)
            totals.setdefault(name, _Sums(1)).add(keys.numpy(), values.numpy())

    def _flush(self, totals: dict[str, _Sums], target: str, targets: int) -> None:
        """A batch's sums by prompt, into sums and squares over prompts."""
        for source, found in totals.items():
            u = self._sources(source) + 2
            pair = self.pairs.setdefault((source, target), _Sums(2))
            values = found.sums[0]
            pair.add(found.keys % (u * targets), values, values**2)

    def _sources(self, site: str) -> int:
        return next(
            one.n_features
            for one in self.request.dictionaries
            if str(one.writes[0]) == site
        )  # fmt: skip

    def strongest(self, k: int) -> tuple[FeatureEdge, ...]:
        """k of those into features and k of those to the answer; ties as they are kept."""
        n = len(self.request.prompts.ids)
        found: dict[bool, list[tuple[float, int, FeatureEdge]]] = {True: [], False: []}
        for (source, target), pair in self.pairs.items():
            best = np.argsort(-abs(pair.sums[0]), kind="stable")[:k]
            intervals = sum_intervals(n, pair.sums[0][best], pair.sums[1][best])
            targets = 1 if target == ANSWER else self._sources(target)
            kind = found[target == ANSWER]
            for key, interval in zip(pair.keys[best].tolist(), intervals, strict=True):
                if interval.value == 0:
                    continue
                u, d = divmod(key, targets)
                f = self._sources(source)
                name = f"f{u}" if u < f else ("error", "skip")[u - f]
                into = ANSWER if target == ANSWER else f"{target}.f{d}"
                edge = FeatureEdge(f"{source}.{name}", into, interval)
                kind.append((-abs(interval.value), len(kind), edge))
        kept = [one for kind in found.values() for one in sorted(kind, key=lambda one: one[:2])[:k]]
        return tuple(edge for _, _, edge in sorted(kept, key=lambda one: one[0]))


@torch.inference_mode(False)
def feature_graph(
    model: torch.nn.Module,
    saes: SAEs,
    clean: Inputs,
    corrupted: Inputs | None = None,
    metric: Target | None = None,
    *,
    nodes: int = 10,
    paths: str = "direct",
    rules: str | Rules | None = None,
    tokenizer: Any = None,
    k: int = 30,
    batch_size: int = 16,
) -> FeatureGraph:
    """Which features an answer rests on, and which features make those.

    Args:
        model, saes, clean, corrupted, metric, rules, tokenizer, batch_size: as for
            `feature_circuit`; each SAE at one site.
        nodes: features that edges are followed back from, of each site and prompt: the strongest,
            at their tokens.
        paths: "direct": between two sites through no third one of `saes`; "all".
        k: edges that are kept, of those between features, and of those to the answer.

    Returns:
        FeatureGraph: prints as a table; `.circuit` is that of `feature_circuit` with "atp".

    Raises:
        TypeError, ValueError: as `feature_circuit`; and for an SAE of several sites.

    Example:
        >>> text = "When Mary and John went to the store, John gave a drink to"
        >>> other = "When Mary and John went to the store, Anna gave a drink to"
        >>> graph = circuits.feature_graph(
        ...     model,
        ...     {"0.residual": sae, "1.residual": sae},
        ...     text,
        ...     other,
        ...     (" Mary", " John"),
        ...     tokenizer=tokenizer,
        ... )
        >>> len(graph.circuit.ranking), graph.edges[0].target
        (10, 'answer')
    """
    if paths not in PATHS:
        raise ValueError(f"{NAME}: paths must be one of {PATHS}, got {paths!r}")
    check_count(NAME, "nodes", nodes)
    check_count(NAME, "k", k)
    request = read_request(NAME, model, saes, clean, corrupted, metric, tokenizer, batch_size)
    for one in request.dictionaries:
        if len(one.writes) > 1:
            raise ValueError(
                f"{NAME}: saes must be of one site each, got a {one.sae.name} of "
                f"{len(one.writes)}, whose features are at several places at once; use "
                f"feature_circuit"
            )
    edges = _Edges(request, nodes, paths)
    batches = []
    with under(request.decoder.model, rules) as report:
        for prompts, others, behavior in request.batches():
            batch = attribute_batch(request, prompts, others, behavior)
            edges.add(batch, prompts, behavior)
            batches.append(batch.scored())
    circuit = circuit_of(request, batches, "atp", 10, report)
    return FeatureGraph(circuit, paths, edges.strongest(k))
