# SPDX-License-Identifier: Apache-2.0
"""Circuits of no model: random scores on the graph of SmolLM2-135M, of which few matter."""

import torch

from mikernels.circuits.attribution import TokenAttribution
from mikernels.circuits.circuit import Circuit
from mikernels.circuits.faithfulness import Curve
from mikernels.circuits.patterns import Patterns
from mikernels.models.graph import Graph, Layer

GRAPH = Graph("LlamaForCausalLM", 576, (Layer(9, 3),) * 30)
# what must not end a script, open a tag or break a line of the page
TOKENS = ["When", " Mary", " and", " John", "</script>", " went", " to", " the", "<b>&", "\n",
          " the", " store", ",", " John", " gave", " a", " ring", " to"]  # fmt: skip


def circuit(method, seed=0, graph=GRAPH, replicates=5):
    draw = torch.Generator().manual_seed(seed)
    w, r = len(graph.writers), len(graph.readers)
    # heavy tails: the middle of the model matters most
    scores = torch.randn(w, r, generator=draw) ** 5 / 2000 * graph.allowed()
    # what is written at the end, and what reads the input, is strong in real models too
    scores[:, -1] *= 12
    scores[0] *= 4
    noise = torch.randn(replicates, w, r, generator=draw)
    samples = (scores + 0.3 * scores.abs().sqrt() * noise * scores.abs()) * graph.allowed()
    values = 3 + torch.randn(32, generator=draw)
    label = "logit difference of a pair per prompt"
    return Circuit(graph, "edge", method, label, values, values - 3, scores, samples, None, None)


def curve(method, reach, graph=GRAPH):
    """A Curve of made-up numbers."""
    fractions = (.001, .002, .005, .01, .02, .05, .1, .2, .5, 1)  # fmt: skip
    sizes = tuple(int(f * graph.n_edges) for f in fractions)
    draw = torch.Generator().manual_seed(0)
    clean = 3 + torch.randn(32, generator=draw, dtype=torch.float64)
    kept = torch.tensor([min(1.0, reach * f**0.3) for f in fractions])
    values = kept[:, None] * clean + 0.5 * torch.randn(10, 32, generator=draw)
    return Curve(method, "edge", "logit", fractions, sizes, clean, 0 * clean, values)


def patterns(names):
    draw = torch.Generator().manual_seed(0)
    p = len(TOKENS)
    logits = 3 * torch.randn(len(names), p, p, generator=draw)
    hidden = torch.ones(p, p, dtype=torch.bool).triu(1)
    return Patterns(tuple(names), [TOKENS], [logits.masked_fill(hidden, -torch.inf).softmax(-1)])


def tokens():
    scores = torch.randn(1, len(TOKENS), generator=torch.Generator().manual_seed(1))
    kept = torch.ones(1, len(TOKENS), dtype=torch.bool)
    return TokenAttribution("logit", torch.tensor([3.0]), [TOKENS], scores, kept, None)
