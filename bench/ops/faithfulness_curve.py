# SPDX-License-Identifier: Apache-2.0
"""MIB's curve of a circuit: `faithfulness_curve` beside MIB's evaluator, which runs EAP-IG.

"curve": the HookedTransformer of SmolLM2-135M's sizes of `find_circuit` (of two layers for
"smoke"), set up as EAP-IG needs it, and one circuit with drawn scores. "eager" is the definition by
hand: of every size a run with the library's hooks, and the counterfactuals' activations once. The
peers are no packages of an index: checkouts of hannamw/EAP-IG (2.0.0) and of MIB's circuit track on
PYTHONPATH, the first by its `src`.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch

from mikernels.circuits import Circuit, faithfulness_curve
from mikernels.circuits.faithfulness import MIB
from mikernels.models.graph import Graph, Layer

from ..harness import peers
from ..harness.spec import (
    CPU,
    AttentionShape,
    Benchmark,
    Outputs,
    Provider,
    Runner,
    Target,
    Verdict,
    generator,
)
from .find_circuit import PAIR, layers_of, lens_of, prompts_of, weights_of

# of f, which is a ratio of small differences
ALLOWED = 1e-4


def _graph(s: AttentionShape) -> Graph:
    layer = Layer(s.heads, s.heads)
    return Graph("HookedTransformer", s.heads * s.width, (layer,) * layers_of(s))


def _inputs(shape: AttentionShape, mode: str, seed: int) -> SimpleNamespace:
    x = prompts_of(shape, mode, seed)
    graph = _graph(shape)
    there = graph.allowed()
    x.scores = torch.randn(there.shape, generator=generator(seed)).where(there, 0)
    none = torch.zeros(0)
    x.circuit = Circuit(
        graph, "edge", "drawn", "", none, none, x.scores, x.scores.new_zeros(0, *there.shape),
        None, None,
    )  # fmt: skip
    return x


def _ours(model: Any, x: SimpleNamespace) -> torch.Tensor:
    found = faithfulness_curve(model, x.ids, x.other, PAIR, x.circuit)
    units = found.values.mean(1) - found.empty.mean()
    return units / (found.clean.mean() - found.empty.mean())


def _metric(logits: torch.Tensor, *others: Any) -> torch.Tensor:
    return logits[:, -1, PAIR[0]] - logits[:, -1, PAIR[1]]


def _theirs(model: Any, x: SimpleNamespace) -> torch.Tensor:
    evaluate, graph = peers.mib_evaluator()
    made = graph.Graph.from_model(model)
    made.scores[:] = x.scores
    batches = [(x.ids, x.other, None)]
    *_, found = evaluate(model, made, batches, _metric, quiet=True, absolute=False)
    return torch.tensor(found, dtype=torch.float64)


class _ByHand:
    """The runs with the library's hooks: writers `[B, P, W, d]`, in the order of the graph."""

    def __init__(self, model: Any, graph: Graph):
        self.model, self.graph = model, graph
        self.writers = {"hook_embed": 0}
        self.readers: dict[str, slice] = {}
        for i, layer in enumerate(graph.layers):
            at, first = graph.first_writer(i), graph.first_reader(i)
            self.writers[f"blocks.{i}.attn.hook_result"] = at
            self.writers[f"blocks.{i}.hook_mlp_out"] = at + layer.heads
            for part in "qkv":
                self.readers[f"blocks.{i}.hook_{part}_input"] = slice(first, first + layer.heads)
                first += layer.heads
            self.readers[f"blocks.{i}.hook_mlp_in"] = slice(first, first + 1)
        last = len(graph.readers)
        self.readers[f"blocks.{len(graph.layers) - 1}.hook_resid_post"] = slice(last - 1, last)

    def run(self, ids: torch.Tensor, store: Any, change: Any = None) -> torch.Tensor:
        def by_head(x: torch.Tensor) -> torch.Tensor:
            return x if x.dim() == 4 else x[:, :, None]

        def see(x: torch.Tensor, hook: Any) -> None:
            at, heads = self.writers[hook.name], by_head(x)
            store(slice(at, at + heads.shape[2]), heads)

        def read(x: torch.Tensor, hook: Any) -> torch.Tensor:
            moved = change(self.readers[hook.name])
            return x + (moved if x.dim() == 4 else moved[:, :, 0])

        hooks = [(name, see) for name in self.writers]
        hooks += [(name, read) for name in self.readers] if change is not None else []
        with torch.no_grad():
            return _metric(self.model.run_with_hooks(ids, fwd_hooks=hooks)).double().mean()

    def curve(self, x: SimpleNamespace) -> torch.Tensor:
        like = self.model.W_E
        other = like.new_empty(*x.ids.shape, len(self.graph.writers), self.graph.d)

        def keep(at: slice, heads: torch.Tensor) -> None:
            other[:, :, at] = heads

        empty = self.run(x.other, keep)
        clean = self.run(x.ids, lambda at, heads: None)
        values = []
        prefix = torch.tensor(self.graph.prefix)
        for fraction in MIB:
            mask = x.circuit.select(fraction, absolute=False).pruned().mask
            cut = (self.graph.allowed() & ~mask).to(like)
            moved = torch.zeros_like(other)

            def leave(at: slice, heads: torch.Tensor, moved: torch.Tensor = moved) -> None:
                moved[:, :, at] = other[:, :, at] - heads

            def mix(
                at: slice, moved: torch.Tensor = moved, cut: torch.Tensor = cut
            ) -> torch.Tensor:
                n = int(prefix[at][0])
                return torch.einsum("bpwd,wr->bprd", moved[:, :, :n], cut[:n, at])

            values.append(self.run(x.ids, leave, mix))
        return (torch.stack(values) - empty) / (clean - empty)


def _eager(model: Any, x: SimpleNamespace) -> torch.Tensor:
    return _ByHand(model, x.circuit.graph).curve(x)


RUN = {"ours": _ours, "eager": _eager, "mib": _theirs}


def _provider(name: str, ours: bool = False) -> Provider:
    def build(x: SimpleNamespace, mode: str) -> Runner:
        model = lens_of(x.shape)
        if name == "mib":
            peers.mib_evaluator()
        return Runner(lambda: {"faithfulness": RUN[name](model, x)})

    return Provider(name, build, ours=ours, devices=(CPU,))


def _check(x: SimpleNamespace, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    if x.truth is None:
        wide = copy.deepcopy(lens_of(x.shape)).double()
        wide.cfg.dtype = torch.float64
        x.truth = _eager(wide, x)
    error, rough = (
        float((found["faithfulness"] - x.truth).abs().max()) for found in (outputs, eager)
    )
    allowed = max(ALLOWED, 2 * rough)
    wrong = "" if error <= allowed else f"f is off by {error:.1e}, allowed {allowed:.1e}"
    return Verdict(not wrong, error, rough, wrong)


def _flops(s: AttentionShape, mode: str) -> float:
    # 11 forward passes, and the edges that nine of them keep
    graph = _graph(s)
    edges = sum(int(x * graph.n_edges) for x in MIB[:-1])
    return 2.0 * s.batch * s.queries * (11 * weights_of(s) + edges * graph.d)


BENCHMARK = Benchmark(
    name="faithfulness_curve",
    summary="MIB's faithfulness curve of a circuit",
    ops=(),
    modes=("curve",),
    shapes={"curve": ("prompts",)},
    inputs=_inputs,
    providers=(_provider("ours", ours=True), _provider("mib"), _provider("eager")),
    check=_check,
    flops=_flops,
    bytes=lambda s, mode, size: 11.0 * size * weights_of(s),
    targets=(Target("prompts", "curve", "mib", 3.0),),
    family="attention",
)
